"""Connectors that treat every patch row alone: one linear layer (LLaVA), and an MLP (LLaVA-1.5)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llava_kit import hookimpl
from llava_kit.contracts import Unsupported, is_meta_build
from llava_kit.errors import ModelError, Problem
from llava_kit.weights import stored_in

if TYPE_CHECKING:
    from llava_kit.contracts import Layout
    from llava_kit.hookspecs import Register


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """One linear layer with bias, as in LLaVA v1."""

    weights: str | None = None
    """A folder with its starting values, as ``llava-kit import`` writes it; random ones if unset."""

    @classmethod
    def from_hf(cls, folder: Path) -> LinearConfig | Unsupported:
        """For an ``mm_projector`` of one layer."""
        if _projector_depth(folder) != 1:
            return Unsupported("it has one layer")
        return cls(weights=str(folder))


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Linear layers with exact GELU between them; two of them are LLaVA-1.5's ``mlp2x_gelu``."""

    depth: int = 2
    """Linear layers in all."""
    weights: str | None = None
    """A folder with its starting values, as ``llava-kit import`` writes it; random ones if unset."""

    def __post_init__(self) -> None:
        if not 2 <= self.depth <= 16:
            raise ValueError(f"depth must be between 2 and 16, got {self.depth}; for one layer use 'linear'")

    @classmethod
    def from_hf(cls, folder: Path) -> MlpConfig | Unsupported:
        """For an ``mm_projector`` of several layers."""
        depth = _projector_depth(folder)
        if depth is None or not 2 <= depth <= 16:
            return Unsupported("it has 2 to 16 layers with GELU between them")
        return cls(depth=depth, weights=str(folder))


def _projector_depth(folder: Path) -> int | None:
    kind = str(json.loads((folder / "config.json").read_text("utf-8")).get("mm_projector_type"))
    if kind == "linear":
        return 1
    named = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    return int(named[1]) if named else None


class PerTokenConnector(nn.Module):
    """``in_dim -> out_dim -> … -> out_dim``, each row alone, with torch's default initialisation as in the original.

    Layers are numbered as in the original's ``mm_projector`` of an MLP: Linear 0, GELU 1, Linear 2, …
    """

    per_token = True

    def __init__(self, in_dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*layers)

    @property
    def final(self) -> nn.Linear:
        """The last layer, which the splice fuses with the copy."""
        return cast(nn.Linear, self.layers[-1])

    def num_tokens(self, layout: Layout) -> int:
        """One row per patch."""
        return layout.tiles * layout.grid_h * layout.grid_w

    def hidden(self, features_NPK: Tensor, layout: Layout, text: Any = None) -> Tensor:
        """Everything before the last layer: nothing for ``linear``."""
        for layer in self.layers[:-1]:
            features_NPK = layer(features_NPK)
        return features_NPK

    def forward(self, features_NPK: Tensor, layout: Layout, text: Any = None) -> Tensor:
        """``[N, P, in_dim] -> [N, P, out_dim]``."""
        return cast(Tensor, self.final(self.hidden(features_NPK, layout, text)))

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As the original's ``mm_projector``: one layer is that layer itself, several are numbered."""
        depth = (len(self.layers) + 1) // 2
        first = cast(nn.Linear, self.layers[0])
        config = {
            "mm_projector_type": "linear" if depth == 1 else f"mlp{depth}x_gelu",
            "in_dim": first.in_features,
            "out_dim": first.out_features,
        }
        return config, dict((first if depth == 1 else self.layers).state_dict())


def build_linear(config: LinearConfig, *, in_dim: int, out_dim: int) -> PerTokenConnector:
    """A single layer."""
    return _started(PerTokenConnector(in_dim, out_dim, depth=1), config.weights)


def build_mlp(config: MlpConfig, *, in_dim: int, out_dim: int) -> PerTokenConnector:
    """``config.depth`` layers."""
    return _started(PerTokenConnector(in_dim, out_dim, config.depth), config.weights)


def _started(connector: PerTokenConnector, folder: str | None) -> PerTokenConnector:
    """The connector with the values of ``folder``, in their dtype.

    Raises:
        ModelError: the folder does not hold exactly this connector's tensors.
    """
    if folder is None or is_meta_build():
        return connector
    module = connector.layers if len(connector.layers) > 1 else connector.layers[0]
    try:
        module.load_state_dict({name: one.read() for name, one in stored_in(Path(folder)).items()}, assign=True)
    except RuntimeError as error:
        what = f"does not fit: {' '.join(str(error).split())}"
        raise ModelError(Problem(f"model.connector.weights ({folder})", what)) from error
    return connector


@hookimpl
def register_connectors(register: Register) -> None:
    """``linear`` and ``mlp``."""
    register("linear", build_linear, LinearConfig)
    register("mlp", build_mlp, MlpConfig)
