"""One training loop.  A stage is its values; nothing here asks which stage it is."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from llava_kit import checkpoint
from llava_kit.checkpoint import RunFolder
from llava_kit.data import MicroBatch, Quarantine, batch_to
from llava_kit.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    DataError,
    DivergedError,
    ModelError,
    Problem,
    ResourceError,
)
from llava_kit.model import LlavaModel
from llava_kit.schedule import learning_rate_factor, make_optimizer, set_learning_rate
from llava_kit.splice_dispatch import DISPATCHER, describe_choice

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llava_kit.contracts import Batch
    from llava_kit.recipe import Saving, Stage

MAX_SKIPPED = 20
"""fp16 steps in a row whose gradients overflow the loss scale, before training counts as diverged."""


@dataclass(frozen=True)
class StepRow:
    """What ``metrics.jsonl`` says of one optimizer step."""

    stage: str
    step: int
    loss: float
    lr: float
    grad_norm: float
    samples: int
    tokens: int
    supervised_tokens: int
    seconds: float


class Observer(Protocol):
    """Looks on: progress bar, validation, fixed pictures."""

    def on_resume(self, step: int, total: int) -> None: ...
    def on_step(self, row: StepRow, total: int) -> None: ...
    def on_moment(self, step: int, total: int) -> None: ...


@dataclass
class Trainer:
    """Runs one stage from a step to its last.

    ``batches(start)`` gives, for every optimizer step from ``start`` on, this process's micro-batches.
    """

    accelerator: Accelerator
    model: LlavaModel
    run: RunFolder
    stage_name: str
    stage: Stage
    saving: Saving
    total_steps: int
    batches: Callable[[int], Iterator[Sequence[MicroBatch]]]
    quarantine: Quarantine
    observer: Observer
    trained: set[str]
    """Names of the parameters that train."""
    say: Callable[[str], None]
    """Tells the user something."""
    compatibility: Collection[str] = ()
    """The recipe's."""

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.stage.optimizer)
        self.warmup = self.stage.schedule.warmup(self.total_steps)
        self.wrapped, self.wrapped_optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.skipped_in_a_row = 0

    def train(self, resume: bool) -> None:
        """Train to the last step.

        Raises:
            DataError: a step has nothing to learn.
            DivergedError: a loss or gradient is not finite; weights are those before that step.
            SystemExit: SIGINT or SIGTERM came; a checkpoint was written first.
        """
        start = self._resume() if resume else 0
        if resume:
            self.observer.on_resume(start, self.total_steps)
        else:
            checkpoint.prune(self.run.checkpoints(self.stage_name), keep=0)
        self._set_modes()
        noted = 0
        with StopSignals() as stop:
            for step, micro_batches in enumerate(self.batches(start), start):
                row = self._step(step, micro_batches)
                self.run.append(self.run.metrics, vars(row))
                self.observer.on_step(row, self.total_steps)
                if len(DISPATCHER.chosen) != noted:
                    noted = len(DISPATCHER.chosen)
                    self.run.note_environment({"splice": describe_choice()})
                done = step + 1
                if stop.received or (self.saving.every and done % self.saving.every == 0 and done < self.total_steps):
                    self._save(done)
                if stop.received:
                    self.say(f"stopped after step {done}, which is saved; --resume goes on from there")
                stop.leave_if_received()
                self.observer.on_moment(done, self.total_steps)
                self._set_modes()  # looking on may have put the model into evaluation mode
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)

    def _set_modes(self) -> None:
        self.model.train()
        if not any(parameter.requires_grad for parameter in self.model.vision_encoder.parameters()):
            self.model.vision_encoder.train(False)

    # --- one step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int, micro_batches: Sequence[MicroBatch]) -> StepRow:
        began = time.perf_counter()
        for micro in micro_batches:
            self.quarantine.add(micro)
        usable = [micro.batch for micro in micro_batches if micro.batch is not None]
        labels = sum(batch.plan.label_count for batch in usable)
        if not labels:
            raise self._nothing_to_learn(step, micro_batches)
        lr = set_learning_rate(
            self.optimizer,
            learning_rate_factor(self.stage.schedule.name, step, self.warmup, self.total_steps),
        )
        loss = torch.zeros((), device=self.accelerator.device)
        for batch in usable:
            share = self._labels_of_step(batch, labels, len(micro_batches))
            loss += self._backward(batch_to(batch, self.accelerator.device), share)
        norm = self._apply(step, float(loss), [id_ for batch in usable for id_ in batch.ids])
        return StepRow(
            stage=self.stage_name,
            step=step + 1,
            loss=float(loss),
            lr=lr,
            grad_norm=norm,
            samples=sum(len(batch.ids) for batch in usable),
            tokens=sum(sum(batch.plan.lengths) for batch in usable),
            supervised_tokens=labels,
            seconds=time.perf_counter() - began,
        )

    def _nothing_to_learn(self, step: int, micro_batches: Sequence[MicroBatch]) -> DataError:
        reasons = [rejected.error.problems[0] for micro in micro_batches for rejected in micro.rejected]
        what = f"none of its {len(reasons)} samples can be used"
        where = f"stage {self.stage_name}, step {step + 1}"
        return DataError([Problem(where, what, "llava-kit check-data lists them all"), *reasons[:4]])

    def _labels_of_step(self, batch: Batch, labels: int, micro_batches: int) -> int:
        """What a micro-batch's summed loss is divided by: all labels, so that each counts the same.

        The original takes the mean of every micro-batch, and then the mean of these.
        """
        if "micro_batch_mean" not in self.compatibility:
            return labels
        return max(1, batch.plan.label_count) * micro_batches

    def _backward(self, batch: Any, labels: int) -> Tensor:
        with self.accelerator.autocast():
            loss_sum, _ = self.wrapped(batch)
            self.accelerator.backward(loss_sum / labels)
        return cast(Tensor, loss_sum.detach().float() / labels)

    def _apply(self, step: int, loss: float, ids: Sequence[str]) -> float:
        limit = None if "no_clipping" in self.compatibility else self.stage.optimizer.max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, limit if limit is not None else float("inf")))
        finite = _is_finite(loss) and _is_finite(norm)
        scaled = self.accelerator.scaler is not None
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite and not (scaled and _is_finite(loss) and self.skipped_in_a_row <= MAX_SKIPPED):
            self._stop_diverged(step, loss, norm, ids)
        self.wrapped_optimizer.step()  # an fp16 scaler leaves the weights alone when gradients overflowed
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        return norm if finite else 0.0

    def _stop_diverged(self, step: int, loss: float, norm: float, ids: Sequence[str]) -> None:
        shown = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
        what = f"loss {loss:g}, gradient norm {norm:g}; the weights were left as before this step (samples {shown})"
        hint = f"lower stages.{self.stage_name}.optimizer.lr, or resume from the last checkpoint"
        raise DivergedError(Problem(f"stage {self.stage_name}, step {step + 1}", what, hint))

    # --- saving ------------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        folder = checkpoint.step_folder(self.run.checkpoints(self.stage_name), step)
        state = {
            "stage": self.stage_name,
            "step": step,
            "quarantine": self.quarantine.to_dict(),
            "splice": describe_choice(),
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()

        def write(temporary: Any) -> None:
            checkpoint.write_training_state(temporary, self.model, self.trained, self.optimizer, state)

        checkpoint.save_folder(folder, write)
        checkpoint.prune(folder.parent, self.saving.keep)
        self.run.append(self.run.path / "events.jsonl", {"event": "saved", "stage": self.stage_name, "step": step})

    def _resume(self) -> int:
        """Restore the newest valid checkpoint; the step to go on with."""
        checkpoints = self.run.checkpoints(self.stage_name)
        step, skipped = checkpoint.newest_valid(checkpoints)
        for problem in skipped:
            self.say(str(problem))
            self.run.append(self.run.path / "events.jsonl", {"event": "passed over", "checkpoint": str(problem)})
        self.run.cut_rows(self.run.metrics, self.stage_name, step or 0)
        if step is None:
            return 0
        state = checkpoint.read_training_state(
            checkpoint.step_folder(checkpoints, step), self.model, self.trained, self.optimizer
        )
        if state["step"] != step:
            raise ModelError(Problem(str(checkpoints / f"step-{step}"), f"says it is of step {state['step']}"))
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.quarantine.load_dict(state["quarantine"])
        DISPATCHER.chosen.update(state.get("splice", {}).get("chosen", {}))  # earlier checkpoints have none
        self.say(f"goes on after step {step}")
        return step


def _is_finite(value: float) -> bool:
    return value - value == 0.0


class StopSignals:
    """Remembers SIGINT and SIGTERM while training, so that a checkpoint can be written; a second one ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:
            pass  # not in the main thread: signals are not ours to handle
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(_exit_code(number))
        self.received = number

    def leave_if_received(self) -> None:
        """End the process with the status its signal asks for."""
        if self.received is not None:
            raise SystemExit(_exit_code(self.received))


def _exit_code(number: int) -> int:
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED


def out_of_memory(stage: str, error: BaseException) -> ResourceError:
    """The three settings that help, for a step that did not fit into memory."""
    hint = f"lower stages.{stage}.micro_batch_size or max_length, or set gradient_checkpointing=true"
    return ResourceError(Problem(f"stage {stage}", f"out of memory: {str(error).splitlines()[0][:200]}", hint))
