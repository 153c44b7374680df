"""The splice's backends on a GPU: against float64, twice, and inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from splice_cases import CASES, computed, errors, exact, make_maps, make_numbers, poisoned_memory, to_device

from llava_kit.splice_dispatch import DISPATCHER, Dispatcher, make_backend

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    yield DISPATCHER
    DISPATCHER.configure("auto", torch.device("cpu"))


@pytest.mark.parametrize("name", ["triton", "cublas_scatter", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_twice(case: str, dtype: torch.dtype, name: str) -> None:
    maps = to_device(make_maps(CASES[case], vocabulary=17), "cuda")
    numbers = make_numbers(maps, dtype, k=128, d=192)
    with poisoned_memory():
        first, second = (computed(make_backend(name), numbers, maps) for _ in range(2))
    assert max(errors(first, exact(numbers, maps))) < TOLERANCE[dtype]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["triton", "cublas_scatter", "reference"])
def test_a_cuda_graph_replays_it(name: str) -> None:
    maps = to_device(make_maps(CASES["class rows"], vocabulary=17), "cuda")
    numbers = make_numbers(maps, torch.bfloat16, k=128, d=192)
    expected = computed(make_backend(name), numbers, maps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # anything that asks the device for a value fails here
        found = computed(make_backend(name), numbers, maps)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_the_fastest_is_chosen_and_kept(dispatcher: Dispatcher) -> None:
    maps = to_device(make_maps(CASES["class rows"], vocabulary=17), "cuda")
    numbers = make_numbers(maps, torch.bfloat16, k=128, d=192)
    dispatcher.configure("auto", torch.device("cuda"))
    name = dispatcher.pick(numbers.visual, numbers.table, maps, torch.bfloat16)
    assert list(dispatcher.chosen.values()) == [name]
    assert dispatcher.picked(numbers.visual, torch.bfloat16, bool(maps.uniform)) == name
