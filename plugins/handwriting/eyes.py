"""Trains the small vision tower: an open_clip model, from fresh scenes.

Scenes are matched with their captions, as CLIP does.  That alone leaves digits hard to tell for a long time, since
most captions can be matched by colours; so each patch, at the block whose features LLaVA reads, also learns to name
the colour and the digit of the mark that fills it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .teach import teach
from .words import NAMES, caption
from .world import CANVAS, COLOURS, DIGIT_WORDS, PATCH, Scene, cell_map, render_array, sample_scene

MEAN, STD = (0.12, 0.12, 0.12), (0.2, 0.2, 0.2)
CONTEXT = 20
_LAYERS, _WIDTH = 4, 128
_NOTHING = len(COLOURS)
_BATCH = 96
_PEAK_LR = 1e-3

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 96,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": CANVAS,
        "patch_size": PATCH,
        "layers": _LAYERS,
        "width": _WIDTH,
        "head_width": 32,
    },
    "text_cfg": {"context_length": CONTEXT, "width": 64, "heads": 2, "layers": 2, "hf_tokenizer_name": "."},
}


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the text tower.  CLIP pools at the highest id, so the end token comes last."""
    rng = np.random.default_rng(0)
    seen = {word for _ in range(2000) for word in _words(caption(sample_scene(rng), rng, NAMES[:1]))}
    vocabulary = ["<pad>", "<unk>", "<start>", *sorted(seen), "<end>"]
    ids = {word: place for place, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, ids[word]) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<pad>"
    )


def _words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]


