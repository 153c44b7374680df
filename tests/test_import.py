"""Checkpoints of others: every layout gives the model that transformers and torch make of the same parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    Tiny,
    hf_rows,
    tiny,
    write_delta,
    write_hf,
    write_lora,
    write_original,
    write_projector,
)
from parts import picture, sample
from safetensors.torch import load_file, save_file
from test_weights import Hostile
from transformers import LlamaForCausalLM

from llava_kit import load_model
from llava_kit.contracts import GenerateOptions
from llava_kit.errors import ModelError, RecipeError
from llava_kit.importing import import_checkpoint
from llava_kit.interop import LoadedModel, read_model
from llava_kit.layout_hf import as_two_layers


def assert_same(loaded: LoadedModel, model: Tiny, folder: Path, tolerance: float = 1e-5) -> None:
    """The prompt's logits are those of the parts, and it answers."""
    image = picture(folder / "seen.png", 1)
    asked = sample("a", [image], "What is this?")
    tokens = loaded.collator.encode(asked, reply=True).tokens
    batch = loaded.collator.prompts([asked]).batch
    assert batch is not None and tokens.ids.count(-200) == 1
    lm = loaded.model.language_model
    with torch.no_grad():
        logits = lm.logits(lm.hidden(loaded.model.embeds(batch)))[0]
    expected = model.logits(tokens.ids, batch.images[0].pixels_NCHW)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert logits.std() > 0.1
    answer = loaded.conversation(GenerateOptions(max_new_tokens=3)).ask("Why?", [image])
    assert answer.new_tokens <= 3


ORIGINALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "v1: llava, no projector type": ("linear", "llama", {"model_type": "llava", "mm_projector_type": None}),
    "v1.1: use_mm_proj only": ("linear", "llama", {"model_type": "llava", "mm_patch_merge_type": None}),
    "v1.5: llava_llama": ("mlp", "llama", {"mm_patch_merge_type": "flat", "mm_projector_lr": None}),
    "v1.5: safetensors": ("mlp", "llama", {"pickled": False}),
    "tower among the weights": ("mlp", "llama", {"tower_inside": True, "unfreeze_mm_vision_tower": True}),
    "llava_mistral": ("mlp", "mistral", {}),
}


@pytest.mark.parametrize("kind", ORIGINALS)
def test_full_checkpoints_of_every_generation(tmp_path: Path, kind: str) -> None:
    projector, text, changes = ORIGINALS[kind]
    model = tiny(projector, text)
    folder = write_original(model, tmp_path / "any-name", **changes)
    loaded = load_model(folder)
    assert loaded.recipe.model.connector.name == projector
    assert loaded.recipe.model.vision_encoder.config.aspect == ("crop" if projector == "linear" else "pad")
    assert_same(loaded, model, tmp_path)


def test_hub_folder(tmp_path: Path) -> None:
    model = tiny("mlp", extra_rows=hf_rows())
    assert_same(load_model(write_hf(model, tmp_path / "x")), model, tmp_path)


@pytest.mark.parametrize("rename", [
    {"vision_tower.vision_model.": "vision_tower."},
    {"vision_tower.vision_model.": "model.vision_tower.", "language_model.lm_head.": "lm_head.",
     "language_model.model.": "model.language_model.", "multi_modal_projector.": "model.multi_modal_projector."},
])  # fmt: skip
def test_hub_folders_of_transformers_5(tmp_path: Path, rename: dict[str, str]) -> None:
    model = tiny("mlp", extra_rows=hf_rows())
    file = write_hf(model, tmp_path / "x") / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        old = next((old for old in rename if name.startswith(old)), "")
        renamed[rename.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, file)
    assert_same(load_model(file.parent), model, tmp_path)


def test_projector_of_stage_one(tmp_path: Path) -> None:
    model = tiny("linear")
    folder = write_projector(model, tmp_path / "x")
    assert_same(load_model(folder), model, tmp_path)
    assert_same(load_model(folder / "mm_projector.bin"), model, tmp_path)
    torch.save(model.projector.state_dict(), folder / "mm_projector.bin")  # the oldest: bare names
    assert_same(load_model(folder), model, tmp_path)


def test_lora_is_merged(tmp_path: Path) -> None:
    model = tiny("mlp")
    assert_same(load_model(write_lora(model, tmp_path / "x")), model, tmp_path)


def test_lora_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write_lora(tiny("mlp"), tmp_path / "x")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=["v_proj", "down_proj"])
    wrapped = peft.get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    wrapped.save_pretrained(folder)
    expected = wrapped.merge_and_unload().state_dict()
    loaded = read_model(import_checkpoint(folder, tmp_path / "run", base=str(tmp_path / "base")))
    lm: Any = loaded.model.language_model
    merged = lm.lm.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_delta_is_added_to_its_base(tmp_path: Path) -> None:
    model = tiny("linear")
    folder, base = write_delta(model, tmp_path / "x")
    assert_same(load_model(folder, base=str(base)), model, tmp_path, tolerance=1e-4)


def test_the_run_folder_stands_alone(tmp_path: Path) -> None:
    model = tiny("mlp")
    run = import_checkpoint(write_original(model, tmp_path / "x"), tmp_path / "run", recipe="llava_v1", after="align")
    shutil.rmtree(tmp_path / "x")
    shutil.rmtree(tmp_path / "tower")
    assert_same(load_model(run), model, tmp_path)
    assert read_model(run).stage == "align"
    with pytest.raises(RecipeError, match="holds a run already"):
        import_checkpoint(tmp_path / "x", run)
    with pytest.raises(RecipeError, match="no stage 'algn'; did you mean 'align'"):
        import_checkpoint(tmp_path / "x", tmp_path / "other", after="algn")


