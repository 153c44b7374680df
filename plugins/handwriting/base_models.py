"""Makes both small base models from nothing: `python -m llava_kit_plugins.handwriting.base_models OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that gets clip/ and llama/")
    parser.add_argument("--part", choices=("eyes", "language"), help="make only one of the two")
    parser.add_argument("--steps", type=int, help="training steps, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {} if options.steps is None else {"steps": options.steps}

    def progress(line: str) -> None:
        print(line, flush=True)

    if options.part != "language":
        from .eyes import train_eyes

        train_eyes(options.out / "clip", progress, **settings)
    if options.part != "eyes":
        from .language import train_language

        train_language(options.out / "llama", progress, **settings)


if __name__ == "__main__":
    main()
