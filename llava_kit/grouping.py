"""Batches of alike samples: all with images or none, and of similar length, as LLaVA-1.5's second stage has them.

The order is the original's, except that all its random choices come from the run's seed: a pure function of the
permutations it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_kit.contracts import ImageSlot, Sample

IMAGE_WORDS = 128
"""What an image adds to the length of a sample."""

Permute = Callable[[str, int], Tensor]
"""A random permutation of so many items for a purpose."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What samples are grouped by.

    ``lengths`` has for every source what :func:`signed_length` says of each of its samples.
    """

    lengths: Mapping[str, Tensor]
    batch_size: int
    micro_batch_size: int

    def order(self, lengths: Sequence[int], permute: Permute) -> list[int]:
        """The indices of samples of these signed lengths, batch after batch."""
        return grouped(lengths, self.batch_size, self.batch_size // self.micro_batch_size, permute)


def signed_length(sample: Sample) -> int:
    """Words of all turns, places of images among them, and 128 with images; negative for samples of text only."""
    words = 0
    for turn in sample.turns:
        text = "".join("<image>" if isinstance(part, ImageSlot) else part for part in turn.parts)
        words += len(text.split())
    return words + IMAGE_WORDS if sample.images else -max(1, words)


def grouped(lengths: Sequence[int], batch_size: int, chunks: int, permute: Permute) -> list[int]:
    """Indices in an order whose every ``batch_size`` belong together; ``lengths`` are negative for text only.

    The last batch of each kind is set aside, also a full one: these two come last, mixed, in the order of their
    indices.  A batch is cut into ``chunks`` micro-batches of about the same length in all.
    """
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    text_only = [index for index, length in enumerate(lengths) if length <= 0]
    if not with_image or not text_only:
        return _by_length(list(map(abs, lengths)), batch_size, chunks, permute("samples", len(lengths)))
    batches: list[list[int]] = []
    tail: list[int] = []
    for kind, members in (("with image", with_image), ("text only", text_only)):
        own = [abs(lengths[index]) for index in members]
        ordered = [members[place] for place in _by_length(own, batch_size, chunks, permute(kind, len(own)))]
        cut = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
        batches += cut[:-1]
        tail += cut[-1]
    shuffled = permute("batches", len(batches)).tolist()
    return [index for place in shuffled for index in batches[place]] + sorted(tail)


def _by_length(lengths: Sequence[int], batch_size: int, chunks: int, shuffled: Tensor) -> list[int]:
    """Random batches, each longest first and then dealt out to chunks."""
    order: list[int] = []
    for batch in shuffled.split(batch_size):
        longest_first = sorted(batch.tolist(), key=lambda index: -lengths[index])
        order += [index for chunk in even_chunks(longest_first, lengths, chunks) for index in chunk]
    return order


def even_chunks(indices: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """``indices`` dealt out to ``count`` chunks, each to the shortest that is not full; every so many where it does
    not come out even."""
    if len(indices) % count:
        return [list(indices[start::count]) for start in range(count)]
    size = len(indices) // count
    chunks: list[list[int]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return chunks


def lengths_tensor(lengths: Sequence[int]) -> Tensor:
    """Signed lengths in a form that is small in memory."""
    return torch.tensor(lengths, dtype=torch.int32)
