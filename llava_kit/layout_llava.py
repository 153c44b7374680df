"""The original LLaVA's checkpoints: full, delta, LoRA and projector-only, of all generations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_kit.checkpoint import read_json
from llava_kit.errors import ModelError, Problem
from llava_kit.parts import TOKENIZER_FILES, Checkpoint, Part, full_config, refuse
from llava_kit.weights import Stored, find_model_folder, stored_in, stored_in_file

Tensors = dict[str, Stored]
PROJECTOR = "mm_projector."
TOWER = "vision_tower."
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
NOT_TEXT = re.compile(
    r"(tune_|freeze_|unfreeze_|use_)?mm_.*|image_(aspect_ratio|grid_pinpoints)|tokenizer_(padding_side|model_max_length)"
    r"|tune_mm_vision_resampler|pretrain_.*|vision_tower|architectures|auto_map|_name_or_path|model_type|sep_image_.*"
)
"""Keys of config.json that are not the language model's own."""
HEAD_WIDTH = 64
"""Of an attention head in every CLIP that the original can load."""


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original's: ``llava``, ``llava_llama``, ``llava_mistral``, or with its keys."""
    return str(config.get("model_type", "")).startswith("llava") or any(key.startswith("mm_") for key in config)


def read_llava(folder: Path, base: str | None, vision_tower: str | None) -> Checkpoint:
    """A checkpoint in any of the original's layouts, told apart by the files that are there.

    Args:
        base: folder or hub name of the language model that a LoRA, a projector or a delta belongs to.
        vision_tower: folder or hub name of the tower, instead of the one that config.json names.

    Raises:
        ModelError: something is missing, damaged or unknown.
    """
    config = read_json(folder / "config.json")
    where = str(folder / "config.json")
    _refuse_unknown(config, where)
    needed = base or _base_name(folder, config)
    if (folder / "adapter_config.json").is_file():
        layout, tensors = "LoRA of the original LLaVA", _read_lora(folder, _base_tensors(needed, where))
    elif any(any(folder.glob(pattern)) for pattern in WEIGHTS if not _only_projector(folder)):
        layout, tensors = "original LLaVA", stored_in(folder)
        if base is not None:
            layout, tensors = "delta of the original LLaVA", _add_delta(_base_tensors(base, where), tensors)
    else:
        projector = _one_of(folder, PROJECTOR_FILES)
        if projector is None:
            raise ModelError(
                Problem(str(folder), "there are no weights", f"expected {', '.join(WEIGHTS)} or a projector")
            )
        layout, tensors = "projector of the original LLaVA", _base_tensors(needed, where)
        tensors |= _projector_tensors(projector)
    tokenizer = folder if _has_tokenizer(folder) else _base_folder(needed, where)
    parts = _take_apart(tensors, config, folder, vision_tower)
    return Checkpoint(layout=layout, folder=folder, parts=parts, tokenizer=tokenizer)


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    """Say what of the original cannot be carried out here."""
    wanted = {
        "mm_use_im_start_end": (config.get("mm_use_im_start_end", False), (False, None)),
        "image_aspect_ratio": (config.get("image_aspect_ratio"), (None, "square", "pad")),
        "mm_patch_merge_type": (config.get("mm_patch_merge_type"), (None, "flat")),
        "mm_resampler_type": (config.get("mm_resampler_type"), (None,)),
        "s2": (config.get("s2", False), (False, None)),
    }
    refuse(
        [
            Problem(f"{where}: {key}", f"{value!r} is not supported", f"supported: {', '.join(map(repr, known))}")
            for key, (value, known) in wanted.items()
            if value not in known
        ]
    )


def _only_projector(folder: Path) -> bool:
    return {path.name for path in folder.glob("*.safetensors")} <= set(PROJECTOR_FILES) and not any(
        folder.glob("pytorch_model*.bin")
    )


