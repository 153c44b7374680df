from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from llava_kit.contracts import GenerateOptions
from llava_kit.errors import ModelError
from llava_kit_plugins.causal_lm import CausalLanguageModel, CausalLmConfig, build_causal_lm

VICUNA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CausalLmConfig:
    return CausalLmConfig(model="a/b", architecture={"model_type": "llama"}).tiny(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def lm(config: CausalLmConfig) -> CausalLanguageModel:
    return build_causal_lm(config)


def rows(lm: CausalLanguageModel, *ids: int) -> torch.Tensor:
    return lm.embed(torch.tensor([ids])).detach()


def ones(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.bool)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "cohere", "granite"])
def test_embed_hidden_and_logits_equal_the_stock_model(model_type: str, tmp_path: Path) -> None:
    """Architectures that scale embeddings, scale or cap logits, or tie their weights."""
    config = CausalLmConfig(model="a/b", architecture={"model_type": model_type}).tiny(tmp_path)
    ours = build_causal_lm(config)
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours.lm(ids).logits
        actual = ours.logits(ours.hidden(ours.embed(ids)).flatten(0, 1))
    torch.testing.assert_close(actual, expected.flatten(0, 1), rtol=0, atol=1e-5)
    if ours.embedding_table() is not None:
        assert torch.equal(ours.embed(ids), nn.functional.embedding(ids, ours.embedding_table()))


def test_a_scaled_adapted_or_hooked_embedding_is_no_plain_table(lm: CausalLanguageModel) -> None:
    assert lm.embedding_table() is not None
    handle = lm.lm.get_input_embeddings().register_forward_hook(lambda *_: None)
    assert lm.embedding_table() is None
    handle.remove()


def test_right_padding_changes_nothing(lm: CausalLanguageModel) -> None:
    alone = lm.hidden(rows(lm, 5, 6, 7))
    padded = torch.cat([rows(lm, 5, 6, 7), torch.zeros(1, 4, 64)], dim=1)
    torch.testing.assert_close(lm.hidden(padded)[:, :3], alone, rtol=0, atol=1e-6)


def test_greedy_answers_equal_those_of_transformers(lm: CausalLanguageModel) -> None:
    ids = list(range(40, 51))
    expected = lm.lm.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 11:].tolist()
    options = GenerateOptions(max_new_tokens=6)
    alone = lm.generate(rows(lm, *ids), ones(11), options)
    assert alone.ids == [expected]
    left_padded = torch.cat([torch.zeros(1, 3, 64), rows(lm, *ids)], dim=1)
    other = rows(lm, *range(60, 74))
    mask = torch.tensor([[0] * 3 + [1] * 11, [1] * 14], dtype=torch.bool)
    assert lm.generate(torch.cat([left_padded, other]), mask, options).ids[0] == expected


def test_a_warm_cache_takes_only_new_rows_and_answers_the_same(lm: CausalLanguageModel) -> None:
    all_rows = rows(lm, *range(40, 51))
    expected = lm.generate(all_rows, ones(11), GenerateOptions(max_new_tokens=6)).ids
    first = lm.generate(all_rows[:, :7], ones(7), GenerateOptions(max_new_tokens=1))
    assert lm.generate(all_rows[:, 7:], ones(11), GenerateOptions(max_new_tokens=6), first.cache).ids == expected


