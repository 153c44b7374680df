"""Reads samples and makes batches ahead of the trainer, in this process or in others, from any step on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_kit.contracts import Sample
from llava_kit.data import Collator, MicroBatch
from llava_kit.errors import DataError, KitError, MissingDataError, Problem, ResourceError, SampleError
from llava_kit.grouping import Grouping, lengths_tensor, signed_length
from llava_kit.order import Order, Position

if TYPE_CHECKING:
    from llava_kit.recipe import Recipe, Stage

TIMEOUT = 600.0
"""Seconds to wait for a batch from another process before it counts as stuck."""

Sources = Mapping[str, Sequence[Sample]]


class StageData:
    """The samples of one stage: what is trained on in which order, and what is held out.

    Raises:
        DataError: sources cannot be read or are empty.
        RecipeError: holding out leaves nothing to train on.
    """

    def __init__(self, recipe: Recipe, name: str, stage: Stage, collator: Collator) -> None:
        self.recipe, self.stage, self.collator = recipe, stage, collator
        self.sources = open_sources(name, stage)
        lengths = {source: len(samples) for source, samples in self.sources.items()}
        self.order = Order(
            seed=recipe.seed,
            stage=name,
            lengths=lengths,
            shares={source: stage.data[source].share for source in lengths},
            held_out=stage.validation.samples,
            grouping=_grouping(stage, self.sources) if stage.order == "modality_length" else None,
        )
        self.size = sum(lengths.values())
        self.total_steps = stage.total_steps(self.order.epoch_size)
        self.warnings = _differences(stage, lengths)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data: sizes, and what the formats know of their files."""
        return {
            name: {"samples": len(samples), "fingerprint": getattr(samples, "fingerprint", None)}
            for name, samples in self.sources.items()
        }

    def held_out(self) -> list[tuple[Position, Sample | SampleError]]:
        """The samples kept out of training."""
        fetch = _Fetch(self.sources, self.collator)
        return [(position, fetch.sample(position)) for position in self.order.held_out]

    def batches(self, start: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of every step from ``start`` on."""
        return batches(
            self.order,
            self.sources,
            self.collator,
            batch_size=self.stage.batch_size,
            micro_batch_size=self.stage.micro_batch_size,
            start=start,
            total_steps=self.total_steps,
            workers=self.recipe.workers,
        )


def _grouping(stage: Stage, sources: Sources) -> Grouping:
    """Reads every sample once; one that cannot be used is set aside when its turn comes, wherever it stands."""

    def length(samples: Sequence[Sample], index: int) -> int:
        try:
            return signed_length(samples[index])
        except SampleError:
            return 1

    lengths = {
        name: lengths_tensor([length(samples, index) for index in range(len(samples))])
        for name, samples in sources.items()
    }
    return Grouping(lengths=lengths, batch_size=stage.batch_size, micro_batch_size=stage.micro_batch_size)


def _differences(stage: Stage, lengths: Mapping[str, int]) -> list[str]:
    """Where the data is not as large as the recipe says; what is there counts, but somebody should know."""
    pairs = [(name, stage.data[name].samples, size) for name, size in lengths.items()]
    pairs.append(("all sources", stage.samples, sum(lengths.values())))
    return [
        f"warning: data {name}: the recipe declares {declared:,} samples, there are {size:,}"
        for name, declared, size in pairs
        if declared is not None and declared != size
    ]


def open_sources(stage_name: str, stage: Stage) -> dict[str, Sequence[Sample]]:
    """The samples of every source of a stage.

    Raises:
        MissingDataError: sources are not there, and nothing else is wrong.
        DataError: sources cannot be read or are empty.
    """
    sources: dict[str, Sequence[Sample]] = {}
    problems: list[Problem] = []
    kind: type[DataError] = MissingDataError
    for name, source in stage.data.items():
        where = f"stages.{stage_name}.data.{name}"
        try:
            samples = source.format.build()
        except DataError as error:
            problems += error.problems
            kind = kind if isinstance(error, MissingDataError) else DataError
            continue
        if not len(samples):
            kind = DataError
            problems.append(Problem(where, "it holds no samples", f"correct its path, or drop it: {where}=null"))
        sources[name] = samples
    if problems:
        raise kind(problems)
    return sources


def batches(
    order: Order,
    sources: Sources,
    collator: Collator,
    *,
    batch_size: int,
    micro_batch_size: int,
    start: int,
    total_steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    timeout: float = TIMEOUT,
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of process ``rank`` of ``world``, step by step from ``start`` on.

    All processes get equally many in a step; one that has no samples in it has no batch.

    Raises:
        ResourceError: a data loader process died or is stuck.
    """

    def plan(step: int) -> list[list[Position]]:
        return micro_positions(step_positions(order, step, batch_size), micro_batch_size, rank, world)

    flat = (positions for step in range(start, total_steps) for positions in plan(step))
    loaded = load(flat, sources, collator, workers=workers, timeout=timeout)
    for step in range(start, total_steps):
        yield list(islice(loaded, len(plan(step))))


def step_positions(order: Order, step: int, batch_size: int) -> list[Position]:
    """The samples of a step over all processes; the last step of an epoch may have fewer than ``batch_size``."""
    epoch, inside = divmod(step, -(-order.epoch_size // batch_size))
    return order.positions(epoch, inside * batch_size, (inside + 1) * batch_size)


def micro_positions(positions: Sequence[Position], size: int, rank: int, world: int) -> list[list[Position]]:
    """This process's part of a step, cut into micro-batches: every ``world``-th of them."""
    rounds = -(-len(positions) // (size * world))
    starts = [(number * world + rank) * size for number in range(rounds)]
    return [list(positions[start : start + size]) for start in starts]


def load(
    positions: Iterable[list[Position]],
    sources: Sources,
    collator: Collator,
    *,
    workers: int = 0,
    timeout: float = TIMEOUT,
) -> Iterator[MicroBatch]:
    """One micro-batch for every list of positions, in their order.

    Raises:
        ResourceError: a data loader process died or is stuck.
    """
    fetch = _Fetch(sources, collator)
    in_process = (fetch[one] for one in positions)
    with closing(_from_processes(fetch, positions, workers, timeout) if workers else in_process) as loaded:
        for micro in loaded:
            if isinstance(micro, KitError):
                raise micro
            yield micro


class _Fetch(Dataset["MicroBatch | KitError"]):
    """Reads and collates a list of positions.  Errors are given back: torch would rebuild them without their parts."""

    def __init__(self, sources: Sources, collator: Collator) -> None:
        self.sources = sources
        self.collator = collator

    def __getitem__(self, positions: Sequence[Position]) -> MicroBatch | KitError:
        try:
            return self.collator([(position, self.sample(position)) for position in positions])
        except KitError as error:
            return error

    def sample(self, position: Position) -> Sample | SampleError:
        """The sample at a position, or why there is none."""
        try:
            return self.sources[position.source][position.index]
        except SampleError as error:
            return error


def _from_processes(
    fetch: _Fetch, positions: Iterable[list[Position]], workers: int, timeout: float
) -> Generator[MicroBatch | KitError]:
    # A generator of its own keeps the loader from drawing a seed from the global one, which training may depend on.
    # torch gives each process a single thread.
    loader: DataLoader[Any] = DataLoader(
        fetch,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        collate_fn=_as_it_is,
        timeout=timeout,
        generator=torch.Generator().manual_seed(0),
    )
    iterator: Any = iter(loader)
    try:
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(
            ("DataLoader worker (pid", "DataLoader timed")
        ):
            raise  # a mistake of the program
        raise _dead_worker(error) from error
    finally:
        # At once, and not when the traceback that holds the iterator is forgotten: a later process would inherit it.
        iterator._shutdown_workers()


def _as_it_is(micro: Any) -> Any:
    return micro


def _dead_worker(error: BaseException) -> ResourceError:
    """What became of a data loader process, and how much shared memory there is, a usual cause."""
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    hint = "lower 'workers' or micro_batch_size, or give the machine more memory; workers=0 shows the cause"
    if os.path.isdir("/dev/shm"):  # noqa: PTH112, S108 - where processes hand batches over
        hint += f" (/dev/shm has {shutil.disk_usage('/dev/shm').free / 2**20:,.0f} MiB left)"  # noqa: S108
    return ResourceError(Problem("data loader", f"a process died or is stuck: {first_line}", hint))
