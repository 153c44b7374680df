"""The splice against how others do it, on the CPU: counts, exactness and ratios of times.

    python tests/benchmarks/cpu_splice.py --out docs/benchmarks

Every path runs in this process on the same operands, turn by turn; a ratio is the median of the ratios of neighbours
in time.  Times are processor time on one thread, so that other work on the machine counts little; absolute ones say
little on a CPU.  Ends with 1 where a requirement is not met.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from splice_peers import PEERS, Setting, Size, count, make_setting, ours
from torch import Tensor

SIZES = (
    Size("B8 P64 K128 D512 T160", b=8, p=64, k=128, d=512, t=160),
    Size("B8 P256 K256 D1024 T448", b=8, p=256, k=256, d=1024, t=448),
)
LARGE = Size("B8 P256 K1024 D4096 T448", b=8, p=256, k=1024, d=4096, t=448)
COUNTED = Size("B16", b=16, p=16, k=32, d=64, t=48)
TINY = Size("tiny", b=3, p=8, k=16, d=32, t=24)
REQUIRED = {"float32": 1.3, "bfloat16": 2.0}
"""How many times faster than transformers, forward and backward, embeddings frozen."""
TOLERANCE = 1e-5


def loss_and_gradients(run: Callable[[], Tensor], setting: Setting) -> list[Tensor]:
    """A loss that weighs every element differently, and its gradients to weight, bias and table."""
    loss = (run() * setting.grad).sum() / setting.grad.numel()
    parameters = [*setting.linear.parameters(), setting.table]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def differences(size: Size) -> dict[str, float]:
    """Largest difference of loss and gradients from ours per peer, as a part of the largest value."""
    setting = make_setting(size, torch.float32, "cpu")
    mine = loss_and_gradients(ours(setting), setting)
    found = {}
    for name, peer in PEERS.items():
        theirs = loss_and_gradients(peer(setting), setting)
        parts = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(mine, theirs, strict=True)]
        found[name] = max(parts)
    return found


def counts() -> dict[str, dict[str, int]]:
    """Operators and syncs of one forward pass of 16 samples."""
    setting = make_setting(COUNTED, torch.float32, "cpu")
    paths = {"ours": ours(setting)} | {name: peer(setting) for name, peer in PEERS.items()}
    counters = {name: count(run) for name, run in paths.items()}
    return {name: {"operators": one.operators, "syncs": one.syncs} for name, one in counters.items()}


def once(run: Callable[[], Tensor], setting: Setting, mode: str) -> float:
    """Seconds of processor time of one pass."""
    parameters = [*setting.linear.parameters(), setting.table]
    for parameter in parameters:
        parameter.grad = None
    began = time.process_time()
    if mode == "forward":
        with torch.no_grad():
            run()
    else:
        run().backward(setting.grad)
    return time.process_time() - began


def ratios(size: Size, dtype: torch.dtype, mode: str, repeats: int) -> dict[str, Any]:
    """Our median milliseconds, and how many times longer each peer takes."""
    setting = make_setting(size, dtype, "cpu")
    setting.table.requires_grad_(mode == "trained embeddings")
    paths = {"ours": ours(setting)} | {name: peer(setting) for name, peer in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    order = list(paths)
    for repeat in range(repeats + 2):
        order.append(order.pop(0))  # nobody always finds the memory as the same other one left it
        for name in order:
            seconds = once(paths[name], setting, mode)
            if repeat >= 2:
                times[name].append(seconds)
    mine = times.pop("ours")
    return {
        "size": size.name,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "ours_ms": round(statistics.median(mine) * 1000, 3),
        "times_longer": {
            name: round(statistics.median(b / a for a, b in zip(mine, taken, strict=True)), 2)
            for name, taken in times.items()
        },
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Requirements that are not met."""
    found = []
    if result["counts"]["ours"] != {"operators": 1, "syncs": 0}:
        found.append(f"ours is no longer 1 operator without a sync: {result['counts']['ours']}")
    found += [
        f"{name} differs by {part:.1e}, more than {TOLERANCE:.0e}"
        for name, part in result["largest_difference"].items()
        if part > TOLERANCE
    ]
    for row in result["times"]:
        wanted, got = REQUIRED[row["dtype"]], row["times_longer"]["transformers"]
        if row["mode"] == "frozen embeddings" and row["size"] == SIZES[1].name and got < wanted:
            found.append(f"{row['dtype']} {row['size']}: transformers takes {got} times as long, {wanted} is required")
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = result["about"]
    lines = [
        "# The splice on a CPU",
        "",
        f"{about['date']}; {about['cpu']}, {about['threads']} thread; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "Made by `python tests/benchmarks/cpu_splice.py`, all in one run. transformers runs its own code; the other",
        "merges are written anew with the same steps. The connector is one linear layer, the backend `reference`.",
        "Times are processor time.",
        "",
        "| 16 samples, forward | operators | syncs | largest difference in loss and gradients |",
        "|---|---|---|---|",
    ]
    for name, row in result["counts"].items():
        part = result["largest_difference"].get(name)
        shown = "" if part is None else f"{part:.1e}"
        lines.append(f"| {name} | {row['operators']} | {row['syncs']} | {shown} |")
    lines += [
        "",
        "How many times as long as ours the others take (above 1: ours is faster):",
        "",
        "| size | dtype | pass | ours, ms | " + " | ".join(PEERS) + " |",
        "|---|---|---|---|" + "---|" * len(PEERS),
    ]
    for row in result["times"]:
        what = row["mode"] if row["mode"] == "forward" else f"forward + backward, {row['mode']}"
        others = " | ".join(f"{row['times_longer'][name]:.2f}" for name in PEERS)
        lines.append(f"| {row['size']} | {row['dtype']} | {what} | {row['ours_ms']} | {others} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for cpu_splice.json and cpu_splice.md")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--counts-only", action="store_true", help="counts and exactness, no times")
    parser.add_argument("--large", action="store_true", help=f"{LARGE.name} too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = () if options.counts_only else (*SIZES, *((LARGE,) if options.large else ()))
    result: dict[str, Any] = {
        "about": {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "counts": counts(),
        "largest_difference": differences(TINY if options.counts_only else SIZES[0]),
        "times": [
            ratios(size, dtype, mode, options.repeats)
            for size in sizes
            for dtype in (torch.float32, torch.bfloat16)
            for mode in ("forward", "frozen embeddings", "trained embeddings")
        ],
    }
    result["failures"] = failures(result)
    print(table(result))
    print("\n".join(result["failures"]) or "every requirement is met")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cpu_splice.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        (options.out / "cpu_splice.md").write_text(table(result), "utf-8")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
