"""Tiny LLaVAs in the layouts of others, written without the package's own code for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_tokenizers import llama_like
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass
class Tiny:
    """The parts of a LLaVA as transformers and torch have them."""

    tower: CLIPVisionModel
    projector: nn.Module
    lm: Any

    def features(self, pixels: Tensor) -> Tensor:
        return self.projector(self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])

    def logits(self, ids: list[int], pixels: Tensor | None) -> Tensor:
        """−200 stands for the image."""
        table, rows = self.lm.get_input_embeddings(), []
        for token in ids:
            rows.append(self.features(pixels)[0] if token == -200 else table(torch.tensor([token])))
        with torch.no_grad():
            return self.lm(inputs_embeds=torch.cat(rows)[None]).logits[0]


def tiny(projector: str = "linear", text: str = "llama", extra_rows: int = 0) -> Tiny:
    """Random parts whose answers depend on what they see."""
    torch.manual_seed(5)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
    rows = len(llama_like()) + extra_rows
    if text == "llama":
        lm: Any = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=rows)).eval()
    else:
        lm = MistralForCausalLM(MistralConfig(**TEXT, vocab_size=rows, sliding_window=None)).eval()
    layers = [nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64)]
    built = layers[0] if projector == "linear" else nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in [*built.parameters(), *(p for p in lm.parameters() if p.ndim > 1)]:
            parameter.mul_(4.0)
    for parameter in [*tower.parameters(), *built.parameters(), *lm.parameters()]:
        parameter.requires_grad_(False)
    return Tiny(tower, built, lm)


def tower_tensors(model: Tiny) -> dict[str, Tensor]:
    """Under the names every version up to 4 used."""
    return {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in model.tower.state_dict().items()}


def write_tower(model: Tiny, folder: Path) -> Path:
    """A CLIP folder as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.tower.config.to_dict() | {"model_type": "clip_vision_model"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tower_tensors(model).items()}, folder / "model.safetensors")
    return folder


def write_base(model: Tiny, folder: Path) -> Path:
    """The language model alone, as the hub has it."""
    model.lm.save_pretrained(folder)
    llama_like().save_pretrained(folder)
    return folder


def projector_tensors(model: Tiny) -> dict[str, Tensor]:
    return {f"model.mm_projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}


def original_config(model: Tiny, **changes: Any) -> dict[str, Any]:
    """Keys as the original writes them; ``None`` leaves one out."""
    text = model.lm.config.to_dict()
    kind = text["model_type"]
    linear = isinstance(model.projector, nn.Linear)
    config = text | {
        "model_type": f"llava_{kind}",
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "use_mm_proj": True,
        "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square" if linear else "pad",
        "tokenizer_model_max_length": 2048,
        "tune_mm_mlp_adapter": False,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def write_original(
    model: Tiny, folder: Path, *, pickled: bool = True, tower_inside: bool = False, **changes: Any
) -> Path:
    """A full checkpoint: sharded ``.bin`` files or safetensors, the tower in a folder of its own or among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = write_tower(model, folder.parent / "tower")
    config = original_config(model, **({"mm_vision_tower": str(tower)} | changes))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(model.lm.state_dict()) | projector_tensors(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if tower_inside:
        tensors |= {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors(model).items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        shard = f"{stem}-{number:05d}-of-00002.{suffix}"
        held = {name: tensors[name].clone().contiguous() for name in part}
        if pickled:
            torch.save(held, folder / shard)
        else:
            save_file(held, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    llama_like().save_pretrained(folder)
    return folder


def write_hf(model: Tiny, folder: Path) -> Path:
    """As the hub has it: files of transformers 4, an ``<image>`` token, the vocabulary padded to 64 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llama_like(extra=("<image>", "<pad>"))
    tokenizer.save_pretrained(folder)
    rows = -(-len(tokenizer) // 64) * 64
    assert model.lm.config.vocab_size == rows, "make it with extra_rows"
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<pad>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": rows},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}}
    processor |= {"crop_size": {"height": 56, "width": 56}, "do_pad": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    names = {"0": "linear_1", "2": "linear_2"}
    tensors = {f"vision_tower.{name}": t for name, t in tower_tensors(model).items()}
    for name, tensor in model.projector.state_dict().items():
        tensors[f"multi_modal_projector.{names[name[0]]}{name[1:]}"] = tensor
    tensors |= {f"language_model.{name}": t for name, t in model.lm.state_dict().items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def hf_rows() -> int:
    """Rows to add to :func:`tiny` for :func:`write_hf`."""
    tokens = len(llama_like(extra=("<image>", "<pad>")))
    return -(-tokens // 64) * 64 - len(llama_like())


def write_projector(model: Tiny, folder: Path) -> Path:
    """What the original's first stage leaves behind; its language model is written beside it as ``base``."""
    folder.mkdir(parents=True)
    base = write_base(model, folder.parent / "base")
    tower = write_tower(model, folder.parent / "tower")
    config = original_config(model, mm_vision_tower=str(tower), tune_mm_mlp_adapter=True, _name_or_path=str(base))
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(projector_tensors(model), folder / "mm_projector.bin")
    return folder


def write_lora(model: Tiny, folder: Path) -> Path:
    """An adapter of rank 4, its base beside it as ``base``; afterwards ``model`` has it merged."""
    folder.mkdir(parents=True)
    base = write_base(model, folder.parent / "base")
    tower = write_tower(model, folder.parent / "tower")
    config = original_config(model, mm_vision_tower=str(tower))
    (folder / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj", "down_proj"]}))
    factors = {}
    for name, module in model.lm.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            a, b = torch.randn(4, module.in_features) * 0.3, torch.randn(module.out_features, 4) * 0.3
            factors[f"base_model.model.{name}.lora_A.weight"] = a
            factors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight += 8 / 4 * (b @ a)
    save_file(factors, folder / "adapter_model.safetensors")
    others = {f"base_model.model.{name}": tensor for name, tensor in projector_tensors(model).items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    return folder


def write_delta(model: Tiny, folder: Path) -> tuple[Path, Path]:
    """A delta, and the base it belongs to, whose vocabulary is three rows smaller."""
    base = tiny(extra_rows=-3)
    for parameter in base.lm.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    write_base(base, folder.parent / "base")
    whole = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    below = base.lm.state_dict()
    for name, parameter in model.lm.named_parameters():
        rows = slice(below[name].shape[0])
        parameter[rows] -= below[name]
    write_original(model, folder)
    model.lm.load_state_dict(whole)
    return folder, folder.parent / "base"
