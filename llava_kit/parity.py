"""Whether an exported folder is the same model: the run's own answers against those of stock transformers.

The other side runs in a process of its own, in which llava_kit cannot be imported, on the folder that will be
published.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llava_kit.chat import question_turn
from llava_kit.contracts import IMAGE_TOKEN, Batch, GenerateOptions, Sample
from llava_kit.errors import ModelError, Problem
from llava_kit.importing import described

if TYPE_CHECKING:
    from llava_kit.interop import LoadedModel

TOLERANCE = 1e-5
"""Largest difference between logits, relative to the largest logit where that is above 1."""
NEW_TOKENS = 16
QUESTIONS = (("What is in this picture?", (90, 60)), ("Describe it in one word.", (48, 77)), ("Who are you?", None))
"""A wide picture, a tall one, and none."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What came out of the comparison."""

    max_difference: float
    largest: float
    texts: tuple[str, ...]
    notes: tuple[str, ...]
    """Differences that are not the model's: other ids or pixels from the folder's own processor."""
    versions: Mapping[str, str]


def check_parity(loaded: LoadedModel, folder: Path, layout: str, image_id: int | None = None) -> Parity:
    """Hold the folder against the model, in fp32.

    Args:
        layout: ``hf``, ``llava`` or ``projector``.
        image_id: the token that stands for one row of an image in the hub's layout.

    Raises:
        ModelError: logits or greedy text differ, tensors are missing or left over, or the folder does not load.
    """
    loaded.model.float()
    with tempfile.TemporaryDirectory(prefix="llava-kit-parity-") as temporary, torch.no_grad():
        exchange = Path(temporary)
        _write_projector_inputs(loaded, exchange) if layout == "projector" else _write_inputs(
            loaded, exchange, layout, image_id
        )
        script = Path(__file__).with_name("parity_stock.py")
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-I", str(script), str(folder), str(exchange)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            Problem("parity check", f"stock transformers cannot use the export: {last}", "nothing was written")
        )
    return _judged(json.loads(done.stdout.strip().splitlines()[-1]))


def _judged(result: Mapping[str, Any]) -> Parity:
    prompts: Sequence[Mapping[str, Any]] = result["prompts"]
    problems = [
        Problem("parity check", f"{kind.replace('_', ' ')}: {', '.join(result[kind][:5])}", "nothing was written")
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if result.get(kind)
    ]
    for prompt in prompts:
        if not prompt["max_difference"] <= TOLERANCE * max(1.0, prompt["largest"]):
            what = f"logits differ by {prompt['max_difference']:.2e}, allowed are {TOLERANCE:.0e}"
            problems.append(Problem("parity check", what, "nothing was written"))
        elif not prompt["same_text"]:
            problems.append(
                Problem("parity check", f"the greedy text differs: {prompt['text']!r}", "nothing was written")
            )
    if problems:
        raise ModelError(problems)
    notes = [
        f"processor: {prompt['processor']}" for prompt in prompts if prompt.get("processor", "same ids") != "same ids"
    ]
    pixels = [prompt["pixel_difference"] for prompt in prompts if prompt.get("pixel_difference")]
    notes += [f"the folder's image processor differs by up to {max(pixels):.1e} (normalised pixels)"] if pixels else []
    return Parity(
        max_difference=max(prompt["max_difference"] for prompt in prompts),
        largest=max(prompt["largest"] for prompt in prompts),
        texts=tuple(prompt["text"] for prompt in prompts),
        notes=tuple(dict.fromkeys(notes)),
        versions=result["versions"],
    )


def _write_inputs(loaded: LoadedModel, exchange: Path, layout: str, image_id: int | None) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    prompts: list[dict[str, Any]] = []
    model, lm = loaded.model, loaded.model.language_model
    ends = _ends(described("language_model", cast(nn.Module, lm))[0])
    for number, (question, size) in enumerate(QUESTIONS):
        image = _picture(exchange / f"{number}.png", size) if size else None
        turn = question_turn(question, 1 if image else 0)
        sample = Sample(id=str(number), turns=(turn,), images=(image,) if image else ())
        encoded = loaded.collator.encode(sample, reply=True)
        batch = _batch(loaded, sample)
        tensors[f"logits.{number}"] = lm.logits(lm.hidden(model.embeds(batch)))[0].float().contiguous()
        if batch.images:
            tensors[f"pixels.{number}"] = batch.images[0].pixels_NCHW
        options = GenerateOptions(max_new_tokens=NEW_TOKENS)
        generation = model.generate(batch, options)
        rows = [placed.rows for placed in encoded.sequence.images]
        prompts.append(
            {
                "question": question,
                "image": str(image) if image else None,
                "tokens": encoded.tokens.ids,
                "ids": _expanded(encoded.tokens.ids, rows, image_id),
                "greedy": generation.ids[0],
                "ends": ends,
            }
        )
    save_file(tensors, exchange / "inputs.safetensors")
    inputs = {"layout": layout, "prompts": prompts, "new_tokens": NEW_TOKENS, "ends": ends}
    (exchange / "inputs.json").write_text(json.dumps(inputs), "utf-8")


def _batch(loaded: LoadedModel, sample: Sample) -> Batch:
    micro = loaded.collator.prompts([sample])
    if micro.batch is None:
        raise ModelError(micro.rejected[0].error.problems)
    return micro.batch


def _ends(text_config: Mapping[str, Any]) -> list[int]:
    """Tokens that end an answer."""
    end = text_config.get("eos_token_id")
    return end if isinstance(end, list) else [] if end is None else [end]


def _expanded(ids: Sequence[int], rows: Sequence[int], image_id: int | None) -> list[int]:
    """One ``image_id`` per row of an image, as the hub's processor writes it."""
    left, out = list(rows), []
    for token in ids:
        out += [image_id or 0] * left.pop(0) if token == IMAGE_TOKEN else [token]
    return out


def _write_projector_inputs(loaded: LoadedModel, exchange: Path) -> None:
    from safetensors.torch import save_file

    connector: Any = loaded.model.connector
    width = loaded.model.vision_encoder.embed_dim
    features = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    save_file({"features": features, "projected": connector(features, None)}, exchange / "inputs.safetensors")
    (exchange / "inputs.json").write_text(json.dumps({"layout": "projector"}), "utf-8")


def _picture(path: Path, size: tuple[int, int]) -> Path:
    """Coloured waves, the same each time."""
    from PIL import Image

    width, height = size
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    waves = torch.stack([x.sin() + y.cos(), (x * y).sin(), (x - y).cos() * 2], dim=-1)
    Image.fromarray(((waves + 2) / 4 * 255).to(torch.uint8).numpy()).save(path)
    return path