def patch_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Colour and digit of the mark that fills each patch, (N, P) each; `_NOTHING` and 0 where there is none."""
    maps = [cell_map(scene) for scene in scenes]
    palette = list(COLOURS)
    colours = [[_NOTHING if mark is None else palette.index(mark.colour) for mark in cells] for cells in maps]
    digits = [[0 if mark is None else mark.digit for mark in cells] for cells in maps]
    return torch.tensor(colours), torch.tensor(digits)


def alike(rng: np.random.Generator, size: int) -> list[Scene]:
    """Scenes that a glance confuses: the same digits in other colours, the same colours on other digits."""

    def pick(kinds: int, some: int) -> list[int]:
        return [int(one) for one in rng.choice(kinds, some, replace=False)]

    count = int(rng.integers(1, 4))
    digits, colours = pick(10, count), pick(len(COLOURS), count)
    scenes = []
    for _ in range(size):
        fate = rng.random()
        shown = pick(10, count) if fate < 0.4 else digits
        pens = pick(len(COLOURS), count) if fate > 0.7 else [int(pen) for pen in rng.permutation(colours)]
        scenes.append(sample_scene(rng, digits=shown, colours=[list(COLOURS)[pen] for pen in pens]))
    return scenes


def training_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Half ordinary scenes, half in groups of four that are alike."""
    scenes = [sample_scene(rng) for _ in range(count // 2)]
    while len(scenes) < count:
        scenes += alike(rng, 4)
    return scenes[:count]


def pixels(scenes: list[Scene]) -> Tensor:
    """Rendered and normalised, (N, 3, CANVAS, CANVAS)."""
    images: NDArray[np.uint8] = np.stack([render_array(scene) for scene in scenes])
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def build_clip(vocabulary: int) -> open_clip.CLIP:
    text_cfg = {key: value for key, value in MODEL_CFG["text_cfg"].items() if key != "hf_tokenizer_name"}
    clip = open_clip.CLIP(
        embed_dim=MODEL_CFG["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**MODEL_CFG["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(vocab_size=vocabulary, **text_cfg),
        quick_gelu=True,
    )
    # At CLIP's own scale the names of two digits start out almost equal, and learning stands still for long.
    nn.init.normal_(clip.token_embedding.weight, std=0.5)
    nn.init.normal_(clip.positional_embedding, std=0.1)
    nn.init.normal_(clip.visual.positional_embedding, std=0.3)
    return clip


def patch_features(clip: open_clip.CLIP, images: Tensor) -> Tensor:
    """What LLaVA reads: the penultimate block's patches, without the final norm, (N, P, D)."""
    found = clip.visual.forward_intermediates(
        images, indices=[_LAYERS - 2], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    features: Tensor = found["image_intermediates"][0]
    return features


class _Lesson(nn.Module):
    """Both losses of one batch.  `name` reads colour and digit off single patches and is thrown away afterwards."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip
        self.name = nn.Linear(_WIDTH, len(COLOURS) + 1 + len(DIGIT_WORDS))

    def forward(self, images: Tensor, captions: Tensor, colours: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.clip.visual.forward_intermediates(images, indices=[_LAYERS - 2], output_fmt="NLC")
        picture = F.normalize(seen["image_features"], dim=-1)
        sentence = self.clip.encode_text(captions, normalize=True)
        scores = self.clip.logit_scale.exp().clamp(max=100) * picture @ sentence.T
        # Two scenes of the same marks may share a sentence; equal sentences are equally right.
        same = (captions[:, None] == captions[None]).all(-1).float()
        same /= same.sum(1, keepdim=True)
        matched = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
        named = self.name(seen["image_intermediates"][0]).flatten(0, 1)
        by_colour, by_digit = named.split([len(COLOURS) + 1, len(DIGIT_WORDS)], dim=-1)
        filled = colours.flatten() != _NOTHING
        colour = F.cross_entropy(by_colour, colours.flatten())
        digit = F.cross_entropy(by_digit[filled], digits.flatten()[filled])
        return matched, digit + colour


def train_eyes(folder: Path, progress: Callable[[str], None], *, steps: int = 3000, seed: int = 0) -> None:
    """Train from nothing and save an open_clip folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = clip_tokenizer()

    def tokens(texts: list[str]) -> Tensor:
        encoded = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        ids: Tensor = encoded["input_ids"]
        return ids

    lesson = _Lesson(build_clip(len(tokenizer)))

    def loss_at(step: int) -> Tensor:
        scenes = training_scenes(rng, _BATCH)
        captions = tokens([caption(scene, rng, NAMES[:1]) for scene in scenes])
        matched, named = lesson(pixels(scenes), captions, *patch_labels(scenes))
        if step % 100 == 0:
            progress(f"eyes {step + 1}/{steps}: captions {matched:.3f}, patches {named:.3f}")
        return 0.3 * matched + named  # type: ignore[no-any-return]

    def after(step: int, loss: float) -> None:
        if step % 600 == 599 or step == steps - 1:
            save_clip(lesson.clip, tokenizer, folder)
            probe = linear_probe(lesson.clip, scenes=600)
            progress("eyes, linear probe: " + ", ".join(f"{key} {value:.1%}" for key, value in probe.items()))

    teach(lesson, loss_at, after, steps=steps, peak_lr=_PEAK_LR, weight_decay=0.05, warm_up=0.05)


def save_clip(clip: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().half().contiguous() for key, value in clip.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)
    text_cfg = MODEL_CFG["text_cfg"] | {"vocab_size": len(tokenizer)}
    config = {
        "model_cfg": MODEL_CFG | {"text_cfg": text_cfg},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def linear_probe(clip: open_clip.CLIP, *, scenes: int = 1000, seed: int = 7) -> dict[str, float]:
    """How well a linear map of single patches tells colour and digit: fitted on training scans, scored on held-out."""
    rng = np.random.default_rng(seed)
    seen = [sample_scene(rng) for _ in range(2 * scenes)]
    unseen = [sample_scene(rng, held_out=True) for _ in range(scenes)]

    def labelled(some: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            features = torch.cat([patch_features(clip, pixels(some[i : i + 100])) for i in range(0, len(some), 100)])
        colours, digits = (labels.flatten() for labels in patch_labels(some))
        filled = colours != _NOTHING
        return F.pad(features.flatten(0, 1)[filled], (0, 1), value=1.0).double(), colours[filled], digits[filled]

    (known, *known_labels), (new, *new_labels) = labelled(seen), labelled(unseen)
    gram = known.T @ known + 1e-5 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    found = {}
    for title, target, truth in zip(("colour", "digit"), known_labels, new_labels, strict=True):
        weight = torch.linalg.solve(gram, known.T @ F.one_hot(target).double())
        found[title] = float(((new @ weight).argmax(-1) == truth).double().mean())
    return found
