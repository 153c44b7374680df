"""Connectors that treat every patch row alone: one linear layer (LLaVA), and an MLP (LLaVA-1.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llava_kit import hookimpl

if TYPE_CHECKING:
    from llava_kit.contracts import Layout
    from llava_kit.hookspecs import Register


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """One linear layer with bias, as in LLaVA v1."""


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Linear layers with exact GELU between them; two of them are LLaVA-1.5's ``mlp2x_gelu``."""

    depth: int = 2
    """Linear layers in all."""

    def __post_init__(self) -> None:
        if not 2 <= self.depth <= 16:
            raise ValueError(f"depth must be between 2 and 16, got {self.depth}; for one layer use 'linear'")


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


def build_linear(config: LinearConfig, *, in_dim: int, out_dim: int) -> PerTokenConnector:
    """A single layer."""
    return PerTokenConnector(in_dim, out_dim, depth=1)


def build_mlp(config: MlpConfig, *, in_dim: int, out_dim: int) -> PerTokenConnector:
    """``config.depth`` layers."""
    return PerTokenConnector(in_dim, out_dim, config.depth)


@hookimpl
def register_connectors(register: Register) -> None:
    """``linear`` and ``mlp``."""
    register("linear", build_linear, LinearConfig)
    register("mlp", build_mlp, MlpConfig)
