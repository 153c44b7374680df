from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_kit import splice_backends
from llava_kit.contracts import SplicePlan
from llava_kit.errors import ResourceError
from llava_kit.plan import text_segments, uniform_block
from llava_kit.splice import is_plain_linear, project_and_splice
from llava_kit.splice_dispatch import DISPATCHER, Dispatcher, describe_choice


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


# --- the operator ----------------------------------------------------------------------------------------------------


MIXED = ([-1, 0, 1, -1, 3, 4], [2, 0, 2, 2, -1], [2, 5, 6, 7, 8], (1, 9))
"""Two images in one sequence, class rows, padding, and an id that stands in several rows."""


def operands(dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    table = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    return features, nn.Linear(4, 5, bias=bias, dtype=dtype), table


def flat(features: Tensor, final: nn.Linear | None, table: Tensor, chosen: SplicePlan) -> tuple[object, ...]:
    """The arguments of the operator itself."""
    weight, bias = (None, None) if final is None else (final.weight, final.bias)
    return (
        features, weight, bias, table, chosen.vis_dst_V, chosen.txt_id_S, chosen.txt_dst_S, chosen.seg_order_S,
        chosen.seg_start, chosen.seg_uid, list(chosen.mask_BT.shape), list(chosen.uniform), table.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_is_right(bias: bool) -> None:
    features, final, table = operands(torch.float64, bias=bias)
    chosen = plan(*MIXED)

    def splice(features: Tensor, table: Tensor, *parameters: Tensor) -> Tensor:
        return torch.ops.llava_kit.project_and_splice(
            features, parameters[0], parameters[1] if bias else None, table, *flat(features, final, table, chosen)[4:]
        )

    assert torch.autograd.gradcheck(splice, (features, table, *final.parameters()))


def test_rows_that_are_projected_already_have_gradients() -> None:
    table = operands(torch.float64)[2]
    chosen = plan(*MIXED)
    wide = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one, two: project_and_splice(one, None, two, chosen), (wide, table))


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_keeps_the_rules_of_operators(bias: bool) -> None:
    features, final, table = operands(torch.float32, bias=bias)
    torch.library.opcheck(torch.ops.llava_kit.project_and_splice.default, flat(features, final, table, plan(*MIXED)))


@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 4, [False, True, True, False]])
def test_the_backward_operator_keeps_them_too(wanted: list[bool]) -> None:
    features, final, table = operands(torch.float32)
    chosen = plan(*MIXED)
    out = project_and_splice(features, final, table, chosen)
    hidden, weight, bias, _, *maps = (
        one.detach() if isinstance(one, Tensor) else one for one in flat(features, final, table, chosen)
    )
    arguments = (torch.ones_like(out), hidden, weight, bias, *maps[:6], list(chosen.uniform), wanted, 3, table.dtype)
    operator = torch.ops.llava_kit.project_and_splice_backward.default
    torch.library.opcheck(operator, arguments)
    assert [one.numel() > 0 for one in operator(*arguments)] == wanted


def test_the_operator_compiles_as_one_graph() -> None:
    features, final, table = operands(torch.float32)
    chosen = plan(*MIXED)

    def loss() -> Tensor:
        return project_and_splice(features, final, table, chosen).square().sum()

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [features, table, *final.parameters()])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), loss())
    for one, other in zip(gradients(compiled()), gradients(loss()), strict=True):
        assert torch.equal(one, other)


