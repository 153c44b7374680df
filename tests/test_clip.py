from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_kit.errors import ModelError
from llava_kit_plugins.clip import ClipConfig, ClipEncoder, build_clip, tensors_from_hf


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    return ClipConfig().tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(config: ClipConfig) -> ClipEncoder:
    return build_clip(config)


@pytest.fixture(scope="module")
def padding(config: ClipConfig) -> ClipEncoder:
    return build_clip(replace(config, aspect="pad"))


def test_the_default_is_vit_l_14_at_224_pixels() -> None:
    with torch.device("meta"):
        encoder = build_clip(ClipConfig())
    assert encoder.embed_dim == 1024
    assert encoder.grid == (16, 16), "256 patches"
    assert encoder.block == 22, "the 23rd of 24 blocks"
    assert type(encoder.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    layout = encoder.preprocess(Image.new("RGB", (640, 480))).layout
    assert (layout.rows_per_tile, layout.prefix_tokens) == (257, 1)
    assert layout.crop == (80, 0, 560, 480), "the centre square"


def test_features_equal_hidden_states_minus_two_of_transformers(encoder: ClipEncoder) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config, tensors = encoder.to_hf()
    config.pop("model_type")
    reference = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    missing, unexpected = reference.load_state_dict(tensors, strict=False)
    assert not missing and not unexpected
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states
        actual = encoder(pixels)
    torch.testing.assert_close(actual, expected[-2], rtol=0, atol=1e-5)
    assert (actual - expected[-1]).abs().max() > 1e-2, "another layer is something else"


def test_weights_from_transformers_give_its_features(encoder: ClipEncoder, config: ClipConfig) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hf_config, _ = encoder.to_hf()
    hf_config.pop("model_type")
    torch.manual_seed(1)
    reference = CLIPVisionModel(CLIPVisionConfig(**hf_config)).eval()
    ours = build_clip(config)
    own = tensors_from_hf(reference.state_dict())
    missing, unexpected = ours.visual.load_state_dict(own, strict=False)
    assert missing == ["proj"] and not unexpected
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=1e-5)


def test_conversion_there_and_back_is_bit_identical(encoder: ClipEncoder) -> None:
    _, tensors = encoder.to_hf()
    back = tensors_from_hf(tensors)
    own = encoder.visual.state_dict()
    assert set(own) - set(back) == {"proj"}
    assert all(torch.equal(own[name], tensor) for name, tensor in back.items())


def test_the_last_block_is_kept_but_not_computed(encoder: ClipEncoder) -> None:
    called = []
    handle = encoder.visual.transformer.resblocks[-1].register_forward_hook(lambda *_: called.append(1))
    encoder(torch.zeros(1, 3, 56, 56))
    handle.remove()
    assert not called
    assert any("resblocks.1." in name for name, _ in encoder.named_parameters())


SIZES = [(91, 70), (70, 91), (64, 64), (56, 57), (640, 481), (301, 300), (13, 200)]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_that_of_transformers_bit_for_bit(encoder: ClipEncoder, size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    image = Image.effect_noise(size, 80).convert("RGB")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.preprocess(image).pixels_NCHW, expected)


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_that_of_llava_1_5_bit_for_bit(padding: ClipEncoder, size: tuple[int, int]) -> None:
    """Against transformers' own LLaVA processor, and against the original's steps written out here."""
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    red, green, blue = (Image.effect_noise(size, sigma) for sigma in (30, 60, 90))
    image = Image.merge("RGB", (red, green, blue))
    square = image
    if image.width > image.height:
        square = Image.new("RGB", (image.width, image.width), (122, 116, 104))
        square.paste(image, (0, (image.width - image.height) // 2))
    elif image.height > image.width:
        square = Image.new("RGB", (image.height, image.height), (122, 116, 104))
        square.paste(image, ((image.height - image.width) // 2, 0))
    views = padding.preprocess(image)
    by_hand = CLIPImageProcessorPil(**sizes)(square, return_tensors="pt")["pixel_values"]
    assert torch.equal(views.pixels_NCHW, by_hand)
    stock = LlavaImageProcessorPil(do_pad=True, **sizes)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(views.pixels_NCHW, stock)


def test_where_a_padded_image_lies_in_what_is_seen(padding: ClipEncoder) -> None:
    assert padding.preprocess(Image.new("RGB", (641, 480))).layout.crop == (0, -80, 641, 561), "odd pixel at the bottom"
    assert padding.preprocess(Image.new("RGB", (480, 641))).layout.crop == (-80, 0, 561, 641)
    corner = padding.preprocess(Image.new("RGB", (64, 4))).pixels_NCHW[0, :, 0, 0]
    assert corner.tolist() == pytest.approx([-0.0113, -0.0112, -0.0013], abs=5e-5)


def test_the_tower_of_llava_1_5_has_576_patches() -> None:
    with torch.device("meta"):
        encoder = build_clip(ClipConfig(model="ViT-L-14-336-quickgelu", aspect="pad"))
    views = encoder.preprocess(Image.new("RGB", (640, 480)))
    assert tuple(views.pixels_NCHW.shape) == (1, 3, 336, 336)
    assert views.layout.grid_h * views.layout.grid_w == 576
    assert encoder.embed_dim == 1024
    assert type(encoder.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"model": "ViT-L-14-quickgel", "folder": None},
            "no model 'ViT-L-14-quickgel'; did you mean 'ViT-L-14-quickgelu'?",
        ),
        ({"weights": "opnai", "folder": None}, "open_clip has no weights 'opnai' for ViT-L-14-quickgelu; did you mean"),
        ({"folder": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"layer": -9}, "layer -9 does not exist; the tower has 2"),
    ],
)
def test_what_cannot_be_built_says_why(config: ClipConfig, change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_clip(replace(config, **change))  # type: ignore[arg-type]
    assert complaint in str(caught.value)


def test_a_truncated_weight_file_is_named(config: ClipConfig, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(str(config.folder), tmp_path / "clip")
    weights = Path(folder) / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_clip(replace(config, folder=str(folder)))


def test_a_stage_may_choose_the_aspect(encoder: ClipEncoder, padding: ClipEncoder) -> None:
    from llava_kit.data import choose_preprocess
    from llava_kit.errors import RecipeError

    image = Image.effect_noise((91, 70), 80).convert("RGB")
    padded, cropped = padding.preprocess(image), encoder.preprocess(image)
    assert torch.equal(choose_preprocess(encoder, "pad")(image).pixels_NCHW, padded.pixels_NCHW)
    assert torch.equal(choose_preprocess(padding, "crop")(image).pixels_NCHW, cropped.pixels_NCHW)
    assert torch.equal(choose_preprocess(padding, None)(image).pixels_NCHW, padded.pixels_NCHW)
    with pytest.raises(RecipeError, match="image_aspect: the vision encoder knows no 'pda'; did you mean 'pad'"):
        choose_preprocess(encoder, "pda")
