"""The hub's LLaVA (``LlavaForConditionalGeneration``): tensors, config, and a projector of always two layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llava_kit.checkpoint import read_json
from llava_kit.errors import ModelError, Problem
from llava_kit.parts import Checkpoint, Part, full_config
from llava_kit.weights import Stored, stored_in

Form = Literal["gelu", "identity"]
Described = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]]
"""Components by name, as their ``to_hf`` gives them."""
PROJECTOR = "multi_modal_projector."
ODD_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu")
"""Functions with f(x) − f(−x) = x, which make two layers into exactly one."""
WITH_PREFIX = ("clip_vision_model", "siglip_vision_model")
"""Vision models whose names begin with ``vision_model.`` on the hub."""
ROW_MULTIPLE = 64


def is_hf(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the hub's."""
    return "vision_config" in config and "text_config" in config


# --- reading ---------------------------------------------------------------------------------------------------------


def read_hf(folder: Path) -> Checkpoint:
    """A folder in the hub's layout, whichever version of transformers wrote it.

    Raises:
        ModelError: something is missing, damaged or unknown.
    """
    config = read_json(folder / "config.json")
    where = str(folder / "config.json")
    if config.get("model_type") != "llava":
        raise ModelError(Problem(f"{where}: model_type", f"{config.get('model_type')!r} is not 'llava'"))
    split: dict[str, dict[str, Stored]] = {"vision_encoder": {}, "connector": {}, "language_model": {}}
    for name, one in stored_in(folder).items():
        component, own = _place(name)
        if not own.endswith(("position_ids", "rotary_emb.inv_freq")):  # constants that older versions wrote
            split[component][own] = one
    text = full_config({"model_type": "llama"} | config["text_config"], f"{where}: text_config")
    vision = full_config({"model_type": "clip_vision_model"} | config["vision_config"], f"{where}: vision_config")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ModelError(Problem(f"{where}: vision_feature_layer", f"{layer!r}: several layers are not supported"))
    vision |= {
        "vision_feature_layer": layer if layer < 0 else layer - vision["num_hidden_layers"] - 1,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "image_processor": _processor(folder),
    }
    connector = _projector(split["connector"], config, where)
    connector.config |= {"in_dim": vision["hidden_size"], "out_dim": text["hidden_size"]}
    parts = {
        "vision_encoder": Part(config=vision, tensors=split["vision_encoder"]),
        "connector": connector,
        "language_model": Part(config=text, tensors=split["language_model"]),
    }
    return Checkpoint(layout="LLaVA of transformers", folder=folder, parts=parts, tokenizer=folder)


def _place(name: str) -> tuple[str, str]:
    """Which component a tensor belongs to, and its name there; files of transformers 4 and 5 differ in the wrapping."""
    outer = name.removeprefix("model.")
    if outer.startswith("vision_tower."):
        return "vision_encoder", outer.removeprefix("vision_tower.").removeprefix("vision_model.")
    if outer.startswith(PROJECTOR):
        return "connector", outer.removeprefix(PROJECTOR)
    if outer.startswith("language_model."):
        inner = outer.removeprefix("language_model.")
        return "language_model", inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"
    return "language_model", name


def _processor(folder: Path) -> dict[str, Any]:
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    found: dict[str, Any] = read_json(newer).get("image_processor", {}) if newer.is_file() else {}
    found = found or (read_json(older) if older.is_file() else {})
    return {key: found[key] for key in ("do_pad", "image_mean", "image_std") if key in found}


