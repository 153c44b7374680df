"""The splice as others do it, on the same operands, for the benchmarks.

transformers runs its own code.  The merges of the original LLaVA, nanoVLM and prismatic are written anew here: the same
steps on the same tensors, without the rest of those projects.

Shapes: B samples, T positions, P patches (a class row in front), K encoder width, D language model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_kit.contracts import SplicePlan
from llava_kit.plan import text_segments, uniform_block
from llava_kit.splice import project_and_splice

IMAGE = 31_999
"""Id of the image placeholder (the last of the vocabulary)."""
VOCABULARY = 32_000


@dataclass(frozen=True)
class Size:
    """Every sample is a first token, an image and text, which is the one layout that all peers can do."""

    name: str
    b: int
    p: int
    k: int
    d: int
    t: int


@dataclass
class Setting:
    """Operands that all paths share; parameters collect gradients."""

    size: Size
    features: Tensor
    """``[B, P + 1, K]``, the class row first, as an encoder gives them."""
    linear: nn.Linear
    table: nn.Parameter
    short_ids: Tensor
    """``[B, T - P + 1]``: one placeholder for the image."""
    long_ids: Tensor
    """``[B, T]``: a placeholder for each patch."""
    plan: SplicePlan
    grad: Tensor


def make_setting(size: Size, dtype: torch.dtype, device: str) -> Setting:
    """Random operands, the same for the same arguments."""
    torch.manual_seed(0)
    b, p, t = size.b, size.p, size.t
    short_ids = torch.randint(0, IMAGE, (b, t - p + 1))
    short_ids[:, 1] = IMAGE
    long_ids = torch.cat([short_ids[:, :1], torch.full((b, p), IMAGE), short_ids[:, 2:]], 1)
    with torch.device(device):
        linear = nn.Linear(size.k, size.d, dtype=dtype)
        table = nn.Parameter(torch.randn(VOCABULARY, size.d, dtype=dtype))
        features = torch.randn(b, p + 1, size.k, dtype=dtype)
        grad = torch.randn(b, t, size.d, dtype=dtype)
    plan = make_plan(long_ids, p, device)
    return Setting(size, features, linear, table, short_ids.to(device), long_ids.to(device), plan, grad)


def make_plan(long_ids: Tensor, patches: int, device: str) -> SplicePlan:
    """What the collator would plan for these ids."""
    b, t = long_ids.shape
    vis_dst = [row for one in range(b) for row in (-1, *range(one * t + 1, one * t + 1 + patches))]
    flat = long_ids.flatten()
    txt_dst_S = (flat != IMAGE).nonzero()[:, 0].int()
    txt_id_S = flat[txt_dst_S].int()
    order_S, start, uid = text_segments(txt_id_S)
    none = torch.zeros(0, dtype=torch.int32)
    tensors = {
        "vis_dst_V": torch.tensor(vis_dst, dtype=torch.int32), "txt_id_S": txt_id_S, "txt_dst_S": txt_dst_S,
        "seg_order_S": order_S, "seg_start": start, "seg_uid": uid, "label_row_L": none, "label_id_L": none,
        "mask_BT": torch.ones(b, t, dtype=torch.bool),
    }  # fmt: skip
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return SplicePlan(**moved, lengths=(t,) * b, label_counts=(0,) * b, uniform=uniform_block(vis_dst, b, t))


def ours(setting: Setting) -> Callable[[], Tensor]:
    """The operator, with the backend that its dispatcher is set to."""
    return lambda: project_and_splice(setting.features.flatten(0, 1), setting.linear, setting.table, setting.plan)


class _Tower(nn.Module):
    """Gives the features it was given."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(hidden_states=(self.features, self.features, self.features))