def _one_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def _base_name(folder: Path, config: Mapping[str, Any]) -> str | None:
    adapter = folder / "adapter_config.json"
    named = read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else config.get("_name_or_path")
    return str(named) if named else None


def _base_folder(name: str | None, where: str) -> Path:
    if name is None:
        what = "these weights belong to a language model that it does not name"
        raise ModelError(Problem(where, what, "--base FOLDER says which"))
    found = find_model_folder(name, None, "base", offline=False)
    if found is None:
        raise ModelError(Problem("base", f"there is no model '{name}'"))
    return found


def _base_tensors(name: str | None, where: str) -> Tensors:
    return stored_in(_base_folder(name, where))


# --- the four kinds --------------------------------------------------------------------------------------------------


def _projector_tensors(path: Path) -> Tensors:
    """Projector files of all generations: full names, or (the oldest) only the last component."""
    tensors = stored_in_file(path)
    extra = [one.where for name, one in tensors.items() if PROJECTOR not in name and "embed" in name]
    refuse([Problem(where, "trained <im_start> and <im_end> rows are not supported") for where in extra])
    return {f"model.{PROJECTOR}{name.split(PROJECTOR)[-1]}": one for name, one in tensors.items()}


def _without_peft(names: Mapping[str, Stored]) -> Tensors:
    """``base_model.model.model.X`` is ``model.X``; the original strips the wrapper's names like this."""
    short = {name.removeprefix("base_model."): one for name, one in names.items()}
    if any(name.startswith("model.model.") or name == "model.lm_head.weight" for name in short):
        short = {name.removeprefix("model."): one for name, one in short.items()}
    return short


def _read_lora(folder: Path, base: Tensors) -> Tensors:
    adapter = read_json(folder / "adapter_config.json")
    scale = _lora_scale(adapter, str(folder / "adapter_config.json"))
    weights = _one_of(folder, ADAPTER_FILES)
    if weights is None:
        raise ModelError(Problem(str(folder), "the adapter's weights are missing", f"expected {ADAPTER_FILES[0]}"))
    others = _one_of(folder, OTHER_FILES)
    if others is None:
        hint = f"expected {OTHER_FILES[0]}, which holds the projector"
        raise ModelError(Problem(str(folder), "what was trained beside the adapter is missing", hint))
    merged = base | _without_peft(stored_in_file(others))
    factors = _without_peft(stored_in_file(weights))
    problems = []
    for name, b in factors.items():
        stem, _, kind = name.partition(".lora_")
        target = f"{stem}.weight"
        a = factors.get(name.replace(".lora_B.", ".lora_A."))
        if kind not in ("A.weight", "B.weight"):
            problems.append(Problem(b.where, "is no factor of a LoRA (lora_A, lora_B)"))
        elif target not in base:
            problems.append(Problem(b.where, f"the base model has no '{target}'", "--base names the right one"))
        elif kind == "B.weight" and a is None:
            problems.append(Problem(b.where, "its other factor, lora_A, is missing"))
        elif kind == "B.weight" and a is not None:
            rows_columns = (b.shape[0], a.shape[1])
            if base[target].shape != rows_columns:
                what = f"makes {list(rows_columns)}, the base model's is {list(base[target].shape)}"
                problems.append(Problem(b.where, what))
            merged[target] = replace(base[target], read=_merged(base[target].read, a.read, b.read, scale))
    refuse(problems)
    return merged


