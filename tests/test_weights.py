from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_kit.errors import ModelError, ResourceError
from llava_kit.weights import NOTE, safetensors_folder
from llava_kit_plugins.causal_lm import CausalLmConfig, build_causal_lm


def write_bin(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny checkpoint in the old format of the hub: two pickled shards and an index."""
    config = CausalLmConfig(model="a/b", architecture={"model_type": "llama"}).tiny(folder)
    weights = Path(config.model) / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, Path(config.model) / shard)
        weight_map |= dict.fromkeys(part, shard)
    (Path(config.model) / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_pickled_shards_are_converted_once_and_noted(tmp_path: Path) -> None:
    tensors = write_bin(tmp_path)
    folder = tmp_path / "language_model"
    lm = build_causal_lm(CausalLmConfig(model=str(folder)))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in lm.lm.state_dict().items())
    converted = safetensors_folder(folder)
    assert converted.is_relative_to(tmp_path / "cache")
    note = json.loads((converted / NOTE).read_text())
    assert [Path(source["file"]).name for source in note] == [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    assert all(len(source["sha256"]) == 64 and source["bytes"] > 0 for source in note)
    stamp = (converted / NOTE).stat().st_mtime_ns
    assert safetensors_folder(folder) == converted and (converted / NOTE).stat().st_mtime_ns == stamp


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    write_bin(tmp_path)
    shard = tmp_path / "language_model" / "pytorch_model-00001-of-00002.bin"
    torch.save({"x": Hostile()}, shard)
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002.bin: holds more than tensors"):
        safetensors_folder(shard.parent)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile()))  # the file would have run something
    assert mark.exists()


def test_a_truncated_shard_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    write_bin(tmp_path)
    shard = tmp_path / "language_model" / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002.bin: is damaged"):
        safetensors_folder(shard.parent)
    shard.unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002.bin: this shard is missing"):
        safetensors_folder(shard.parent)


def test_no_weights_and_a_full_disk_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there are no weights; expected"):
        safetensors_folder(tmp_path)
    write_bin(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes, 10 are free"):
        safetensors_folder(tmp_path / "language_model")
