"""The splice's kernels, run by Triton's interpreter on the CPU and held against float64.

Triton decides when it is imported whether it interprets, so this file does nothing in an ordinary run;
``test_splice_kernels.py`` runs it in a process of its own with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from splice_cases import CASES, Case, computed, errors, everything, exact, make_maps, make_numbers, poisoned_memory
from torch import Tensor

from llava_kit.splice_backends import Backend

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 2**-7}
"""Largest error as a part of the largest value: one rounding of the result, which is all there should be.  The
interpreter cuts bf16 off instead of rounding it, which is an error twice as large."""


def backends() -> list[Backend]:
    from llava_kit.splice_triton import CublasScatter, TritonFused

    return [TritonFused(), CublasScatter()]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that small operands have several, cut off at every edge."""
    from llava_kit import splice_kernels, splice_triton

    small = splice_kernels.Config(32, 32, 16, warps=4, stages=2)
    monkeypatch.setattr(splice_kernels, "config_for", lambda *_: small)
    monkeypatch.setattr(splice_triton, "COLS", 32)
    monkeypatch.setattr(splice_triton, "TABLE_COLS", 32)
    monkeypatch.setattr(splice_triton, "BIAS_COLS", 32)


@pytest.mark.parametrize("which", [0, 1], ids=["triton", "cublas_scatter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient(name: str, dtype: torch.dtype, which: int) -> None:
    maps = make_maps(CASES[name], vocabulary=17)
    numbers = make_numbers(maps, dtype)
    found = computed(backends()[which], numbers, maps)
    assert max(errors(found, exact(numbers, maps))) < TOLERANCE[dtype]


@pytest.mark.parametrize(("k", "d"), [(1, 1), (16, 32), (33, 65), (48, 31)])
@pytest.mark.parametrize("which", [0, 1], ids=["triton", "cublas_scatter"])
def test_any_width(k: int, d: int, which: int) -> None:
    maps = make_maps(CASES["two images, first and last"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32, k, d)
    assert max(errors(computed(backends()[which], numbers, maps), exact(numbers, maps))) < TOLERANCE[torch.float32]


def test_rows_in_several_slabs() -> None:
    maps = make_maps(Case(((20, "i"), (1, "i", "i")), patches=150, dropped=1), vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    from llava_kit.splice_triton import count_slabs

    assert count_slabs(tiles=4, rows=453, step=16, processors=132) > 1
    assert count_slabs(tiles=132, rows=9216, step=64, processors=132) == 1
    assert max(errors(computed(backends()[0], numbers, maps), exact(numbers, maps))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("which", [0, 1], ids=["triton", "cublas_scatter"])
def test_rows_that_are_projected_already(which: int) -> None:
    maps = make_maps(CASES["two images, first and last"], vocabulary=17)
    numbers = make_numbers(maps, torch.bfloat16, layer=False)
    out_RD, *gradients = computed(backends()[which], numbers, maps)
    expected_RD, *expected = exact(numbers, maps)
    assert out_RD is not None and expected_RD is not None and torch.equal(out_RD.double(), expected_RD)
    assert max(errors(tuple(gradients), tuple(expected))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_rows_are_bit_exact_and_padding_is_zero(dtype: torch.dtype) -> None:
    maps = make_maps(CASES["class rows"], vocabulary=17)
    numbers = make_numbers(maps, dtype)
    for backend in backends():
        out_RD = backend.forward(numbers.visual, numbers.table, maps, dtype)
        for id_, row in zip(maps.txt_id_S.tolist(), maps.txt_dst_S.tolist(), strict=True):
            assert torch.equal(out_RD[row], numbers.table[id_] if id_ >= 0 else torch.zeros_like(out_RD[row]))


def test_a_float32_table_makes_bfloat16_rows_and_gets_a_float32_gradient() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.bfloat16)
    numbers = replace(numbers, table=torch.randn(17, 40))
    expected = exact(numbers, maps)
    for backend in backends():
        out_RD = backend.forward(numbers.visual, numbers.table, maps, torch.bfloat16)
        assert out_RD.dtype == torch.bfloat16
        gradients = backend.backward(numbers.grad_RD, numbers.visual, maps, everything(numbers.table))
        assert max(errors((out_RD, *gradients), expected)) < TOLERANCE[torch.bfloat16]
        d_table = gradients[3]
        assert d_table is not None and d_table.dtype == torch.float32


def test_without_a_bias_and_with_rows_that_are_not_contiguous() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    wide = torch.randn(maps.vis_dst_V.shape[0], 50)
    visual = replace(numbers.visual, hidden_VK=wide[:, 3:27], bias_D=None)
    for backend in backends():
        out_RD = backend.forward(visual, numbers.table, maps, torch.float32)
        expected_RD = exact(replace(numbers, visual=visual), maps)[0]
        assert max(errors((out_RD,), (expected_RD,))) < TOLERANCE[torch.float32]


def test_only_what_is_wanted_is_computed() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    none = replace(everything(numbers.table), hidden=False, weight=False, bias=False, table=False)
    expected = exact(numbers, maps)[1:]
    for backend in backends():
        for index, name in enumerate(("hidden", "weight", "bias", "table")):
            gradients = backend.backward(numbers.grad_RD, numbers.visual, maps, replace(none, **{name: True}))
            assert [one is not None for one in gradients] == [other == index for other in range(4)]
            assert max(errors((gradients[index],), (expected[index],))) < TOLERANCE[torch.float32]


def test_a_table_of_the_text_rows_themselves() -> None:
    """As for models whose embedding is no plain look-up; rows of padding have no gradient."""
    maps = make_maps(CASES["padded"], vocabulary=17)
    count = maps.txt_id_S.shape[0]
    own = torch.arange(count + 1, dtype=torch.int32)
    ids_S = torch.where(maps.txt_id_S < 0, maps.txt_id_S, own[:-1])
    maps = replace(maps, txt_id_S=ids_S, seg_order_S=own[:-1], seg_start=own, seg_uid=own[:-1])
    numbers = replace(make_numbers(maps, torch.float32), table=torch.randn(count, 40))
    for backend in backends():
        found = computed(backend, numbers, maps)
        assert max(errors(found, exact(numbers, maps))) < TOLERANCE[torch.float32]
        d_table = found[4]
        assert d_table is not None and bool((d_table[ids_S < 0] == 0).all())


def test_two_runs_are_bit_equal() -> None:
    maps = make_maps(CASES["several tiles"], vocabulary=17)
    numbers = make_numbers(maps, torch.bfloat16)
    for backend in backends():
        first, second = computed(backend, numbers, maps), computed(backend, numbers, maps)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # type: ignore[arg-type]


# --- the suite above must be able to fail ----------------------------------------------------------------------------


def test_a_wrong_map_shows() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    swapped_V = maps.vis_dst_V.clone()
    swapped_V[[0, 1]] = swapped_V[[1, 0]]
    for backend in backends():
        found = computed(backend, numbers, replace(maps, vis_dst_V=swapped_V))
        assert min(errors(found[:3], exact(numbers, maps)[:3])) > 1e-2, "output, hidden rows and weight are all wrong"


def test_a_dropped_row_shows() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    lost_V = maps.vis_dst_V.clone()
    lost_V[-1] = -1
    for backend in backends():
        out_RD = backend.forward(numbers.visual, numbers.table, replace(maps, vis_dst_V=lost_V), torch.float32)
        assert int(out_RD.isnan().any(1).sum()) == 1, "the row that nobody wrote keeps its poison"


def test_a_wrong_stride_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    wide = torch.randn(maps.vis_dst_V.shape[0], 50)
    visual = replace(numbers.visual, hidden_VK=wide[:, :24])
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self)  # rows are 50 apart, the kernel believes 24
    found = backends()[0].forward(visual, numbers.table, maps, torch.float32)
    monkeypatch.undo()
    assert max(errors((found,), exact(replace(numbers, visual=visual), maps)[:1])) > 1e-2


def test_a_wrong_segment_shows() -> None:
    maps = make_maps(CASES["padded"], vocabulary=17)
    numbers = make_numbers(maps, torch.float32)
    wrong = replace(maps, seg_order_S=maps.seg_order_S.roll(1))
    for backend in backends():
        found = computed(backend, numbers, wrong)
        assert errors(found[4:], exact(numbers, maps)[4:])[0] > 1e-2
