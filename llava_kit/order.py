"""Which samples an epoch takes, and in which order: a pure function of seed, stage and epoch.

Nothing is remembered between epochs, so a run that is resumed at any step sees what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llava_kit.errors import Problem, RecipeError
from llava_kit.grouping import Grouping


@dataclass(frozen=True, slots=True)
class Position:
    """A sample's place: the source's name, and the index in it."""

    source: str
    index: int


class Order:
    """The order of the samples of one stage.

    Args:
        lengths: how many samples each source has.
        shares: how much of an epoch each source makes up, in proportion to the others; ``None`` for all sources
            means each of their samples exactly once an epoch.
        epoch_samples: size of an epoch that is drawn by shares; without it, as many as the sources have.
        held_out: samples kept out of training, chosen at random from all sources in proportion to their lengths.
        grouping: batches of alike samples; without it samples are shuffled.

    Raises:
        RecipeError: nothing would be left to train on.
    """

    def __init__(
        self,
        *,
        seed: int,
        stage: str,
        lengths: Mapping[str, int],
        shares: Mapping[str, float | None],
        epoch_samples: int | None = None,
        held_out: int = 0,
        grouping: Grouping | None = None,
    ) -> None:
        self.seed, self.stage, self.sources = seed, stage, tuple(lengths)
        self.grouping = grouping
        aside = largest_remainder(list(lengths.values()), min(held_out, sum(lengths.values())))
        self._pools: list[Tensor] = []
        kept_out: list[Position] = []
        for name, count in zip(lengths, aside, strict=True):
            shuffled = self._permutation(lengths[name], "held out", name)
            kept_out += [Position(name, int(index)) for index in shuffled[:count]]
            self._pools.append(shuffled[count:].sort().values)
        self.held_out: tuple[Position, ...] = tuple(kept_out)
        empty = [name for name, pool in zip(lengths, self._pools, strict=True) if not len(pool)]
        if empty:
            where = f"stages.{stage}.validation.samples"
            whole = sum(lengths.values())
            what = f"holding out {held_out} of {whole} samples leaves none of {', '.join(empty)} to train on"
            raise RecipeError(Problem(where, what, "hold out fewer"))
        available = [len(pool) for pool in self._pools]
        drawn = [shares[name] for name in lengths]
        self.by_share = any(share is not None for share in drawn)
        if self.by_share:
            self.counts = largest_remainder([share or 0.0 for share in drawn], epoch_samples or sum(available))
        else:
            self.counts = available
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def positions(self, epoch: int, start: int, stop: int) -> list[Position]:
        """The samples from ``start`` to before ``stop`` of an epoch, in their order."""
        sources, indices = self._epoch(epoch)
        pairs = zip(sources[start:stop].tolist(), indices[start:stop].tolist(), strict=True)
        return [Position(self.sources[source], index) for source, index in pairs]

    def _make_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        picks = [self._pick(place, epoch) for place in range(len(self.sources))]
        sources = torch.cat([torch.full((len(pick),), place) for place, pick in enumerate(picks)])
        if self.grouping is None:
            order = self._permutation(len(sources), "epoch", epoch)
        else:
            order = self._grouped(self.grouping, picks, epoch)
        return sources[order].to(torch.int32), torch.cat(picks)[order].to(torch.int32)

    def _grouped(self, grouping: Grouping, picks: Sequence[Tensor], epoch: int) -> Tensor:
        by_source = [grouping.lengths[name] for name in self.sources]
        lengths = torch.cat([own[pick] for own, pick in zip(by_source, picks, strict=True)]).tolist()
        order = grouping.order(lengths, lambda purpose, size: self._permutation(size, "grouped", purpose, epoch))
        return torch.tensor(order)

    def _pick(self, place: int, epoch: int) -> Tensor:
        """This epoch's samples of one source.

        By share, epochs go on where the one before stopped, through one permutation of the source after another, so
        no sample comes again before every other has come.
        """
        pool, count = self._pools[place], self.counts[place]
        if not self.by_share:
            return pool
        begin, end = epoch * count, (epoch + 1) * count
        rounds = range(begin // len(pool), -(-end // len(pool)))
        if not rounds:
            return pool[:0]
        stream = torch.cat([self._permutation(len(pool), "round", self.sources[place], number) for number in rounds])
        skip = begin - rounds[0] * len(pool)
        return pool[stream[skip : skip + count]]

    def _permutation(self, length: int, *key: str | int) -> Tensor:
        digest = hashlib.sha256(repr((self.seed, self.stage, *key)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(length, generator=generator)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """``total`` as whole numbers in proportion to ``weights``; what rounding leaves goes to the largest remainders."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts
