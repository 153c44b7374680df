"""Runs as checkpoints of others: the hub's layout or the original's, checked before anything is published."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llava_kit.environment import describe_environment
from llava_kit.errors import ModelError, Problem, RecipeError
from llava_kit.importing import described
from llava_kit.interop import LoadedModel, as_run, read_model
from llava_kit.layout_hf import Described, Form, choose_form, hf_config, hf_tensors, rows_for
from llava_kit.layout_llava import full_state, llava_config, projector_state
from llava_kit.model import merge_adapters
from llava_kit.parity import Parity, check_parity
from llava_kit.parts import KINDS
from llava_kit.weights import write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
Layout = Literal["hf", "llava"]
Writer = Callable[[Path], Mapping[str, Any]]


def export_model(
    run: str | Path,
    target: str | Path,
    *,
    to: Layout,
    stage: str | None = None,
    projector_only: bool = False,
    projector_form: Form | None = None,
) -> Parity:
    """Write a run's model as a folder that others read, and hold it against the run with stock transformers.

    Args:
        run: a run folder, or a checkpoint that :func:`llava_kit.load_model` reads.
        to: ``hf`` for transformers' LLaVA, ``llava`` for the original's layout.
        projector_only: with ``llava`` only ``mm_projector.bin`` and its config, as the original's first stage has it.
        projector_form: how ``hf`` holds a projector of one layer; see :func:`llava_kit.layout_hf.as_two_layers`.

    Raises:
        ModelError: the model cannot be represented there, or the folder is not the same model; nothing is written.
        RecipeError: the target exists, or the options contradict each other.
    """
    target = Path(target)
    if target.exists():
        raise RecipeError(Problem(str(target), "exists already", "give another folder"))
    if (projector_only and to != "llava") or (projector_form is not None and to != "hf"):
        what = "--projector-only is for --to llava, --projector-form for --to hf"
        raise RecipeError(Problem("export", what))
    loaded = read_model(as_run(Path(run)), stage)
    merge_adapters(loaded.model)
    parts = {component: described(component, getattr(loaded.model, component)) for component in KINDS}
    _follow_image_aspect(loaded, parts)
    _refuse_other_tokens(loaded, parts)
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if to == "hf":
            facts = _write_hf(loaded, parts, temporary, projector_form)
        else:
            facts = _write_llava(loaded, parts, temporary, projector_only)
        parity = check_parity(loaded, temporary, facts["layout"], facts.get("image_id"))
        _write_card(loaded, temporary, target.name, facts, parity)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


def _follow_image_aspect(loaded: LoadedModel, parts: Described) -> None:
    """Say of the images what the recipe's last stage did with them, which is how the model is asked, too."""
    aspect = list(loaded.recipe.stages.values())[-1].image_aspect
    if aspect is not None:
        parts["vision_encoder"][0]["image_processor"]["do_pad"] = aspect == "pad"


def _refuse_other_tokens(loaded: LoadedModel, parts: Described) -> None:
    """Both layouts have one row for each patch."""
    config = parts["vision_encoder"][0]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    from PIL import Image

    rows = loaded.collator.num_tokens(loaded.collator.preprocess(Image.new("RGB", (64, 64))).layout)
    if rows != patches:
        what = f"makes {rows} rows of {patches} patches, other layouts have a row for each patch"
        raise ModelError(Problem("model.connector", what))


# --- the hub's layout ------------------------------------------------------------------------------------------------


def _write_hf(loaded: LoadedModel, parts: Described, folder: Path, wanted: Form | None) -> dict[str, Any]:
    form = choose_form(parts, wanted)
    tokenizer = copy.deepcopy(loaded.model.language_model.tokenizer)
    image_id = _image_token(tokenizer)
    table = next(tensor for name, tensor in parts["language_model"][1].items() if name.endswith("embed_tokens.weight"))
    rows = rows_for(len(tokenizer), table.shape[0])
    tensors = hf_tensors(parts, form, rows)
    write_shards(folder, {name: _reader(tensor) for name, tensor in tensors.items()})
    config = hf_config(parts, form, rows=rows, image_id=image_id, pad_id=_pad_id(tokenizer))
    _write_json(folder / "config.json", config)
    text = config["text_config"]
    generation = {key: text.get(key) for key in ("bos_token_id", "eos_token_id")} | {"pad_token_id": _pad_id(tokenizer)}
    _write_json(folder / "generation_config.json", generation)
    _write_processor(loaded, parts["vision_encoder"][0], tokenizer, folder)
    kind = parts["connector"][0]["mm_projector_type"]
    return {
        "layout": "hf",
        "image_id": image_id,
        "projector": kind,
        "projector_form": form,
        "vocabulary_rows": [table.shape[0], rows],
    }


def _reader(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of ``<image>``, which is added as one special token where the tokenizer has none."""
    from tokenizers import AddedToken

    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.get_vocab()[IMAGE])


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def _write_processor(
    loaded: LoadedModel, vision: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Tokenizer, image processor and chat template, in the files of transformers 5 and of 4."""
    padded = bool(vision["image_processor"].get("do_pad"))
    image = {
        "image_processor_type": "LlavaImageProcessor" if padded else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
        **vision["image_processor"],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": vision["vision_feature_select_strategy"],
        "num_additional_image_tokens": 1,  # the class row, which the strategy "default" takes away again
        "image_token": IMAGE,
    }
    if not padded:
        image.pop("do_pad", None)
    _write_json(folder / "processor_config.json", processor | {"image_processor": image})
    _write_json(folder / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # the language model's own, which knows no images
    write: Any = getattr(loaded.collator.template, "chat_template", None)
    if write is not None:
        (folder / "chat_template.jinja").write_text(write(), "utf-8")
        _write_json(folder / "chat_template.json", {"chat_template": write()})
    _make_readable_for_4(tokenizer, folder)


def _make_readable_for_4(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """transformers 5 names a class that 4 does not have, and leaves out what 4 looks for."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    for key in ("backend", "extra_special_tokens", "chat_template"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    added = tokenizer.added_tokens_decoder
    config["added_tokens_decoder"] = {
        str(index): {
            name: getattr(token, name)
            for name in ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
        }
        for index, token in sorted(added.items())
    }
    config |= {"image_token": IMAGE, "extra_special_tokens": {"image_token": IMAGE}}
    config["processor_class"] = "LlavaProcessor"
    _write_json(path, config)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    _write_json(folder / "special_tokens_map.json", {name: config[name] for name in names if config.get(name)})


# --- the original's layout -------------------------------------------------------------------------------------------


def _write_llava(loaded: LoadedModel, parts: Described, folder: Path, projector_only: bool) -> dict[str, Any]:
    kind = parts["connector"][0]["mm_projector_type"]
    config = llava_config(parts, loaded.collator.max_length)
    if projector_only:
        torch.save(projector_state(parts["connector"][1]), folder / "mm_projector.bin")
        _write_json(folder / "config.json", config | {"tune_mm_mlp_adapter": True})
        return {"layout": "projector", "projector": kind}
    write_shards(folder, {name: _reader(tensor) for name, tensor in full_state(parts).items()})
    _write_tower(parts["vision_encoder"], folder / "vision_tower")
    _write_json(folder / "config.json", config)
    tokenizer = loaded.model.language_model.tokenizer
    tokenizer.save_pretrained(folder)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", generation | {"pad_token_id": _pad_id(tokenizer)})
    return {"layout": "llava", "projector": kind}


def _write_tower(vision: tuple[Mapping[str, Any], Mapping[str, Tensor]], folder: Path) -> None:
    """The tower as a CLIP folder, which the original loads by path: it ignores a tower among the weights."""
    folder.mkdir()
    config, tensors = dict(vision[0]), vision[1]
    processor = config.pop("image_processor")
    size = {"shortest_edge": config["image_size"]}
    crop = {"height": config["image_size"], "width": config["image_size"]}
    image = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": crop, "resample": 3}
    means = {key: value for key, value in processor.items() if key.startswith("image_")}
    _write_json(folder / "preprocessor_config.json", image | means)
    _write_json(folder / "config.json", config | {"architectures": ["CLIPVisionModel"]})
    write_shards(folder, {f"vision_model.{name}": _reader(tensor) for name, tensor in tensors.items()})


# --- the card --------------------------------------------------------------------------------------------------------


def _write_card(loaded: LoadedModel, folder: Path, name: str, facts: Mapping[str, Any], parity: Parity) -> None:
    notes = list(parity.notes)
    if facts.get("projector_form") == "identity":
        notes.append(
            "the projector is one linear layer, written with projector_hidden_act 'linear': for transformers only, "
            "other engines ignore that key or do not know it"
        )
    elif facts.get("projector_form") == "gelu":
        notes.append("the projector is one linear layer, written as two with GELU between them that compute exactly it")
    rows = facts.get("vocabulary_rows", [0, 0])
    if rows[0] != rows[1]:
        notes.append(f"the vocabulary has {rows[1] - rows[0]} rows more than the run's, for the token {IMAGE}")
    read = {
        "hf": "`LlavaForConditionalGeneration` of transformers reads this folder.",
        "llava": "The original LLaVA's layout; `vision_tower/` is the tower that `mm_vision_tower` names.",
        "projector": "The projector of the original LLaVA's first stage.",
    }
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [llava]", "---", "",
        f"# {name}", "",
        f"Exported by llava_kit from the run '{loaded.recipe.name}', stage '{loaded.stage}'. "
        + read[facts["layout"]], "",
        "## Parity", "",
        f"The same prompts in a process of its own with transformers {parity.versions['transformers']} and torch "
        f"{parity.versions['torch']}, without llava_kit, in fp32:", "",
        f"- largest difference of {'outputs' if facts['layout'] == 'projector' else 'logits'}: "
        f"{parity.max_difference:.2e} (largest value {parity.largest:.2f})",
        *(["- greedy text: the same"] if facts["layout"] != "projector" else []),
        *(f"- {note}" for note in notes),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")
    environment = describe_environment()
    own = {"recipe": loaded.recipe.to_dict(), "stage": loaded.stage, "environment": environment, **facts}
    _write_json(folder / "llava_kit.json", own)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