def _lora_scale(adapter: Mapping[str, Any], where: str) -> float:
    odd = [
        key
        for key, plain in {"use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "bias": "none"}.items()
        if adapter.get(key, plain) not in (plain, [])
    ]
    odd += [key for key in ("rank_pattern", "alpha_pattern") if adapter.get(key)]
    odd += ["peft_type"] if adapter.get("peft_type", "LORA") != "LORA" else []
    refuse(
        [Problem(f"{where}: {key}", f"{adapter[key]!r} is not supported", "merge it with peft first") for key in odd]
    )
    rank, alpha = adapter["r"], adapter["lora_alpha"]
    return float(alpha / rank**0.5 if adapter.get("use_rslora") else alpha / rank)


def _merged(
    weight: Callable[[], Tensor], a: Callable[[], Tensor], b: Callable[[], Tensor], scale: float
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        before = weight()
        return (before.float() + scale * (b().float() @ a().float())).to(before.dtype)

    return read


def _add_delta(base: Tensors, delta: Tensors) -> Tensors:
    """``base + delta``; new rows of the vocabulary, and the projector, are in the delta alone."""
    summed, problems = dict(delta), []
    for name, one in delta.items():
        below = base.get(name)
        may_grow = name in ("model.embed_tokens.weight", "lm_head.weight")
        if below is None:
            if not any(own in name for own in (PROJECTOR, TOWER, "rotary_emb")):
                problems.append(Problem(one.where, "the base model has no such tensor"))
        elif below.shape != one.shape and not may_grow:
            problems.append(Problem(one.where, f"has shape {list(one.shape)}, the base model's {list(below.shape)}"))
        else:
            summed[name] = replace(one, read=_summed(one.read, below.read))
    refuse(problems)
    return summed


def _summed(delta: Callable[[], Tensor], base: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        total, below = delta().float().clone(), base().float()
        block = tuple(slice(min(a, b)) for a, b in zip(total.shape, below.shape, strict=True))
        total[block] += below[block]
        return total.to(delta().dtype)

    return read


# --- parts -----------------------------------------------------------------------------------------------------------


def _take_apart(tensors: Tensors, config: Mapping[str, Any], folder: Path, vision_tower: str | None) -> dict[str, Part]:
    text: Tensors = {}
    projector: Tensors = {}
    tower: Tensors = {}
    for name, one in tensors.items():
        if PROJECTOR in name:
            projector[name.split(PROJECTOR)[-1]] = one
        elif TOWER in name:
            tower[name.split(TOWER)[-1].removeprefix("vision_model.")] = one
        elif not name.endswith("rotary_emb.inv_freq"):  # a constant that older versions of transformers wrote
            text[name] = one
    where = str(folder / "config.json")
    text_config = {key: value for key, value in config.items() if not NOT_TEXT.fullmatch(key)}
    language_model = Part(config=full_config(text_config | {"model_type": _text_type(config)}, where), tensors=text)
    vision_encoder = _tower_part(tower, config, folder, vision_tower)
    connector_config = {
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "in_dim": vision_encoder.config["hidden_size"],
        "out_dim": language_model.config["hidden_size"],
    }
    connector = Part(config=connector_config, tensors=projector)
    return {"vision_encoder": vision_encoder, "connector": connector, "language_model": language_model}


def _text_type(config: Mapping[str, Any]) -> str:
    """``llava_mistral`` says it; where it is only ``llava``, the architecture does (``LlavaLlamaForCausalLM``)."""
    kind = str(config.get("model_type", ""))
    if kind.startswith("llava_"):
        return kind.removeprefix("llava_")
    names = [re.fullmatch(r"Llava(\w+)ForCausalLM", str(name)) for name in config.get("architectures") or []]
    named = next((name[1].lower() for name in names if name), "")
    return named or (kind if kind and kind != "llava" else "llama")


def _tower_part(tensors: Tensors, config: Mapping[str, Any], folder: Path, vision_tower: str | None) -> Part:
    where = str(folder / "config.json")
    name = vision_tower or config.get("mm_vision_tower") or config.get("vision_tower")
    if name is None:
        raise ModelError(Problem(where, "names no vision tower (mm_vision_tower)", "--vision-tower FOLDER says which"))
    local = _local_tower(str(name), folder)
    if tensors and local is None:
        own = _tower_config(tensors, str(name), where)
    else:
        source = local or _fetched_tower(str(name), where)
        own = read_json(source / "config.json")
        own = (
            own.get("vision_config", own) | {"model_type": "clip_vision_model"} if "clip" in own["model_type"] else own
        )
        if not tensors:
            tensors = _tower_tensors(source)
    processor = _processor(local, str(config.get("image_aspect_ratio")))
    # The original's feature "patch" is "default" on the hub, "cls_patch" is "full".
    strategy = {"patch": "default", "cls_patch": "full"}.get(str(config.get("mm_vision_select_feature", "patch")))
    added = {
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "image_processor": processor,
    }
    kept = {name: one for name, one in tensors.items() if not name.endswith("position_ids")}
    return Part(config=full_config(own, where) | added, tensors=kept)


def _local_tower(name: str, folder: Path) -> Path | None:
    places = (Path(name), folder / name, folder / Path(name).name)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _fetched_tower(name: str, where: str) -> Path:
    found = find_model_folder(name, None, "vision_tower", offline=False)
    if found is None or not (found / "config.json").is_file():
        raise ModelError(Problem(where, f"the vision tower '{name}' has no config.json", "--vision-tower FOLDER"))
    return found


def _tower_tensors(folder: Path) -> Tensors:
    """The image side of a CLIP folder, whether it holds the text side too or not."""
    found = stored_in(folder)
    if any(name.startswith("vision_model.") for name in found):
        return {n.removeprefix("vision_model."): one for n, one in found.items() if n.startswith("vision_model.")}
    return found


def _tower_config(tensors: Tensors, name: str, where: str) -> dict[str, Any]:
    """A CLIP tower's sizes, read off its tensors."""
    try:
        width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
        positions = tensors["embeddings.position_embedding.weight"].shape[0]
        intermediate = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelError(
            Problem(where, f"the tower's tensors are incomplete: {error}", "--vision-tower FOLDER")
        ) from error
    layers = 1 + max(int(one.split(".")[2]) for one in tensors if one.startswith("encoder.layers."))
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "hidden_act": "gelu" if name.startswith("laion/") else "quick_gelu",
    }


def _processor(tower: Path | None, aspect_ratio: str) -> dict[str, Any]:
    own = tower / "preprocessor_config.json" if tower else None
    given = read_json(own) if own is not None and own.is_file() else {}
    return {key: given[key] for key in ("image_mean", "image_std") if key in given} | {"do_pad": aspect_ratio == "pad"}


def full_state(parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Language model and projector under the original's names."""
    state = dict(parts["language_model"][1])
    return state | projector_state(parts["connector"][1])


def projector_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector under the names that stage one writes."""
    return {f"model.{PROJECTOR}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def llava_config(
    parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]], max_length: int
) -> dict[str, Any]:
    """The original's config.json."""
    text, vision, connector = (dict(parts[part][0]) for part in ("language_model", "vision_encoder", "connector"))
    kind = str(text["model_type"])
    if kind not in ("llama", "mistral"):
        what = f"the original has no class for a language model of type '{kind}', only for llama and mistral"
        raise ModelError(Problem("model.language_model", what, "--to hf can hold it"))
    dtype = str(next(iter(parts["language_model"][1].values())).dtype).removeprefix("torch.")
    rope = text.get("rope_parameters") or {}
    older = {"rope_theta": rope.get("rope_theta", 10000.0), "torch_dtype": dtype, "dtype": dtype}
    return (
        text
        | older
        | {
            "model_type": f"llava_{kind}",
            "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
            "use_mm_proj": True,
            "mm_projector_type": connector["mm_projector_type"],
            "mm_hidden_size": connector["in_dim"],
            "mm_vision_tower": "vision_tower",
            "mm_vision_select_layer": vision["vision_feature_layer"],
            "mm_vision_select_feature": "patch"
            if vision["vision_feature_select_strategy"] == "default"
            else "cls_patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad" if vision["image_processor"].get("do_pad") else "square",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": max_length,
        }
    )