def test_autocast_projects_in_low_precision_and_leaves_the_table_alone() -> None:
    features, final, table = operands(torch.float32)
    chosen = plan(*MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        out = project_and_splice(features, final, table, chosen)
        low = final(features)
    assert out.dtype == torch.float32 and low.dtype == torch.bfloat16
    assert torch.equal(out[0, 0], low[1].float()) and torch.equal(out[0, 2], table[2])
    out.sum().backward()
    assert final.weight.grad is not None and final.weight.grad.dtype == torch.float32
    assert table.grad is not None and table.grad[2].tolist() == [3.0] * 5


def test_the_result_may_have_another_dtype_than_the_table() -> None:
    features, final, table = operands(torch.float32)
    out = project_and_splice(features.bfloat16(), final.bfloat16(), table, plan(*MIXED), torch.bfloat16)
    assert out.dtype == torch.bfloat16 and torch.equal(out[0, 2], table[2].bfloat16())
    out.sum().backward()
    assert table.grad is not None and table.grad.dtype == torch.float32


class Dispatched(TorchDispatchMode):
    """Lists the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **kwargs or {})


def test_forward_is_one_operator_and_frozen_parts_cost_nothing_backward() -> None:
    features, final, table = operands(torch.float32)
    features.requires_grad_(False)
    table.requires_grad_(False)
    chosen = plan(*MIXED)
    with Dispatched() as seen:
        out = project_and_splice(features, final, table, chosen)
    assert seen.names == ["project_and_splice.default"]
    out.sum().backward()
    assert features.grad is None and table.grad is None and final.weight.grad is not None


# --- backends and their choice ---------------------------------------------------------------------------------------

UNIFORM = ([-1, 1, 2, -1, 6, 7], [2, 0, 2, 0, 1, -1], [0, 3, 4, 5, 8, 9], (2, 5))


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    yield DISPATCHER
    DISPATCHER.configure("auto", torch.device("cpu"))


@pytest.mark.parametrize("bias", [True, False])
def test_strided_gives_what_the_reference_gives(dispatcher: Dispatcher, bias: bool) -> None:
    features, final, table = operands(torch.float64, bias=bias)
    chosen = plan(*UNIFORM)
    assert chosen.uniform == (1, 1, 2)
    results = []
    for name in ("reference", "strided"):
        dispatcher.configure(name, torch.device("cpu"))
        out = project_and_splice(features, final, table, chosen)
        weights = torch.linspace(0, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [features, table, *final.parameters()])])
        assert describe_choice() == {"backend": name, "chosen": {"cpu": name}}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_strided_refuses_what_it_cannot_do(dispatcher: Dispatcher) -> None:
    features, final, table = operands(torch.float32)
    dispatcher.configure("strided", torch.device("cpu"))
    with pytest.raises(ResourceError, match="'strided' is not available: the sequences of this batch are not laid out"):
        project_and_splice(features, final, table, plan(*MIXED))
    with pytest.raises(ResourceError, match="no plain linear layer"):
        project_and_splice(features @ torch.ones(4, 5), None, table, plan(*UNIFORM))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU can run on this one")
@pytest.mark.parametrize("name", ["triton", "cublas_scatter"])
def test_a_backend_that_needs_a_gpu_is_refused_without_one(dispatcher: Dispatcher, name: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ResourceError) as caught:
        dispatcher.configure(name, torch.device("cpu"))
    assert f"splice.backend: '{name}' is not available: there is no CUDA device" in str(caught.value)
    assert "splice.backend=auto" in str(caught.value)


def test_a_gpu_is_not_asked_how_many_rows_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way taken on a GPU, where nothing may depend on values, gives the same."""
    features, final, table = operands(torch.float64)

    def everything() -> list[Tensor]:
        out = project_and_splice(features, final, table, plan(*MIXED))
        return [out, *torch.autograd.grad(out.square().sum(), [features, table, *final.parameters()])]

    expected = everything()
    monkeypatch.setattr(splice_backends, "chosen_rows", lambda rows, chosen, spare: rows.where(chosen, spare).long())
    assert all(torch.equal(one, other) for one, other in zip(everything(), expected, strict=True))


def test_the_choice_is_logged_once(dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture) -> None:
    features, final, table = operands(torch.float32)
    dispatcher.configure("auto", torch.device("cpu"))
    with caplog.at_level("INFO", "llava_kit.splice_dispatch"):
        for _ in range(3):
            project_and_splice(features, final, table, plan(*MIXED))
    assert caplog.messages == ["splice: reference for cpu (no GPU)"]


def test_a_choice_of_an_earlier_run_is_kept(dispatcher: Dispatcher) -> None:
    features, final, table = operands(torch.float32)
    dispatcher.configure("auto", torch.device("cpu"), {"cpu": "strided"})
    with pytest.raises(ResourceError, match="strided"):
        project_and_splice(features, final, table, plan(*MIXED))


# --- what the collator adds ------------------------------------------------------------------------------------------


def test_segments_sort_text_rows_by_id_and_leave_padding_out() -> None:
    order, start, uid = text_segments(torch.tensor([7, -1, 3, 7, -1, 3, 9], dtype=torch.int32))
    assert (start.tolist(), uid.tolist()) == ([2, 4, 6, 7], [3, 7, 9])
    assert order.tolist() == [1, 4, 2, 5, 0, 3, 6]
    assert {one.dtype for one in (order, start, uid)} == {torch.int32}
    assert [one.tolist() for one in text_segments(torch.zeros(0, dtype=torch.int32))] == [[], [0], []]
    assert [one.tolist() for one in text_segments(torch.tensor([-1], dtype=torch.int32))] == [[0], [1], []]


@pytest.mark.parametrize(
    ("vis_dst", "expected"),
    [
        ([1, 2, 6, 7], (1, 0, 2)),
        ([-1, 1, 2, -1, 6, 7], (1, 1, 2)),
        ([1, 2, 7, 8], ()),  # another place in the second sequence
        ([1, 3, 6, 8], ()),  # a hole in the block
        ([1, 2, 6], ()),  # unequal numbers
        ([1, -1, 6, -1], ()),  # a dropped row inside
        ([-1, -1], ()),
        ([], ()),
    ],
)
def test_uniform_layouts_are_told_from_others(vis_dst: list[int], expected: tuple[int, ...]) -> None:
    assert uniform_block(vis_dst, 2, 5) == expected