class _Decoder(nn.Module):
    """Gives back its input."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*table.shape, _weight=table)
        self.embedding.weight = table

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        return SimpleNamespace(
            last_hidden_state=inputs_embeds, past_key_values=None, hidden_states=None, attentions=None
        )


def transformers_path(setting: Setting) -> Callable[[], Tensor]:
    """``LlavaForConditionalGeneration`` as installed, its merge untouched; tower and decoder pass on what they get."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).model
    model.vision_tower = _Tower(setting.features)
    model.multi_modal_projector = setting.linear
    model.language_model = _Decoder(setting.table)
    pixels = torch.zeros(1, device=setting.features.device)

    def run() -> Tensor:
        out: Tensor = model(
            input_ids=setting.long_ids, pixel_values=pixels, vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ).last_hidden_state  # fmt: skip
        return out

    return run


def llava_loop(setting: Setting) -> Callable[[], Tensor]:
    """The original's loop: pieces of each sample are embedded and joined, then padded and stacked."""

    def run() -> Tensor:
        images = setting.linear(setting.features[:, 1:])
        samples = []
        for number, ids in enumerate(setting.short_ids):
            if (ids == IMAGE).sum() == 0:
                samples.append(F.embedding(ids, setting.table))
                continue
            cuts = [-1, *torch.where(ids == IMAGE)[0].tolist(), ids.shape[0]]
            pieces = [ids[first + 1 : last] for first, last in pairwise(cuts)]
            embedded = F.embedding(torch.cat(pieces), setting.table).split([piece.shape[0] for piece in pieces])
            joined = [embedded[0]]
            for one in embedded[1:]:
                joined += [images[number], one]
            samples.append(torch.cat(joined))
        longest = max(sample.shape[0] for sample in samples)
        padded = [
            torch.cat([sample, sample.new_zeros(longest - sample.shape[0], sample.shape[1])]) for sample in samples
        ]
        return torch.stack(padded)

    return run


def nanovlm_path(setting: Setting) -> Callable[[], Tensor]:
    """Embed everything, copy, overwrite by a boolean mask."""

    def run() -> Tensor:
        embeds = F.embedding(setting.long_ids, setting.table).clone()
        images = setting.linear(setting.features[:, 1:])
        embeds[setting.long_ids == IMAGE] = images.reshape(-1, images.shape[-1])
        return embeds

    return run


def prismatic_path(setting: Setting) -> Callable[[], Tensor]:
    """Patches after the first token of the samples that have an image; text-only samples would follow behind."""
    b = setting.size.b
    ids = torch.cat([setting.short_ids[:, :1], setting.short_ids[:, 2:]], 1)
    with_image = torch.arange(b, device=ids.device)

    def run() -> Tensor:
        patches = setting.linear(setting.features[:, 1:])
        embeds = F.embedding(ids, setting.table)
        joined = torch.cat([embeds[with_image, :1, :], patches[with_image], embeds[with_image, 1:, :]], dim=1)
        text_only = [index for index in range(b) if index not in with_image]
        return joined if not text_only else torch.vstack([joined, embeds[text_only]])

    return run


PEERS: dict[str, Callable[[Setting], Callable[[], Tensor]]] = {
    "transformers": transformers_path,
    "LLaVA's loop": llava_loop,
    "nanoVLM's merge": nanovlm_path,
    "prismatic's merge": prismatic_path,
}


class Counter(TorchDispatchMode):
    """Counts dispatched operators, and those for which the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        views = ("view", "detach", "t", "transpose", "unsqueeze", "select", "slice", "split_with_sizes", "expand",
                 "unbind", "_unsafe_view", "alias", "lift_fresh")  # fmt: skip
        self.operators += name not in views
        masks = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        self.syncs += masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **kwargs or {})


def count(run: Callable[[], Tensor]) -> Counter:
    """Operators (views apart) and syncs of one forward pass."""
    counter = Counter()
    to_list = Tensor.tolist

    def counted(self: Tensor) -> Any:
        counter.syncs += 1
        return to_list(self)

    Tensor.tolist = counted  # type: ignore[method-assign]  # it does not reach the dispatcher on a CPU
    try:
        with counter:
            run()
    finally:
        Tensor.tolist = to_list  # type: ignore[method-assign]
    return counter
