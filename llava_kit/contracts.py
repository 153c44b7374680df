"""What plugins implement, and the plain data they exchange with the framework.

Shapes are written in capitals behind a name:
    N images (tiles), C channels, H W pixels, P patch rows of an encoder (prefix rows included), K connector width,
    D language model width, V visual rows of a batch, T positions of a padded sequence, B sequences, R rows in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a position where nothing is learned (torch's ``ignore_index``)."""
IMAGE_TOKEN = -200
"""Stands for one image in a sequence of ids, before its patch rows take the place (LLaVA's ``IMAGE_TOKEN_INDEX``)."""

# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSlot:
    """The place of an image inside a turn; ``index`` counts through the sample's images."""

    index: int


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: text and image places in their order."""

    role: Literal["human", "assistant"]
    parts: tuple[str | ImageSlot, ...]

    @property
    def text(self) -> str:
        """The words of the turn, without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample: a conversation and the image files it refers to."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    """What was repaired or looks odd, for ``preview`` and ``check-data``."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a rendered conversation.

    ``control`` text may contain the tokenizer's special tokens; ``text`` is literal whatever it says; ``image`` is one
    image and has no text.  ``trained`` says whether loss is taken on it.
    """

    kind: Literal["text", "control", "image"]
    text: str = ""
    trained: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an encoder's rows for one image are arranged: ``tiles`` times (prefix rows, then a grid, row by row)."""

    grid_h: int
    grid_w: int
    tiles: int = 1
    prefix_tokens: int = 0
    """Class and register rows in front of each tile's grid."""
    crop: tuple[int, int, int, int] | None = None
    """The part of the original image that is seen: left, top, right, bottom in its pixels; outside it where padded."""

    @property
    def rows_per_tile(self) -> int:
        return self.prefix_tokens + self.grid_h * self.grid_w

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What images must share to be encoded in one batch: tiles, grid and prefix."""
        return self.tiles, self.grid_h, self.grid_w, self.prefix_tokens


@dataclass(frozen=True, kw_only=True)
class Views:
    """An image as its encoder sees it: ``pixels_NCHW`` (float32, normalised; N = ``layout.tiles``) and the layout."""

    pixels_NCHW: Tensor
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one layout: ``pixels_NCHW`` with N = images × tiles, and for connectors that read it the text."""

    pixels_NCHW: Tensor
    layout: Layout
    text: Any = None


@dataclass(frozen=True, kw_only=True)
class SplicePlan:
    """Where every row of the language model's input comes from.  Built and checked on the CPU by the collator.

    The rows of the output are numbered through the batch (row ``b·T + t`` of a padded ``[B, T, D]`` output).
    Every row is written exactly once.  All tensors are int32 except where torch demands int64.
    """

    vis_dst_V: Tensor
    """Output row of each visual row, in the order encoder and connector give them; −1 drops the row (class token)."""
    txt_id_S: Tensor
    """Token id of each text row; −1 stands for a row of zeros (padding)."""
    txt_dst_S: Tensor
    """Output row of each text row."""
    seg_order_S: Tensor
    """The text rows in the order of their ids, and those of one id in their own: the sums of the table's gradient."""
    seg_start: Tensor
    """Where in ``seg_order_S`` each id of ``seg_uid`` begins, and where the last one ends; padding belongs to none."""
    seg_uid: Tensor
    """The ids that occur, rising."""
    label_row_L: Tensor
    """Output rows whose next token is learned."""
    label_id_L: Tensor
    """The token to learn there (the shift is done)."""
    mask_BT: Tensor
    """True where a row is not padding."""
    lengths: tuple[int, ...]
    """Rows of each sequence without padding."""
    label_counts: tuple[int, ...]
    """Labelled rows of each sequence."""
    uniform: tuple[int, ...] = ()
    """Where every sequence has its visual rows in one block at the same place: the block's first row, how many dropped
    rows come before it among the visual rows, and its length.  Else empty."""

    @property
    def rows(self) -> int:
        """Rows of the output, padding included."""
        return self.mask_BT.numel()

    def with_text_rows(self) -> SplicePlan:
        """The same plan for a table that holds one row per text row of this plan, in order."""
        own = torch.arange(self.txt_id_S.numel() + 1, dtype=self.txt_id_S.dtype, device=self.txt_id_S.device)
        ids_S = torch.where(self.txt_id_S < 0, self.txt_id_S, own[:-1])
        return replace(self, txt_id_S=ids_S, seg_order_S=own[:-1], seg_start=own, seg_uid=own[:-1])

    @property
    def label_count(self) -> int:
        return sum(self.label_counts)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples ready for :class:`llava_kit.model.LlavaModel`."""

    images: tuple[ImageBatch, ...]
    """One per layout; the plan's visual rows follow their order."""
    plan: SplicePlan
    ids: tuple[str, ...]


# --- models ----------------------------------------------------------------------------------------------------------


def is_meta_build() -> bool:
    """Whether a builder is asked for shapes only (``torch.device("meta")`` is in force) and must read no weights."""
    return torch.get_default_device().type == "meta"