def test_a_dtype_stays_what_it_was(tmp_path: Path) -> None:
    model = tiny("mlp", extra_rows=hf_rows())
    file = write_hf(model, tmp_path / "x") / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file)
    loaded = read_model(import_checkpoint(file.parent, tmp_path / "run"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float16}


# --- what is wrong ---------------------------------------------------------------------------------------------------


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the first shard."""
    file = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def refused(folder: Path, run: Path) -> str:
    """The message; nothing is left behind."""
    with pytest.raises(ModelError) as caught:
        import_checkpoint(folder, run)
    assert caught.value.code == 4
    assert not (run / "recipe.yaml").exists() and not (run / "parts").exists()
    return str(caught.value)


NORM = "model.layers.0.input_layernorm.weight"


def test_a_wrong_key_is_named_with_its_file(tmp_path: Path) -> None:
    folder = write_original(tiny(), tmp_path / "x")
    (folder / "pytorch_model.bin.index.json").unlink()
    change_shard(folder, lambda tensors: tensors.update({"model.layers.0.input_layernrm.weight": tensors.pop(NORM)}))
    message = refused(folder, tmp_path / "run")
    file = folder / "pytorch_model-00001-of-00002.bin"
    assert f"{file}: model.layers.0.input_layernrm.weight: the language_model has no such tensor" in message
    assert f"did you mean '{NORM}'?" in message
    assert f"{folder}: lacks a tensor of the language_model: '{NORM}'" in message


def test_a_key_that_the_index_promises_is_missed(tmp_path: Path) -> None:
    folder = write_original(tiny(), tmp_path / "x")
    change_shard(folder, lambda tensors: tensors.pop(NORM))
    assert f"00001-of-00002.bin: {NORM}: the index names it here, it is not" in refused(folder, tmp_path / "run")


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = write_original(tiny(), tmp_path / "x")
    change_shard(folder, lambda tensors: tensors.update({NORM: torch.ones(63)}))
    expected = f"00001-of-00002.bin: {NORM}: has shape [63], the config makes [64]"
    assert expected in refused(folder, tmp_path / "run")


@pytest.mark.parametrize("pickled", [True, False])
def test_a_truncated_file_is_named(tmp_path: Path, pickled: bool) -> None:
    folder = write_original(tiny(), tmp_path / "x", pickled=pickled)
    file = next(path for path in sorted(folder.glob("*-00002-of-00002.*")))
    file.write_bytes(file.read_bytes()[:-5000])
    message = refused(folder, tmp_path / "run")
    assert f"{file}: is damaged" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_original(tiny(), tmp_path / "x")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin: this shard is missing" in refused(folder, tmp_path / "run")


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "mm_projector.bin", "non_lora_trainables.bin"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write = {"mm": write_projector, "no": write_lora, "py": write_original}[name[:2]]
    folder = write(tiny(), tmp_path / "x")
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "mark"))
    torch.save({NORM: Hostile()}, folder / name)
    assert f"{folder / name}: holds more than tensors and was not opened further" in refused(folder, tmp_path / "run")
    assert not (tmp_path / "mark").exists() and os.environ["HOSTILE_MARK"]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny(extra_rows=-2)
    folder = write_original(model, tmp_path / "x", pickled=False)
    message = refused(folder, tmp_path / "run")
    tokens = model.lm.config.vocab_size + 2
    assert "tokenizer.json" in message and "model.embed_tokens.weight" in message
    assert f"the tokenizer has {tokens} tokens, the embedding {tokens - 2} rows" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: True is not supported"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: 'anyres' is not supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "clip: the class row never reaches the language model"),
        ({"mm_projector_type": "identity"}, "no plugin of connectors can carry it out; linear: it has one layer"),
        ({"model_type": "llava_nothing"}, "is no config of a known model"),
        ({"mm_vision_tower": None}, "names no vision tower"),
    ],
)
def test_what_cannot_be_carried_out_says_why(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    folder = write_original(tiny(), tmp_path / "x", **change)
    if change.get("mm_vision_tower", "") is None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("mm_vision_tower", None)
        (folder / "config.json").write_text(json.dumps(config))
    assert complaint in refused(folder, tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no run folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="is no LLaVA: a model of type 'bert'"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="there is no such folder"):
        load_model(tmp_path / "nothing")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tiny(), tmp_path / "x")
    factors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.7"): t for name, t in factors.items()}, folder / "adapter_model.safetensors"
    )
    assert "the base model has no 'model.layers.7.self_attn.q_proj.weight'" in refused(folder, tmp_path / "run")


@pytest.mark.parametrize(("form", "activation"), [("gelu", "gelu"), ("gelu", "relu"), ("identity", "linear")])
def test_one_layer_is_recovered_from_two_bit_for_bit(tmp_path: Path, form: Any, activation: str) -> None:
    model = tiny("linear", extra_rows=hf_rows())
    mlp = tiny("mlp", extra_rows=hf_rows())
    folder = write_hf(mlp, tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    two = as_two_layers(model.projector.weight, model.projector.bias, form)
    tensors |= {f"multi_modal_projector.{name}": tensor.clone() for name, tensor in two.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector_hidden_act": activation}))
    loaded = read_model(import_checkpoint(folder, tmp_path / "run"))
    assert loaded.recipe.model.connector.name == "linear"
    connector: Any = loaded.model.connector
    assert torch.equal(connector.final.weight, model.projector.weight)
    assert torch.equal(connector.final.bias, model.projector.bias)
