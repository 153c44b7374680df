from __future__ import annotations

import pytest
import torch

from llava_kit.contracts import Layout
from llava_kit_plugins.connectors import LinearConfig, MlpConfig, build_linear, build_mlp


@pytest.mark.parametrize(("width", "count"), [(4096, 4_198_400), (5120, 5_248_000)])
def test_linear_has_the_published_number_of_parameters(width: int, count: int) -> None:
    with torch.device("meta"):
        connector = build_linear(LinearConfig(), in_dim=1024, out_dim=width)
    assert sum(p.numel() for p in connector.parameters()) == count


@pytest.mark.parametrize(("width", "count"), [(4096, 20_979_712), (5120, 31_467_520)])
def test_mlp_has_the_published_number_of_parameters(width: int, count: int) -> None:
    with torch.device("meta"):
        connector = build_mlp(MlpConfig(), in_dim=1024, out_dim=width)
    assert sum(p.numel() for p in connector.parameters()) == count


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_forward_is_final_after_hidden(depth: int) -> None:
    torch.manual_seed(0)
    layout = Layout(grid_h=2, grid_w=2, prefix_tokens=1)
    linear = build_linear(LinearConfig(), in_dim=3, out_dim=4)
    connector = linear if depth == 1 else build_mlp(MlpConfig(depth=depth), in_dim=3, out_dim=4)
    features = torch.randn(2, 5, 3)
    expected = connector.final(connector.hidden(features, layout))
    assert torch.equal(connector(features, layout), expected)
    assert expected.shape == (2, 5, 4)
    assert connector.num_tokens(layout) == 4


def test_names_are_those_of_the_original_mlp() -> None:
    connector = build_mlp(MlpConfig(depth=3), in_dim=3, out_dim=4)
    names = [f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert [name for name, _ in connector.named_parameters()] == names


def test_an_mlp_of_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be between 2 and 16, got 1; for one layer use 'linear'"):
        MlpConfig(depth=1)
