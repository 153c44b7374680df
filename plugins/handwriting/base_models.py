"""Makes both small base models from nothing: `python -m llava_kit_plugins.handwriting.base_models OUT`.

With `--measure` it reads a folder of finished models and measures each on its own, as the card in `base/` reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .eyes import linear_probe, train_eyes
from .language import text_accuracy, train_language


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """The linear probe of the eyes and the language model's answers from text, both on held-out scenes."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    language = LlamaForCausalLM.from_pretrained(folder / "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "llama")
    return {
        "eyes, linear probe": linear_probe(clip.eval()),
        "language, from text": text_accuracy(language, tokenizer, scenes=500),
    }


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that gets, or has, clip/ and llama/")
    parser.add_argument("--part", choices=("eyes", "language"), help="make only one of the two")
    parser.add_argument("--steps", type=int, help="training steps, for a quick look")
    parser.add_argument("--threads", type=int, default=1, help="more than the cores there are makes it far slower")
    parser.add_argument("--measure", action="store_true", help="make nothing, measure what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        for title, scores in measure(options.out).items():
            _say(f"{title}: " + ", ".join(f"{key} {value:.1%}" for key, value in scores.items()))
        return
    settings = {} if options.steps is None else {"steps": options.steps}
    if options.part != "language":
        train_eyes(options.out / "clip", _say, **settings)
    if options.part != "eyes":
        train_language(options.out / "llama", _say, **settings)


if __name__ == "__main__":
    main()
