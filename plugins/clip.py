"""CLIP vision towers through open_clip; OpenAI's ViT-L/14 is LLaVA's eye."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llava_kit import hookimpl
from llava_kit.contracts import Layout, Unsupported, Views, is_meta_build
from llava_kit.errors import ModelError, Problem, nearest
from llava_kit.weights import stored_in

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_kit.hookspecs import Register

CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which tower, from where, and which of its layers is read."""

    model: str = "ViT-L-14-quickgelu"
    """A model name of open_clip.  OpenAI's weights were trained with quick-GELU, so they need a ``-quickgelu`` name."""
    weights: str | None = "openai"
    """A weight tag of open_clip for that model; ``null`` starts from random values."""
    folder: str | None = None
    """A local folder in open_clip's or transformers' hub layout (config and weights), instead of model and weights."""
    layer: int = -2
    """Features are the output of this block, counted from the end: −2 is the penultimate one, as in LLaVA."""
    aspect: Literal["crop", "pad"] = "crop"
    """What becomes of images that are not square, where a stage does not say otherwise (``image_aspect``): ``crop``
    shows their centre, as LLaVA v1 does; ``pad`` puts them into a square of the mean colour, as LLaVA-1.5 does after
    its first stage."""

    def __post_init__(self) -> None:
        if self.layer >= 0:
            raise ValueError(f"layer counts from the end and must be negative, got {self.layer}")

    def tiny(self, folder: Path) -> ClipConfig:
        """A random two-block tower of the same kind: 4 × 4 patches of width 32."""
        import open_clip

        target = folder / "clip"
        target.mkdir(parents=True, exist_ok=True)
        vision = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
        text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
        model_cfg = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
        (target / CONFIG_FILE).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": 56}}), "utf-8")
        torch.manual_seed(0)
        _save_weights(open_clip.CLIP(**model_cfg), target)
        return replace(self, folder=str(target), layer=max(self.layer, -2))

    @classmethod
    def from_hf(cls, folder: Path) -> ClipConfig | Unsupported:
        """For transformers' ``clip_vision_model``."""
        config = _read_json(folder / "config.json")
        if config.get("model_type") != "clip_vision_model":
            return Unsupported("it is CLIP")
        if config.get("hidden_act") not in ACTIVATIONS.values():
            return Unsupported(f"hidden_act '{config.get('hidden_act')}' has no counterpart")
        if config.get("vision_feature_select_strategy") != "default":
            return Unsupported("the class row never reaches the language model (select strategy 'default')")
        padded = config.get("image_processor", {}).get("do_pad")
        return cls(folder=str(folder), layer=config["vision_feature_layer"], aspect="pad" if padded else "crop")


