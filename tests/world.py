"""A small recipe on disk, with parts and data in the real formats."""

from __future__ import annotations

from pathlib import Path

from llava_kit_plugins.causal_lm import CausalLmConfig
from llava_kit_plugins.clip import ClipConfig
from llava_kit_plugins.llava_json import LlavaJsonConfig

RECIPE = """
name: tiny
seed: 3
model:
  vision_encoder: {{name: clip, folder: "{clip}"}}
  connector: linear
  language_model: {{name: causal_lm, model: "{lm}"}}
stages:
  align:
    trainable: [connector]
    data:
      chat: {{format: llava_json, path: "{data.path}", images: "{data.images}"}}
    template: {{name: vicuna_v1, system: ""}}
    optimizer: {{lr: 1e-2}}
    batch_size: 4
    micro_batch_size: 2
    steps: 4
    max_length: 512
    precision: fp32
  tune:
    trainable: [connector, language_model]
    data:
      chat: {{format: llava_json, path: "{data.path}", images: "{data.images}"}}
    template: {{name: vicuna_v1, system: ""}}
    optimizer: {{lr: 1e-3}}
    batch_size: 4
    micro_batch_size: 4
    steps: 4
    max_length: 512
    precision: fp32
    validation: {{every: 2, samples: 2, pictures: 1}}
evaluate:
  questions: {{name: exact_match, questions: "{questions}", images: "{data.images}", max_new_tokens: 3}}
saving: {{every: 2, keep: 2}}
limits: {{max_bad_samples: 5, max_bad_fraction: 0.5}}
"""


def write_world(folder: Path) -> Path:
    """The recipe's path; everything it names is made below ``folder``."""
    data = LlavaJsonConfig(path="x", images="x").tiny(folder)
    pictures = sorted(Path(data.images).iterdir())[:3]
    rows = [
        f'{{"question_id": {i}, "image": "{p.name}", "text": "Why?", "answer": "No"}}\n' for i, p in enumerate(pictures)
    ]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(rows))
    lm = CausalLmConfig(model="a/b", architecture={"model_type": "llama"}).tiny(folder)
    recipe = folder / "tiny.yaml"
    text = RECIPE.format(clip=ClipConfig().tiny(folder).folder, lm=lm.model, data=data, questions=questions)
    recipe.write_text(text)
    return recipe
