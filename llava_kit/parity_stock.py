"""Run as a script, in a process of its own: what stock transformers makes of an exported folder, as JSON on stdout.

Imports nothing of llava_kit, and makes sure that nobody else does.  Arguments: the export, and a folder with
``inputs.json`` and ``inputs.safetensors`` (see :mod:`llava_kit.parity`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_TOKEN = -200
Answer = dict[str, Any]


def hub_layout(folder: Path, inputs: Answer, tensors: dict[str, Tensor]) -> Answer:
    """``LlavaForConditionalGeneration`` and its processor."""
    reader: Any = transformers.LlavaForConditionalGeneration
    model, info = reader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    prompts = []
    for number, prompt in enumerate(inputs["prompts"]):
        ids = torch.tensor([prompt["ids"]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt["image"]:
            given["pixel_values"] = tensors[f"pixels.{number}"]
        logits = model(**given).logits[0]
        new = model.generate(**given, do_sample=False, max_new_tokens=inputs["new_tokens"])[0, ids.shape[1] :].tolist()
        prompts.append(compared(logits, new, prompt, tensors[f"logits.{number}"], processor.tokenizer))
        prompts[-1] |= processed(processor, prompt, tensors.get(f"pixels.{number}"))
    keys = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return {"prompts": prompts, **keys}


def processed(processor: Any, prompt: Answer, pixels: Tensor | None) -> Answer:
    """Whether the folder's own processor makes the same ids and pixels of the same words and picture."""
    from PIL import Image

    if processor.chat_template is None:
        return {"processor": "no chat template"}
    content = [{"type": "image"}] * bool(prompt["image"]) + [{"type": "text", "text": prompt["question"]}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.open(prompt["image"]).convert("RGB")] if prompt["image"] else None
    made = processor(images=images, text=text, return_tensors="pt")
    same = made["input_ids"][0].tolist() == prompt["ids"]
    pixel_difference = None if pixels is None else float((made["pixel_values"] - pixels).abs().max())
    return {"processor": "same ids" if same else f"other ids: {text!r}", "pixel_difference": pixel_difference}


def original_layout(folder: Path, inputs: Answer, tensors: dict[str, Tensor]) -> Answer:
    """Language model, CLIP tower and projector, each loaded by itself and put together as the original does."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tower = transformers.CLIPVisionModel.from_pretrained(folder / config["mm_vision_tower"], dtype=torch.float32)
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= load_file(path)
    projector = make_projector(config, {n: t for n, t in state.items() if "mm_projector" in n})
    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "model_type"))}
    text_config = transformers.AutoConfig.for_model(config["model_type"].removeprefix("llava_"), **text)
    own = {name: tensor.float() for name, tensor in state.items() if "mm_projector" not in name}
    lm = transformers.AutoModelForCausalLM.from_config(text_config, dtype=torch.float32).eval()
    missing, unexpected = lm.load_state_dict(own, strict=False)
    tied = getattr(lm, "all_tied_weights_keys", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = []
    for number, prompt in enumerate(inputs["prompts"]):
        rows = []
        for token in prompt["tokens"]:
            if token == IMAGE_TOKEN:
                states = tower(tensors[f"pixels.{number}"], output_hidden_states=True).hidden_states
                rows.append(projector(states[config["mm_vision_select_layer"]][:, 1:])[0])
            else:
                rows.append(lm.get_input_embeddings()(torch.tensor([token])))
        embeds = torch.cat(rows)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        logits = lm(inputs_embeds=embeds, attention_mask=mask).logits[0]
        end = {"eos_token_id": inputs["ends"], "pad_token_id": 0}
        new = lm.generate(
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=inputs["new_tokens"], **end
        )
        prompts.append(compared(logits, new[0].tolist(), prompt, tensors[f"logits.{number}"], tokenizer))
    return {
        "prompts": prompts,
        "missing_keys": [m for m in missing if m not in tied],
        "unexpected_keys": list(unexpected),
    }


def make_projector(config: Answer, state: dict[str, Tensor]) -> nn.Module:
    """The original's ``mm_projector``."""
    short = {name.split("mm_projector.")[-1]: tensor.float() for name, tensor in state.items()}
    depth = 1 if config["mm_projector_type"] == "linear" else int(config["mm_projector_type"][3:].split("x")[0])
    width = config["hidden_size"]
    layers: list[nn.Module] = [nn.Linear(config["mm_hidden_size"], width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    projector = layers[0] if depth == 1 else nn.Sequential(*layers)
    projector.load_state_dict(short)
    return projector


def projector_layout(folder: Path, inputs: Answer, tensors: dict[str, Tensor]) -> Answer:
    """``mm_projector.bin`` alone, on features."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    state = torch.load(folder / "mm_projector.bin", weights_only=True, map_location="cpu")
    made = make_projector(config, state)(tensors["features"])
    wanted = tensors["projected"]
    prompt = {"max_difference": float((made - wanted).abs().max()), "largest": float(wanted.abs().max())}
    return {"prompts": [prompt | {"same_text": True, "text": ""}]}


def compared(logits: Tensor, new: list[int], prompt: Answer, wanted: Tensor, tokenizer: Any) -> Answer:
    """Stock logits and greedy ids against those of the run's own model; new vocabulary rows are left out."""
    ends = set(prompt["ends"])
    until_end = next((index for index, token in enumerate(new) if token in ends), len(new))
    text = tokenizer.decode(new[:until_end], skip_special_tokens=True)
    return {
        "max_difference": float((logits[:, : wanted.shape[1]] - wanted).abs().max()),
        "largest": float(wanted.abs().max()),
        "same_text": new[:until_end] == prompt["greedy"],
        "text": text,
    }


def main() -> None:
    """Compare, and print."""
    sys.modules["llava_kit"] = None  # type: ignore[assignment]
    folder, exchange = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    inputs = json.loads((exchange / "inputs.json").read_text("utf-8"))
    tensors = load_file(exchange / "inputs.safetensors")
    layouts = {"hf": hub_layout, "llava": original_layout, "projector": projector_layout}
    with torch.no_grad():
        result = layouts[inputs["layout"]](folder, inputs, tensors)
    result["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
