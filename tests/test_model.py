from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parts import numbered, picture, sample, tiny_collator, tiny_model
from torch import Tensor

from llava_kit.contracts import Batch, GenerateOptions, ImageSlot, Sample
from llava_kit.errors import RecipeError
from llava_kit.model import LlavaModel, set_precision, set_trainable
from llava_kit.tokens import Tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def samples(folder: Path) -> list[Sample]:
    a, b = picture(folder / "a.png", 1), picture(folder / "b.png", 2)
    return [
        sample("one", [a], "What is this?", "A cat.", "Colour?", "Black and white."),
        sample("two", [b, a], "Compare.", "They differ."),
        sample("text", [], "Hello?", "Good morning to you."),
    ]


def loss_of_one(model: LlavaModel, one: Sample) -> Tensor:
    """Written out in the simplest way: concatenate rows, run the stock model, take the loss at trained tokens."""
    collator = tiny_collator(model)
    tokens: Tokens = collator.encoder(collator.template.render(one.turns, False))
    rows, labels = [], []
    images = iter(one.images)
    for index, label in zip(tokens.ids, tokens.labels, strict=True):
        if index == -200:
            from PIL import Image

            with Image.open(next(images)) as image:
                pixels = model.vision_encoder.preprocess(image.convert("RGB")).pixels_NCHW
            patches = model.vision_encoder(pixels)[0, 1:]
            rows.append(F.linear(patches, model.connector.final.weight, model.connector.final.bias))
            labels += [-100] * len(patches)
        else:
            rows.append(model.language_model.lm.get_input_embeddings()(torch.tensor([index])))
            labels.append(label)
    logits = model.language_model.lm(inputs_embeds=torch.cat(rows)[None]).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(labels)[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_a_mixed_batch_equals_its_samples_one_by_one(folder: Path, samples: list[Sample], model_type: str) -> None:
    """Images, two images and text only in one padded batch: loss and gradients, also where embeddings are scaled."""
    model = tiny_model(folder / model_type, model_type=model_type)
    assert (model.language_model.embedding_table() is None) == (model_type == "gemma3_text")
    micro = tiny_collator(model)(numbered(*samples))
    assert micro.batch is not None and not micro.rejected
    parameters = [*model.connector.parameters(), *model.language_model.parameters()]
    loss, count = model(micro.batch)
    actual = torch.autograd.grad(loss, parameters)
    expected_loss = torch.stack([loss_of_one(model, one) for one in samples]).sum()
    expected = torch.autograd.grad(expected_loss, parameters)
    assert count == sum(label != -100 for one in samples for label in tokens_of(model, one).labels)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def tokens_of(model: LlavaModel, one: Sample) -> Tokens:
    collator = tiny_collator(model)
    return collator.encoder(collator.template.render(one.turns, False))


def test_exchanging_two_images_changes_the_loss(folder: Path, samples: list[Sample]) -> None:
    """The comparison above can fail: images in the wrong order change the loss by far more than its tolerance."""
    model = tiny_model(folder)
    one = samples[1]
    swapped = Sample(id=one.id, turns=one.turns, images=one.images[::-1])
    assert (loss_of_one(model, one) - loss_of_one(model, swapped)).abs() > 1e-2


def test_features_of_a_frozen_tower_have_no_graph_and_a_tuned_tower_learns(folder: Path, samples: list[Sample]) -> None:
    model = tiny_model(folder)
    batch = batch_of(model, samples)
    model.vision_encoder.requires_grad_(False)
    model(batch)[0].backward()
    model.vision_encoder.requires_grad_(True)
    model(batch)[0].backward()
    names = {name for name, p in model.vision_encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert "visual.conv1.weight" in names and not any("resblocks.1." in name for name in names)


def batch_of(model: LlavaModel, samples: list[Sample]) -> Batch:
    batch = tiny_collator(model)(numbered(*samples)).batch
    assert batch is not None
    return batch


def test_a_text_only_batch_leaves_zero_gradients_in_the_connector(folder: Path, samples: list[Sample]) -> None:
    model = tiny_model(folder, connector="mlp")
    model(batch_of(model, samples[2:]))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_answers_of_a_batch_equal_answers_alone(folder: Path, samples: list[Sample]) -> None:
    model = tiny_model(folder).eval()
    prompts = [Sample(id=s.id, turns=s.turns[:1], images=s.images) for s in samples]
    options = GenerateOptions(max_new_tokens=5)
    collator = tiny_collator(model)
    together = collator.prompts(prompts).batch
    assert together is not None
    answers = model.generate(together, options).ids
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = collator.prompts([prompt]).batch
        assert alone is not None and model.generate(alone, options).ids == [answer]


def test_only_what_the_stage_names_trains_and_is_kept_in_fp32(folder: Path) -> None:
    model = tiny_model(folder)
    stage = SimpleNamespace(trainable={"connector": ("*",), "language_model": ("lm.model.layers.1.*", "lm.lm_head.*")})
    counts = set_trainable(model, "tune", stage)  # type: ignore[arg-type]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        n.startswith(("connector.", "language_model.lm.model.layers.1.", "language_model.lm.lm_head")) for n in trained
    )
    assert counts["vision_encoder"] == 0 and counts["connector"] == 32 * 64 + 64
    set_precision(model, "bf16")
    assert {p.dtype for p in model.vision_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}


def test_a_pattern_that_matches_nothing_is_an_error(folder: Path) -> None:
    stage = SimpleNamespace(trainable={"connector": ("layers.9.*",)})
    with pytest.raises(RecipeError, match=r"stages.tune.trainable.connector: 'layers.9.\*' matches no parameter"):
        set_trainable(tiny_model(folder), "tune", stage)  # type: ignore[arg-type]


def test_images_may_stand_last(folder: Path, samples: list[Sample]) -> None:
    model = tiny_model(folder)
    turn = samples[0].turns[0]
    last = Sample(
        id="last", images=samples[0].images, turns=(type(turn)("human", ("Look: ", ImageSlot(0))), samples[0].turns[1])
    )
    loss, _ = model(batch_of(model, [last]))
    torch.testing.assert_close(loss, loss_of_one(model, last), rtol=1e-5, atol=1e-5)
