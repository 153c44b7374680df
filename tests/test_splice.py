from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llava_kit.contracts import SplicePlan
from llava_kit.plan import text_segments, uniform_block
from llava_kit.splice import is_plain_linear, project_and_splice


def plan(vis_dst: list[int], txt_id: list[int], txt_dst: list[int], shape: tuple[int, int]) -> SplicePlan:
    ints = {"dtype": torch.int32}
    order_S, start, uid = text_segments(torch.tensor(txt_id, **ints))
    return SplicePlan(
        vis_dst_V=torch.tensor(vis_dst, **ints),
        txt_id_S=torch.tensor(txt_id, **ints),
        txt_dst_S=torch.tensor(txt_dst, **ints),
        seg_order_S=order_S,
        seg_start=start,
        seg_uid=uid,
        uniform=uniform_block(vis_dst, *shape),
        label_row_L=torch.zeros(0, **ints),
        label_id_L=torch.zeros(0, **ints),
        mask_BT=torch.ones(shape, dtype=torch.bool),
        lengths=(shape[1],) * shape[0],
        label_counts=(0,) * shape[0],
    )


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


def test_visual_rows_are_projected_and_text_rows_looked_up() -> None:
    final = linear([[10.0], [100.0]], [0.0, 1.0])
    table = torch.tensor([[7.0, 7.0], [8.0, 8.0]])
    # Sequence 0: text 1, image rows 1 and 2, text 0.  Sequence 1: two text rows, then padding.
    # The first visual row is a class token and goes nowhere.
    chosen = plan([-1, 1, 2], [1, 0, 0, 1, -1, -1], [0, 3, 4, 5, 6, 7], (2, 4))
    out = project_and_splice(torch.tensor([[9.0], [1.0], [2.0]]), final, table, chosen)
    assert out.tolist() == [[[8, 8], [10, 101], [20, 201], [7, 7]], [[7, 7], [8, 8], [0, 0], [0, 0]]]


def test_gradients_reach_features_weight_bias_and_table() -> None:
    torch.manual_seed(0)
    chosen = plan([1, -1, 3], [2, 0, 2], [0, 2, 4], (1, 5))
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    final = nn.Linear(4, 2).double()
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def splice(features: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        layer = nn.Linear(4, 2).double()
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        return project_and_splice(features, layer, table, chosen)

    weight = final.weight.detach().requires_grad_()
    bias = final.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(splice, (features, weight, bias, table))
    splice(features, weight, bias, table).sum().backward()
    assert features.grad is not None and features.grad[1].abs().sum() == 0, "a dropped row learns nothing"
    assert table.grad is not None and table.grad[2].tolist() == [2.0, 2.0], "id 2 stands in two rows"
    assert table.grad[1].tolist() == [0.0, 0.0], "id 1 stands nowhere"


def test_a_batch_without_images_keeps_the_projection_in_the_graph() -> None:
    final = nn.Linear(4, 2)
    out = project_and_splice(torch.zeros(0, 4), final, torch.ones(3, 2), plan([], [1, 2], [0, 1], (1, 2)))
    out.sum().backward()
    assert final.weight.grad is not None and final.weight.grad.abs().sum() == 0


def test_text_rows_are_bit_exact_in_half_precision() -> None:
    table = torch.randn(5, 8).to(torch.bfloat16)
    out = project_and_splice(torch.zeros(0, 4), nn.Linear(4, 8), table, plan([], [4, 0], [0, 1], (1, 2)))
    assert torch.equal(out[0], table[[4, 0]])


class Adapter(nn.Linear):
    """Has a weight, but means something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


def test_an_adapter_is_called_and_not_read() -> None:
    adapter = Adapter(1, 2)
    adapter.weight.data.zero_()
    adapter.bias.data.zero_()
    out = project_and_splice(torch.zeros(1, 1), adapter, torch.zeros(1, 2), plan([0], [], [], (1, 1)))
    assert out.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hooked_layer_is_called_and_not_read(hook: str) -> None:
    layer = nn.Linear(2, 2)
    assert is_plain_linear(layer)
    getattr(layer, hook)(lambda *_: None)
    assert not is_plain_linear(layer)