def _projector(tensors: dict[str, Stored], config: Mapping[str, Any], where: str) -> Part:
    """One layer where the two stand for one, else an MLP of two."""
    names = [f"linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ModelError([Problem(f"{where.removesuffix('/config.json')}", f"lacks '{PROJECTOR}{n}'") for n in missing])
    activation = str(config.get("projector_hidden_act", "gelu"))
    linear = _recovered(activation, {name: tensors[name].read() for name in names})
    if linear is not None:
        at = tensors["linear_2.weight"]
        stored = {
            name: replace(at, name=f"{PROJECTOR}{name}", shape=tuple(value.shape), read=lambda value=value: value)  # type: ignore[misc]
            for name, value in linear.items()
        }
        return Part(config={"mm_projector_type": "linear"}, tensors=stored)
    if activation != "gelu":
        what = f"{activation!r} is not supported"
        raise ModelError(Problem(f"{where}: projector_hidden_act", what, "supported: 'gelu', or a linear layer in it"))
    layers = {"linear_1": "0", "linear_2": "2"}
    renamed = {f"{layers[n.split('.')[0]]}.{n.split('.')[1]}": one for n, one in tensors.items() if n in names}
    return Part(
        config={"mm_projector_type": "mlp2x_gelu"},
        tensors=renamed | {n: t for n, t in tensors.items() if n not in names},
    )


# --- one layer as two ------------------------------------------------------------------------------------------------


def as_two_layers(weight_DK: Tensor, bias_D: Tensor, form: Form) -> dict[str, Tensor]:
    """``W x + b`` with two layers and an activation between them.

    ``gelu``: ``[W, −W, 0] f([I; −I; 0] x) + b``, exact since ``f(x) − f(−x) = x``; no reader can take it for something
    else.  Needs ``2 K ≤ D``.  ``identity``: ``I (W x + b)``, for readers that know the activation ``linear``.
    """
    out, inner = weight_DK.shape
    first, second = torch.zeros(out, inner).to(weight_DK), torch.zeros(out, out).to(weight_DK)
    if form == "identity":
        second.fill_diagonal_(1.0)
        return {
            "linear_1.weight": weight_DK,
            "linear_1.bias": bias_D,
            "linear_2.weight": second,
            "linear_2.bias": torch.zeros_like(bias_D),
        }
    eye = torch.eye(inner).to(weight_DK)
    first[:inner], first[inner : 2 * inner] = eye, -eye
    second[:, :inner], second[:, inner : 2 * inner] = weight_DK, -weight_DK
    return {
        "linear_1.weight": first,
        "linear_1.bias": torch.zeros_like(bias_D),
        "linear_2.weight": second,
        "linear_2.bias": bias_D,
    }


def _recovered(activation: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The one layer that :func:`as_two_layers` was given, bit for bit; ``None`` where these are really two."""
    first, bias, second = (tensors[name] for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight"))
    if first.ndim != 2 or second.ndim != 2:
        return None
    inner = first.shape[1]
    if activation == "linear":
        candidate = {"weight": first, "bias": bias}
    elif activation in ODD_ACTIVATIONS and 2 * inner <= first.shape[0] and second.shape[1] >= inner:
        candidate = {"weight": second[:, :inner].contiguous(), "bias": tensors["linear_2.bias"]}
    else:
        return None
    form: Form = "identity" if activation == "linear" else "gelu"
    again = as_two_layers(candidate["weight"], candidate["bias"], form)
    return candidate if all(torch.equal(again[name], tensors[name]) for name in again) else None


# --- writing ---------------------------------------------------------------------------------------------------------


def choose_form(parts: Described, wanted: Form | None) -> Form | None:
    """How a projector of one layer is written; ``None`` for one of two layers.

    Raises:
        ModelError: it has neither one layer nor two, or does not fit the wanted form.
    """
    config = parts["connector"][0]
    kind, inner, out = config["mm_projector_type"], config["in_dim"], config["out_dim"]
    if kind == "mlp2x_gelu":
        return None
    if kind != "linear":
        what = f"transformers' LLaVA has a projector of two layers, this one is '{kind}'"
        raise ModelError(Problem("model.connector", what, "--to llava can hold it"))
    if wanted == "gelu" and 2 * inner > out:
        what = f"the form 'gelu' needs twice the tower's width ({inner}) in the language model's ({out})"
        raise ModelError(Problem("model.connector", what, "--projector-form identity"))
    return wanted or ("gelu" if 2 * inner <= out else "identity")


def hf_tensors(parts: Described, form: Form | None, rows: int) -> dict[str, Tensor]:
    """All tensors under the names that every version of transformers reads; the vocabulary has ``rows`` rows."""
    vision_config, vision = parts["vision_encoder"]
    prefix = "vision_tower.vision_model." if vision_config["model_type"] in WITH_PREFIX else "vision_tower."
    connector = parts["connector"][1]
    if form is not None:
        projector = as_two_layers(connector["weight"], connector["bias"], form)
    else:
        projector = {name.replace("0.", "linear_1.").replace("2.", "linear_2."): t for name, t in connector.items()}
    text = {f"language_model.{name}": _grown(name, tensor, rows) for name, tensor in parts["language_model"][1].items()}
    towers = {f"{prefix}{name}": tensor for name, tensor in vision.items()}
    return towers | {f"{PROJECTOR}{name}": tensor for name, tensor in projector.items()} | text


def _grown(name: str, tensor: Tensor, rows: int) -> Tensor:
    """Vocabulary rows that are new are the mean of the old: as inputs neutral, as outputs never the likeliest."""
    if not name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")) or len(tensor) >= rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape[1:])])


def rows_for(tokens: int, rows: int) -> int:
    """Vocabulary rows that hold ``tokens`` tokens: what there is, or the next multiple of 64."""
    return rows if tokens <= rows else -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def hf_config(parts: Described, form: Form | None, *, rows: int, image_id: int, pad_id: int | None) -> dict[str, Any]:
    """``config.json`` as both generations of transformers read it: old keys beside the new."""
    vision = dict(parts["vision_encoder"][0])
    text = dict(parts["language_model"][0]) | {"vocab_size": rows}
    layer, strategy = vision.pop("vision_feature_layer"), vision.pop("vision_feature_select_strategy")
    vision.pop("image_processor")
    dtype = str(next(iter(parts["language_model"][1].values())).dtype).removeprefix("torch.")
    types = {"dtype": dtype, "torch_dtype": dtype}
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **types,
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": patches,
        "projector_hidden_act": "linear" if form == "identity" else "gelu",
        "multimodal_projector_bias": True,
        "pad_token_id": pad_id,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "text_config": text | types | {"pad_token_id": pad_id},
        "vision_config": vision | types,
    }