def test_end_token_and_stop_text_end_an_answer(lm: CausalLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([lm.tokenizer.convert_tokens_to_ids(piece) for piece in ["A", "#", "#", "B", "</s>"] * 2])

    def scripted(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.tensor([next(script)]), lm.lm.config.vocab_size).float()

    monkeypatch.setattr(lm, "logits", scripted)
    plain = lm.generate(rows(lm, 5), ones(1), GenerateOptions(max_new_tokens=9))
    assert (lm.tokenizer.decode(plain.ids[0]).strip(), plain.finish_reason) == ("A##B", ["stop"])
    stopped = lm.generate(rows(lm, 5), ones(1), GenerateOptions(max_new_tokens=9, stop=("##",)))
    assert (lm.tokenizer.decode(stopped.ids[0]).strip(), stopped.finish_reason) == ("A##", ["stop"])


def test_length_ends_an_answer(lm: CausalLanguageModel) -> None:
    generation = lm.generate(rows(lm, 40), ones(1), GenerateOptions(max_new_tokens=2))
    assert generation.finish_reason == ["length"] and len(generation.ids[0]) == 2


def test_sampling_repeats_with_its_seed_and_keeps_to_top_p(lm: CausalLanguageModel) -> None:
    def answer(**options: float) -> list[int]:
        return lm.generate(rows(lm, 40), ones(1), GenerateOptions(max_new_tokens=8, **options)).ids[0]  # type: ignore[arg-type]

    assert answer(temperature=5.0, seed=1) == answer(temperature=5.0, seed=1)
    assert answer(temperature=5.0, seed=1) != answer(temperature=5.0, seed=2)
    assert answer(temperature=5.0, top_p=1e-6) == answer(), "the smallest nucleus is the likeliest token"


def test_sizes_are_known_before_anything_is_downloaded() -> None:
    with torch.device("meta"):
        lm = build_causal_lm(CausalLmConfig(model="lmsys/vicuna-7b-v1.3", architecture=VICUNA_7B))
    assert sum(p.numel() for p in lm.parameters()) == 6_738_415_616
    assert lm.embed_dim == 4096
    with pytest.raises(ModelError, match="the tokenizer is not here yet"):
        _ = lm.tokenizer


def test_unknown_sizes_say_what_would_help() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match="its sizes are unknown; state them under"):
        build_causal_lm(CausalLmConfig(model="owner/unheard-of"))


def test_a_checkpoint_must_be_what_the_recipe_says(config: CausalLmConfig) -> None:
    wrong = CausalLmConfig(model=config.model, architecture={"hidden_size": 4096})
    with pytest.raises(ModelError, match=r"architecture.hidden_size: the recipe says 4096, .* has 64"):
        build_causal_lm(wrong)


def test_a_missing_folder_and_an_unreachable_hub_are_named() -> None:
    with pytest.raises(ModelError, match=r"there is no folder './nowhere'; .* prepare steps"):
        build_causal_lm(CausalLmConfig(model="./nowhere"))
    with pytest.raises(ModelError, match="'owner/name' is not in the hub's cache and the hub is out of reach"):
        build_causal_lm(CausalLmConfig(model="owner/name"))


def test_a_missing_tensor_is_named(config: CausalLmConfig, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(config.model, tmp_path / "lm"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack 'model.norm.weight'"):
        build_causal_lm(CausalLmConfig(model=str(folder)))


@pytest.mark.parametrize("text", ["{", json.dumps({"model_type": "no_such_thing"}), "[]"])
def test_a_broken_config_is_named(config: CausalLmConfig, tmp_path: Path, text: str) -> None:
    import shutil

    folder = Path(shutil.copytree(config.model, tmp_path / "lm"))
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config.json: cannot be read"):
        build_causal_lm(CausalLmConfig(model=str(folder)))


def test_checkpointed_activations_give_the_same_gradients(lm: CausalLanguageModel) -> None:
    def gradient() -> torch.Tensor:
        loss = lm.logits(lm.hidden(lm.embed(torch.tensor([[5, 6, 7, 8]])))).square().sum()
        return torch.autograd.grad(loss, lm.lm.model.layers[0].mlp.up_proj.weight)[0]

    lm.train()
    plain = gradient()
    calls = []
    handle = lm.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    lm.gradient_checkpointing(True)
    checkpointed = gradient()
    lm.gradient_checkpointing(False)
    handle.remove()
    lm.eval()
    assert len(calls) == 2, "forward ran once more in the backward pass"
    assert torch.equal(plain, checkpointed)
