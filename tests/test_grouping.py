"""Batches of alike samples, against the original's algorithm worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llava_kit.contracts import ImageSlot, Sample, Turn
from llava_kit.grouping import Grouping, even_chunks, grouped, lengths_tensor, signed_length
from llava_kit.order import Order


def in_order(_purpose: str, size: int) -> torch.Tensor:
    return torch.arange(size)


def backwards(_purpose: str, size: int) -> torch.Tensor:
    return torch.arange(size).flip(0)


@pytest.mark.parametrize(
    ("indices", "lengths", "count", "chunks"),
    [
        ([0, 1, 2, 3, 4, 5], [10, 9, 8, 3, 2, 1], 2, [[0, 3, 4], [1, 2, 5]]),  # the original's own
        ([0, 1, 2, 3, 4], [10, 9, 8, 3, 2], 2, [[0, 2, 4], [1, 3]]),  # the original's own: not even, every second
        # 7 -> a, 6 -> b, 5 -> b (6 < 7), b is full, 1 -> a
        ([3, 2, 1, 0], [1, 5, 6, 7], 2, [[3, 0], [2, 1]]),
        ([4, 7], [0] * 8, 2, [[4], [7]]),
        ([1], [3, 3], 4, [[1], [], [], []]),
    ],
)
def test_even_chunks(indices: list[int], lengths: list[int], count: int, chunks: list[list[int]]) -> None:
    assert even_chunks(indices, lengths, count) == chunks


def test_samples_of_one_kind_are_grouped_by_length() -> None:
    # Batches as they come are [0 1 2 3] and [4 5]; each longest first: 3 1 2 0 and 5 4; dealt out to two chunks:
    # 9 -> a, 8 -> b, 4 -> b (8 < 9, b full), 2 -> a.
    lengths = [2, 8, 4, 9, 5, 6]
    assert grouped(lengths, 4, 2, in_order) == [3, 0, 1, 2, 5, 4]
    assert grouped([-length for length in lengths], 4, 2, in_order) == [3, 0, 1, 2, 5, 4], "the sign is no length"


def test_batches_do_not_mix_kinds_until_the_last_two() -> None:
    # With images: 0 2 4 6 8 in batches of two: [0 2] [4 6] [8]; longest first [2 0] [6 4] [8].
    # Text: 1 3 5 7: [1 3] [5 7]; longest first [3 1] [7 5].  Set aside: [8] and the full [7 5].
    lengths = [1, -1, 2, -2, 3, -3, 4, -4, 5]
    assert grouped(lengths, 2, 1, in_order) == [2, 0, 6, 4, 3, 1, 5, 7, 8]
    # Backwards: images [8 6] [4 2] [0], text [7 5] [3 1]; batches [8 6] [4 2] [7 5] in reverse; aside 0 and 1 3.
    assert grouped(lengths, 2, 1, backwards) == [7, 5, 4, 2, 8, 6, 0, 1, 3]


@pytest.mark.parametrize("count", [1, 7, 16, 61, 200])
def test_every_sample_comes_once_and_only_the_tail_mixes(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = [int(n) or 1 for n in torch.randint(-90, 300, (count,), generator=generator)]

    def permute(_purpose: str, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)

    order = grouped(lengths, 8, 4, permute)
    assert sorted(order) == list(range(count))
    batches = [order[start : start + 8] for start in range(0, count, 8)]
    mixed = [number for number, batch in enumerate(batches) if len({lengths[index] > 0 for index in batch}) > 1]
    assert all(number >= len(batches) - 3 for number in mixed), "at most two batches' worth, which may touch three"


def test_lengths_are_counted_as_the_original_does() -> None:
    """Words of all messages, the placeholder being one; 128 more with an image; negative without."""
    turns = (Turn("human", (ImageSlot(0), "\nWhat is this?")), Turn("assistant", ("A red  cat.",)))
    assert signed_length(Sample(id="a", turns=turns, images=(Path("a.png"),))) == 4 + 3 + 128
    text = (Turn("human", ("Name a colour.",)), Turn("assistant", ("Blue.",)))
    assert signed_length(Sample(id="b", turns=text)) == -4
    assert signed_length(Sample(id="c", turns=(Turn("human", ("",)), Turn("assistant", ("",))))) == -1, "never 0"


def make_order(seed: int = 0, shares: Sequence[float | None] = (None, None)) -> Order:
    lengths = {"pictures": lengths_tensor(range(130, 190)), "texts": lengths_tensor([-n for n in range(1, 31)])}
    return Order(
        seed=seed,
        stage="tune",
        lengths={name: len(own) for name, own in lengths.items()},
        shares=dict(zip(lengths, shares, strict=True)),
        held_out=9,
        grouping=Grouping(lengths=lengths, batch_size=8, micro_batch_size=2),
    )


def test_a_grouped_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    order = make_order()
    whole = [order.positions(epoch, 0, order.epoch_size) for epoch in range(3)]
    torch.manual_seed(99)  # the original draws from the global generator
    assert [make_order().positions(epoch, 0, 81) for epoch in range(3)] == whole
    assert make_order().positions(2, 16, 24) == whole[2][16:24], "going on in the middle"
    assert whole[0] != whole[1]
    assert make_order(seed=1).positions(0, 0, 81) != whole[0]
    assert all(set(epoch) == set(whole[0]) and len(set(epoch)) == 81 for epoch in whole)
    assert not set(order.held_out) & set(whole[0])


def test_steps_have_one_kind_and_micro_batches_similar_lengths() -> None:
    order = make_order(shares=(0.5, 0.5))
    positions = order.positions(0, 0, order.epoch_size)
    steps = [positions[start : start + 8] for start in range(0, len(positions), 8)]
    assert all(len({position.source for position in step}) == 1 for step in steps[:-2])
    kinds = [step[0].source for step in steps[:-2]]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True)), "batches of both kinds are shuffled"
