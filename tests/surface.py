"""A recipe of tiny random parts over made-up data, written to disk, for tests of what people see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava_kit_plugins.causal_lm import CausalLmConfig
from llava_kit_plugins.clip import ClipConfig


def write_parts(folder: Path) -> None:
    """A CLIP tower (16 patches, width 32) and a two-layer decoder (width 64), both random, in their real formats."""
    ClipConfig().tiny(folder)
    CausalLmConfig(model="a/b", architecture={"model_type": "llama"}).tiny(folder)


def write_data(folder: Path, records: list[dict[str, Any]]) -> None:
    """`chat.json`, and an image for every record that names one with the ending `.png`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        if str(record.get("image", "")).endswith(".png"):
            Image.new("RGB", (20, 30), (10 * number, 90, 0)).save(folder / "images" / record["image"])
    (folder / "chat.json").write_text(json.dumps(records), encoding="utf-8")


def record(key: str, question: str = "<image>\nwhat?", answer: str = "red", image: str | None = None) -> dict[str, Any]:
    """A LLaVA JSON record of one exchange; its picture is `<key>.png` unless it is given."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    picture = {"image": image or f"{key}.png"} if "<image>" in question else {}
    return {"id": key, **picture, "conversations": turns}


def write_recipe(folder: Path, **stage: Any) -> Path:
    """`recipe.yaml` with one stage, `align`, whose values may be changed; paths are absolute."""
    data = {"chat": {"format": "llava_json", "path": str(folder / "chat.json"), "images": str(folder / "images")}}
    values = {
        "trainable": ["connector"],
        "data": data,
        "template": "vicuna_v1",
        "optimizer": {"lr": 1e-3},
        "batch_size": 4,
        "micro_batch_size": 2,
        "epochs": 1,
        "max_length": 256,
        "precision": "fp32",
    }
    recipe = {
        "name": "tiny",
        "model": {
            "vision_encoder": {"name": "clip", "folder": str(folder / "clip")},
            "connector": "linear",
            "language_model": {"name": "causal_lm", "model": str(folder / "language_model")},
        },
        "stages": {"align": values | stage},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path