class Module(Protocol):
    """The members of :class:`torch.nn.Module` the framework uses; every model component is one."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...
    def train(self, mode: bool = True) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


class VisionEncoder(Module, Protocol):
    """Turns images into rows of features.

    ``forward(pixels_NCHW)`` returns ``features_NPK`` with prefix rows (class, registers) still in place.

    Optional: ``aspects``, the names of ways to treat images that are not square, which ``preprocess(image, aspect)``
    then takes.
    """

    embed_dim: int

    def preprocess(self, image: Image) -> Views:
        """The exact pixels the encoder sees of an RGB image, and how its rows will be arranged.

        Must not read weights: it runs in data loader workers.
        """
        ...

    def __call__(self, pixels_NCHW: Tensor) -> Tensor: ...


class Connector(Module, Protocol):
    """Turns an encoder's features into rows of the language model's input: ``forward = final ∘ hidden``.

    Optional: ``per_token = True`` for connectors that treat every row alone; they get prefix rows too, and the splice
    plan drops these.  Others get features without prefix rows.  ``needs_text = True`` with ``tokenize(str)`` for
    connectors that read the human turn that holds the image.
    """

    final: nn.Linear | None
    """The last layer, which the splice fuses with the copy; ``None`` where there is nothing to fuse."""

    def num_tokens(self, layout: Layout) -> int:
        """Rows that reach the language model for one image of this layout."""
        ...

    def hidden(self, features_NPK: Tensor, layout: Layout, text: Any = None) -> Tensor:
        """Everything before ``final``: ``[N, P, K] -> [N, num_tokens (or P when per_token), width of final]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to write an answer.  ``temperature`` 0 takes the likeliest token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must be between 0 and 100, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


class LoraOptions(Protocol):
    """Low-rank adapters: ``y = W x + alpha / r · B A x``, with ``A`` of ``r`` rows and dropout in front of it.

    ``targets`` are the names of the layers that get one, or how they end; none means every linear layer but the head.
    """

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> tuple[str, ...]: ...


FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """New tokens, one list per sequence, why each ended, and the cache for a next turn."""

    ids: list[list[int]]
    finish_reason: list[FinishReason]
    cache: Any = None


class LanguageModel(Module, Protocol):
    """A decoder that reads embeddings, split so that loss can be taken at chosen rows only.

    Optional: ``gradient_checkpointing(enabled)``; ``add_lora(LoraOptions)``, which puts adapters into it whose
    parameters have ``.lora_`` in their names, and ``merge_lora()``, which makes them part of the weights.
    """

    embed_dim: int
    tokenizer: PreTrainedTokenizerBase

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids as the model itself would read them (scaling, adapters and hooks included)."""
        ...

    def embedding_table(self) -> Tensor | None:
        """``[vocabulary, D]`` when :meth:`embed` is a pure look-up in it, else ``None``."""
        ...

    def hidden(self, embeds_BTD: Tensor) -> Tensor:
        """Final hidden states ``[B, T, D]``, after the last norm, before the head.

        Sequences start at row 0 and are padded on the right; attention is causal, so padding needs no mask.
        """
        ...

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """The head, with its scaling and soft cap: ``[L, D] -> [L, vocabulary]``."""
        ...

    def generate(self, embeds_BTD: Tensor, mask_BT: Tensor, options: GenerateOptions, cache: Any = None) -> Generation:
        """Continue left-padded sequences until the end token, a stop text or ``max_new_tokens``.

        With a cache from an earlier call only the rows it does not hold are passed; ``mask_BT`` covers all rows.
        """
        ...


@dataclass(frozen=True)
class Unsupported:
    """Why a component cannot be written in another layout."""

    reason: str


class Exportable(Protocol):
    """Optional on the three model contracts: the component in the hub's own layout, as config and tensors.

    Names and config are those of transformers' vision model or ``…ForCausalLM``, without a ``vision_model.`` prefix
    and without tied tensors.  A vision encoder adds what LLaVA's own config says about it: ``vision_feature_layer``
    (from the end), ``vision_feature_select_strategy`` and ``image_processor`` (keys of ``preprocessor_config.json``).
    A connector is the original's ``mm_projector``: ``mm_projector_type`` (``linear``, ``mlp2x_gelu``, …), ``in_dim``
    and ``out_dim``, its tensors named as there.
    """

    def to_hf(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]] | Unsupported: ...


@runtime_checkable
class Importable(Protocol):
    """Optional on the config dataclasses of the three model contracts: undoes :class:`Exportable`."""

    @classmethod
    def from_hf(cls, folder: Path) -> Any | Unsupported:
        """A config that builds the component from a folder in that layout: ``config.json`` and safetensors.

        Asked before the weights are there; must not read them.
        """
        ...


# --- everything else -------------------------------------------------------------------------------------------------


@runtime_checkable
class Template(Protocol):
    """How a conversation is written for a language model.

    Optional: ``original_drops(turns)``, whether the original's code would have learned nothing from a conversation
    because it miscounts its tokens.
    Optional: ``chat_template()``, the same in Jinja for transformers, with images as ``<image>``.
    """

    stop: tuple[str, ...]
    """Texts that end an answer, beside the tokenizer's end token."""

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        """The conversation as segments; with ``reply`` it ends where the assistant is to write.

        Raises:
            ValueError: the turns cannot be written in this template; the message says why.
        """
        ...

    def required_tokens(self) -> tuple[str, ...]:
        """Special tokens the tokenizer must have for the template to mean what it says."""
        ...


@runtime_checkable
class Preparation(Protocol):
    """Makes or fetches what a recipe needs.  Idempotent and resumable; checks what it made."""

    def run(self, root: Path, progress: Callable[[str], None]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question of a benchmark."""

    id: str
    question: str
    images: tuple[Path, ...] = ()
    reference: str = ""
    category: str = ""
    group: str = ""
    """Which pass over the questions this is, e.g. a control with shuffled images."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one answer did: named values, 1.0 best."""

    example: Example
    answer: str
    values: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Benchmark(Protocol):
    """Questions and the rule that scores the answers."""

    max_new_tokens: int

    def examples(self) -> Sequence[Example]: ...
    def score(self, example: Example, answer: str) -> Score: ...
    def summarise(self, scores: Sequence[Score]) -> dict[str, float]: ...