def _save_weights(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")


class ClipEncoder(nn.Module):
    """The image side of a CLIP model.  Blocks after the one that is read are kept for export but not computed."""

    aspects = ("crop", "pad")

    def __init__(self, visual: nn.Module, layer: int, aspect: str = "crop") -> None:
        super().__init__()
        from open_clip import transform

        self.visual = visual
        transformer: Any = visual.transformer
        if -layer > len(transformer.resblocks):
            what = f"layer {layer} does not exist"
            raise ModelError(Problem("model.vision_encoder.layer", what, f"the tower has {len(transformer.resblocks)}"))
        self.block = len(transformer.resblocks) + layer
        self.embed_dim: int = transformer.width
        cfg = transform.PreprocessCfg(**visual.preprocess_cfg)  # type: ignore[arg-type]
        self._transform = transform.image_transform_v2(cfg, is_train=False)
        height, width = cfg.input_size[1:]
        self._short_edge = height if cfg.resize_mode == "shortest" and height == width else None
        self._resampling = {"bicubic": 3, "bilinear": 2}.get(cfg.interpolation, 3)  # numbers of PIL.Image.Resampling
        self._padding = tuple(int(mean * 255) for mean in cfg.mean)
        self.aspect = aspect
        self.grid: tuple[int, int] = visual.grid_size  # type: ignore[assignment]
        self.layer, self._preprocess_cfg = layer, cfg

    def preprocess(self, image: Image, aspect: str | None = None) -> Views:
        """Padding if asked for, then CLIP's own: shortest edge to the input size, centre crop, normalise.

        Bit for bit what transformers' CLIP processor gives, and with ``pad`` what LLaVA-1.5 sees.
        """
        padded = (aspect or self.aspect) == "pad"
        seen = self._seen(image.size, padded)
        if padded:
            image = _padded(image, seen, self._padding)
        if self._short_edge is not None:
            image = _shrunk_and_cropped(image, self._short_edge, self._resampling)
        layout = Layout(grid_h=self.grid[0], grid_w=self.grid[1], prefix_tokens=1, crop=seen)
        return Views(pixels_NCHW=self._transform(image)[None], layout=layout)

    def _seen(self, size: tuple[int, int], padded: bool) -> tuple[int, int, int, int]:
        """What of an image is seen: a centred square, inside it or around it; other resize modes show the whole."""
        width, height = size
        if padded:
            side = max(width, height)
            left, top = -((side - width) // 2), -((side - height) // 2)
        elif self._short_edge is not None:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
        else:
            return (0, 0, width, height)
        return (left, top, left + side, top + side)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """``[N, 3, H, W] -> [N, 1 + grid, width]``: class token first, without the final layer norm."""
        out = self.visual.forward_intermediates(  # type: ignore[operator]
            pixels_NCHW,
            indices=[self.block],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Tensor]] | Unsupported:
        """Config and tensors in the layout of transformers' ``CLIPVisionModel``, without a ``vision_model.`` prefix."""
        converted = _to_hf(self.visual)
        cfg = self._preprocess_cfg
        if isinstance(converted, Unsupported):
            return converted
        if self._short_edge is None or cfg.interpolation != "bicubic":
            return Unsupported("its preprocessing is not CLIP's own (shortest edge, bicubic, centre crop)")
        config, tensors = converted
        processor = {
            "do_pad": self.aspect == "pad",
            "size": {"shortest_edge": self._short_edge},
            "crop_size": {"height": self._short_edge, "width": self._short_edge},
            "image_mean": list(cfg.mean),
            "image_std": list(cfg.std),
        }
        return config | {
            "vision_feature_layer": self.layer,
            "vision_feature_select_strategy": "default",
            "image_processor": processor,
        }, tensors


def _padded(image: Image, box: tuple[int, int, int, int], colour: tuple[int, ...]) -> Image:
    """The image in a square of one colour that covers ``box`` of its plane."""
    from PIL import Image as Images

    left, top, right, bottom = box
    square = Images.new("RGB", (right - left, bottom - top), colour)
    square.paste(image, (-left, -top))
    return square


def _shrunk_and_cropped(image: Image, size: int, resampling: int) -> Image:
    """Shortest edge to ``size``, then the centre.

    torchvision, which open_clip uses, rounds half a pixel of the crop's place to the even side and LLaVA down.
    """
    width, height = image.size
    short = min(width, height)
    scaled = (int(size * width / short), int(size * height / short))
    if scaled != image.size:
        image = image.resize(scaled, resampling)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def build_clip(config: ClipConfig) -> ClipEncoder:
    """The tower with its weights.

    Raises:
        ModelError: the model, the tag or the folder is unknown, or the weights cannot be had.
    """
    import open_clip
    from safetensors import SafetensorError

    if config.folder is not None and (Path(config.folder) / "config.json").is_file():
        return ClipEncoder(_visual_from_hf(Path(config.folder)), config.layer, config.aspect)
    if config.folder is not None:
        name, weights = f"local-dir:{_checked_folder(config.folder)}", None
    else:
        name, weights = config.model, _checked_tag(config)
    meta = is_meta_build()
    load = not meta and (weights is not None or config.folder is not None)
    logging.getLogger("root").addFilter(_no_random_warning)
    try:
        clip = open_clip.create_model(
            name, pretrained=weights if load else None, load_weights=load, device="meta" if meta else "cpu"
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        where = f"model.vision_encoder ({config.folder or f'{name}, {weights}'})"
        hint = "check the folder, or your connection to the hub"
        raise ModelError(Problem(where, f"cannot be loaded: {' '.join(str(error).split())[:300]}", hint)) from error
    finally:
        logging.getLogger("root").removeFilter(_no_random_warning)
    return ClipEncoder(clip.visual, config.layer, config.aspect)


def _no_random_warning(record: logging.LogRecord) -> bool:
    """open_clip warns about random weights, which are what was asked for where this filter is in force."""
    return "No pretrained weights loaded" not in record.getMessage()


def _checked_folder(folder: str) -> str:
    where = "model.vision_encoder.folder"
    if not Path(folder).is_dir():
        raise ModelError(Problem(where, f"there is no folder '{folder}'", "run the recipe's prepare steps first"))
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise ModelError(Problem(where, f"'{folder}' has no {CONFIG_FILE}", "it must be in a hub layout"))
    return folder


def _checked_tag(config: ClipConfig) -> str | None:
    import open_clip

    if config.model not in open_clip.list_models():
        hint = nearest(config.model, open_clip.list_models())
        raise ModelError(Problem("model.vision_encoder.model", f"open_clip has no model '{config.model}'", hint))
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.weights is not None and config.weights not in tags:
        what = f"open_clip has no weights '{config.weights}' for {config.model}"
        raise ModelError(Problem("model.vision_encoder.weights", what, nearest(config.weights, tags)))
    return config.weights


# --- conversion to and from transformers -----------------------------------------------------------------------------

BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # spelt so in transformers
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
KEPT_ASIDE = ("proj",)
"""Tensors of open_clip's tower that transformers' vision model does not have."""


def _to_hf(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | Unsupported:
    block = visual.transformer.resblocks[0]
    if type(visual).__name__ != "VisionTransformer" or not hasattr(block, "attn"):
        return Unsupported("only CLIP's plain vision transformer has a counterpart in transformers")
    activation = ACTIVATIONS.get(type(block.mlp.gelu).__name__)
    if activation is None or visual.grid_size[0] != visual.grid_size[1]:
        return Unsupported("the activation or the grid has no counterpart in transformers' CLIPVisionConfig")
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": visual.transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": visual.transformer.layers,
        "num_attention_heads": block.attn.num_heads,
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "hidden_act": activation,
        "layer_norm_eps": visual.ln_pre.eps,
        "projection_dim": visual.output_dim,
    }
    tensors = {}
    for name, tensor in visual.state_dict().items():
        if name in KEPT_ASIDE:
            continue
        if name in TOP_NAMES:
            tensors[TOP_NAMES[name]] = tensor
            continue
        _, _, index, rest = name.split(".", 3)  # transformer.resblocks.{index}.{rest}
        tensors.update({f"encoder.layers.{index}.{k}": v for k, v in _block_to_hf(rest, tensor).items()})
    return config, tensors


def _block_to_hf(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {f"self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
    stem, kind = name.rsplit(".", 1)
    return {f"{BLOCK_NAMES[stem]}.{kind}": tensor}


def tensors_from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' ``CLIPVisionModel`` under open_clip's names: undoes ``to_hf`` (but for ``proj``)."""
    top = {hf: own for own, hf in TOP_NAMES.items()}
    block = {hf: own for own, hf in BLOCK_NAMES.items()}
    out: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("vision_model.")
        if name.endswith("position_ids"):
            continue  # a constant that older versions of transformers wrote
        if name in top:
            out[top[name]] = tensor
            continue
        _, _, index, rest = name.split(".", 3)  # encoder.layers.{index}.{rest}
        prefix = f"transformer.resblocks.{index}"
        stem, kind = rest.rsplit(".", 1)
        if stem in block:
            out[f"{prefix}.{block[stem]}.{kind}"] = tensor
        elif stem == "self_attn.q_proj":
            qkv = [tensors[full_name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            out[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return out


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _visual_from_hf(folder: Path) -> nn.Module:
    """open_clip's tower with config and tensors of a folder in transformers' layout, in their dtype.

    Raises:
        ModelError: the tensors are not exactly those of the config's tower.
    """
    import open_clip

    config = _read_json(folder / "config.json")
    width = config["hidden_size"]
    vision = {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "layers": config["num_hidden_layers"],
        "width": width,
        "head_width": width // config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}  # made, and let go
    quick = config["hidden_act"] == "quick_gelu"
    visual = open_clip.CLIP(embed_dim=16, quick_gelu=quick, vision_cfg=vision, text_cfg=text).visual
    visual.proj = None
    for module in visual.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config["layer_norm_eps"]
    seen = config.get("image_processor", {})
    given = {"mean": seen.get("image_mean"), "std": seen.get("image_std")}
    size = {"size": config["image_size"], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    visual.preprocess_cfg = size | {name: tuple(value) for name, value in given.items() if value}
    if not is_meta_build():
        tensors = tensors_from_hf({name: one.read() for name, one in stored_in(folder).items()})
        try:
            visual.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            what = f"does not fit its config.json: {' '.join(str(error).split())[:300]}"
            raise ModelError(Problem(str(folder), what)) from error
    return visual  # type: ignore[no-any-return]


@hookimpl
def register_vision_encoders(register: Register) -> None:
    """``clip``"""
    register("clip", build_clip, ClipConfig)
