"""Looks on while a stage trains: progress bar, validation loss, and a few fixed pictures answered at intervals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llava_kit.chat import Answer, answer_batch
from llava_kit.contracts import GenerateOptions, Sample
from llava_kit.data import batch_to
from llava_kit.errors import DataError, DivergedError, Problem, SampleError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from llava_kit.checkpoint import RunFolder
    from llava_kit.data import Collator, Quarantine
    from llava_kit.model import LlavaModel
    from llava_kit.order import Position
    from llava_kit.recipe import Stage
    from llava_kit.trainer import StepRow

PICTURE_TOKENS = 64
"""Longest answer to a fixed picture."""


def progress_bar(console: Console) -> Progress:
    """Steps, loss, speed and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@dataclass
class StageObserver:
    """Sees every step of one stage (the trainer's ``Observer``)."""

    console: Console
    bar: Progress
    accelerator: Accelerator
    run: RunFolder
    stage_name: str
    stage: Stage
    model: LlavaModel
    collator: Collator
    chat_collator: Collator
    quarantine: Quarantine
    held_out: Sequence[tuple[Position, Sample | SampleError]]
    task: TaskID = field(init=False)

    def __post_init__(self) -> None:
        self.task = self.bar.add_task(f"stage {self.stage_name}", total=None, facts="")
        self._smooth = 0.0
        samples = [sample for _, sample in self.held_out if isinstance(sample, Sample)]
        with_images = [sample for sample in samples if sample.images and len(sample.turns) > 1]
        self.pictures = with_images[: self.stage.validation.pictures]

    def on_resume(self, step: int, total: int) -> None:
        """Forget what was seen after ``step``, and look now if the run ended between saving and looking."""
        looked = not self._is_due(step, total) or self._has_looked(step)
        self.run.cut_rows(self._picture_rows, self.stage_name, step if looked else step - 1)
        if not looked:
            self.on_moment(step, total)

    def on_step(self, row: StepRow, total: int) -> None:
        """Show the step; plain lines now and then where there is no terminal."""
        speed = row.tokens / max(row.seconds, 1e-9)
        self._smooth = speed if not self._smooth else 0.95 * self._smooth + 0.05 * speed
        facts = f"loss {row.loss:.3f}  {self._smooth:,.0f} tokens/s"
        self.bar.update(self.task, completed=row.step, total=total, facts=facts)
        if not self.console.is_terminal and (row.step % max(1, total // 10) == 0 or row.step == total):
            self.console.print(f"stage {self.stage_name}: step {row.step}/{total}, {facts}", highlight=False)
        self.accelerator.log({f"{self.stage_name}/{k}": getattr(row, k) for k in ("loss", "lr", "grad_norm")}, row.step)

    def on_moment(self, step: int, total: int) -> None:
        """Measure and answer when it is time, and at the end."""
        if self._is_due(step, total):
            self._answer_pictures(step)
            loss = self._validation_loss(step)
            row = {"stage": self.stage_name, "step": step, "validation_loss": loss}
            self.run.append(self.run.metrics, row)  # last: this row says that the look was finished

    def _is_due(self, step: int, total: int) -> bool:
        every = self.stage.validation.every
        return bool(every and step and self.held_out and (step % every == 0 or step == total))

    def _has_looked(self, step: int) -> bool:
        rows = map(json.loads, self.run.metrics.read_text("utf-8").splitlines())
        return any("validation_loss" in r and (r["stage"], r["step"]) == (self.stage_name, step) for r in rows)

    @property
    def _picture_rows(self) -> Path:
        return self.run.stage(self.stage_name) / "pictures.jsonl"

    @torch.no_grad()
    def _validation_loss(self, step: int) -> float:
        """Mean loss over the labels of the held-out slice.

        Raises:
            DataError: none of it can be used.
            DivergedError: it is not finite.
        """
        self.model.eval()
        total, labels = 0.0, 0
        where = f"stage {self.stage_name}, validation after step {step}"
        size = self.stage.micro_batch_size
        for start in range(0, len(self.held_out), size):
            micro = self.collator(self.held_out[start : start + size])
            self.quarantine.note(micro.rejected)
            if micro.batch is not None:
                with self.accelerator.autocast():
                    loss_sum, count = self.model(batch_to(micro.batch, self.accelerator.device))
                total, labels = total + float(loss_sum), labels + count
        if not labels:
            hint = "llava-kit check-data lists why; hold out more, or mend the data"
            raise DataError(Problem(where, f"none of the {len(self.held_out)} held-out samples can be used", hint))
        if not math.isfinite(total):
            raise DivergedError(Problem(where, f"the loss is {total}", "resume from the last checkpoint"))
        return total / labels

    def _answer_pictures(self, step: int) -> None:
        prompts = [Sample(id=s.id, turns=s.turns[:1], images=s.images) for s in self.pictures]
        options = GenerateOptions(max_new_tokens=PICTURE_TOKENS)
        with self.accelerator.autocast():
            answers = answer_batch(self.model, self.chat_collator, prompts, options) if prompts else []
        for sample, answer in zip(self.pictures, answers, strict=True):
            if isinstance(answer, Answer):
                row = {
                    "stage": self.stage_name,
                    "step": step,
                    "id": sample.id,
                    "image": self._keep_image(sample),
                    "question": sample.turns[0].text.strip(),
                    "reference": sample.turns[1].text,
                    "answer": answer.text,
                }
                self.run.append(self._picture_rows, row)

    def _keep_image(self, sample: Sample) -> str:
        """A copy inside the run folder, so that the report can be made anywhere."""
        folder = self.run.stage(self.stage_name) / "pictures"
        folder.mkdir(exist_ok=True)
        number = [picture.id for picture in self.pictures].index(sample.id)
        target = folder / f"{number}{sample.images[0].suffix.lower()}"
        if not target.exists():
            shutil.copyfile(sample.images[0], target)
        return target.name
