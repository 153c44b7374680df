"""The splice on a CUDA GPU: ceilings of the card, correctness, and all backends against how others do it.

    python tests/benchmarks/gpu_splice.py --out docs/benchmarks

Takes less than four minutes; what is done is on disk as soon as a section ends.  Time limits leave out the last sizes,
and say so.  Triton's own timer clears the cache between passes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from splice_cases import CASES, Case, computed, errors, exact, make_maps, make_numbers, poisoned_memory, to_device
from splice_peers import IMAGE, PEERS, Setting, Size, make_setting, ours

from llava_kit.splice_dispatch import DISPATCHER, describe_choice, make_backend

SIZES = (
    Size("7B 336 px", b=16, p=576, k=1024, d=4096, t=1024),
    Size("7B 224 px", b=16, p=256, k=1024, d=4096, t=704),
    Size("13B 336 px", b=16, p=576, k=1024, d=5120, t=1024),
    Size("13B 224 px", b=16, p=256, k=1024, d=5120, t=704),
    Size("7B 336 px, one sample", b=1, p=576, k=1024, d=4096, t=640),
    Size("7B 336 px, MLP's second layer", b=16, p=576, k=4096, d=4096, t=1024),
)
BACKENDS = ("triton", "cublas_scatter", "strided", "reference")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SECONDS = 200
"""After these no further size is begun."""


def median_us(run: Callable[[], Any], *, graph: bool = False) -> float | None:
    """Microseconds of a pass; ``None`` where it cannot be captured."""
    from triton.testing import do_bench, do_bench_cudagraph

    if not graph:
        return round(1000 * float(do_bench(run, warmup=10, rep=60, return_mode="median")), 1)
    try:
        return round(1000 * float(do_bench_cudagraph(run, rep=40, return_mode="median")), 1)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def ceilings() -> dict[str, float]:
    """What the card really does: a copy of 4 GB (8 GB moved), and a large product of random numbers."""
    source = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = median_us(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = median_us(lambda: a @ b)
    assert copy is not None and product is not None
    return {"terabytes_per_s": 2 * 2**32 / copy / 1e6, "teraflops": 2 * 8192**3 / product / 1e6}


def correctness() -> list[dict[str, Any]]:
    """Every backend on every layout and dtype against float64, twice, in poisoned memory."""
    rows = []
    large = {"hundreds of rows": Case(((90, "i", 41), (300, "i", "i")), patches=257, dropped=1)}
    for name, case in (CASES | large).items():
        maps = to_device(make_maps(case, vocabulary=17), "cuda")
        for dtype in TOLERANCE:
            numbers = make_numbers(maps, dtype, k=128, d=192)
            expected = exact(numbers, maps)
            for backend in ("triton", "cublas_scatter", "reference"):
                with poisoned_memory():
                    first, second = (computed(make_backend(backend), numbers, maps) for _ in range(2))
                worst = max(errors(first, expected))
                equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]
                row = {"case": name, "dtype": str(dtype), "backend": backend, "error": worst, "bit_equal": equal}
                rows.append(row | {"ok": worst < TOLERANCE[dtype] and equal})
    return rows


def compiled_where(setting: Setting) -> Callable[[], Tensor]:
    """The best that ``torch.compile`` makes of indexing: one row chosen of two that are looked up."""
    is_image = (setting.long_ids == IMAGE).flatten()
    visual_row = is_image.cumsum(0).sub(1).clamp(min=0)

    def run() -> Tensor:
        images = setting.linear(setting.features[:, 1:]).flatten(0, 1)
        ids = setting.long_ids.flatten()
        rows = torch.where(is_image[:, None], images[visual_row], setting.table[ids])
        return rows.view(*setting.long_ids.shape, -1)

    compiled: Callable[[], Tensor] = torch.compile(run)
    return compiled


def transient_bytes(run: Callable[[], Any]) -> int:
    """Memory that a pass takes at its peak beyond what it gives back."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del kept
    return torch.cuda.max_memory_allocated() - before - held


def passes(run: Callable[[], Tensor], setting: Setting) -> dict[str, tuple[Callable[[], Any], bool]]:
    """The three passes, and whether embeddings have a gradient in them."""
    linear = list(setting.linear.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def frozen() -> Any:
        return torch.autograd.grad(run(), linear, setting.grad)

    def trained() -> Any:
        return torch.autograd.grad(run(), [*linear, setting.table], setting.grad)

    return {"forward": (forward, False), "frozen": (frozen, False), "trained": (trained, True)}


def measure(name: str, path: Callable[[Setting], Callable[[], Tensor]], setting: Setting) -> dict[str, Any]:
    """Times and memory of one path; what fails says why."""
    row: dict[str, Any] = {"path": name}
    try:
        DISPATCHER.configure(name if name in BACKENDS else "auto", torch.device("cuda"))
        run = path(setting)
        for mode, (one, needs_table) in passes(run, setting).items():
            setting.table.requires_grad_(needs_table)
            row[f"{mode}_us"] = median_us(one)
            row[f"{mode}_graph_us"] = median_us(one, graph=True)
            row[f"{mode}_transient_bytes"] = transient_bytes(one)
        if name == "auto":
            row["chosen"] = describe_choice()["chosen"]
    except Exception as error:
        torch.cuda.synchronize()
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return row


def compare(size: Size, card: dict[str, float]) -> dict[str, Any]:
    """All paths at one size, with the floor that this card sets."""
    setting = make_setting(size, torch.bfloat16, "cuda")
    paths = dict.fromkeys((*BACKENDS, "auto"), ours) | PEERS | {"compiled where": compiled_where}
    flops = 2 * size.b * size.p * size.k * size.d
    text = size.b * (size.t - size.p)
    moved = 2 * (size.b * size.p * size.k + size.k * size.d + text * size.d + size.b * size.t * size.d)
    seconds = max(flops / card["teraflops"] / 1e12, moved / card["terabytes_per_s"] / 1e12)
    return {
        "size": size.name,
        "forward_floor_us": round(seconds * 1e6, 1),
        "rows": [measure(name, path, setting) for name, path in paths.items()],
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about, card = result["about"], result.get("ceilings", {})
    ceiling = ", ".join(f"{value:.2f} {name}" for name, value in card.items()) if "failed" not in card else str(card)
    lines = ["# The splice on a GPU", "", ", ".join(f"{name} {value}" for name, value in about.items()), "", ceiling]
    checks = result.get("correctness", [])
    wrong = [row for row in checks if not row["ok"]] if isinstance(checks, list) else checks
    lines += ["", f"Correctness: {len(checks)} cases, wrong: {wrong or 'none'}"]
    modes = ("forward", "frozen", "trained")
    for block in result.get("sizes", []):
        lines += ["", f"## {block['size']} (forward floor {block['forward_floor_us']} us)", ""]
        heads = [f"{mode}, us | graph | transient MB" for mode in modes]
        lines += ["| path | " + " | ".join(heads) + " |", "|---|" + "---|" * 9]
        for row in block["rows"]:
            if "failed" in row:
                lines.append(f"| {row['path']} | {row['failed']} |" + " |" * 8)
                continue
            cells = [
                f"{row[f'{mode}_us']} | {row[f'{mode}_graph_us'] or '-'} | {row[f'{mode}_transient_bytes'] / 1e6:.0f}"
                for mode in modes
            ]
            lines.append(f"| {row['path']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_splice.json and gpu_splice.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 5
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")}
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result: dict[str, Any] = {"about": {"date": today, "device": torch.cuda.get_device_name()} | versions}

    def section(name: str, work: Callable[[], Any]) -> None:
        try:
            result[name] = work()
        except Exception as error:
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.monotonic() - began, 1)
        (options.out / "gpu_splice.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        (options.out / "gpu_splice.md").write_text(table({**result, "sizes": result.get("sizes") or []}), "utf-8")

    section("ceilings", ceilings)
    section("correctness", correctness)
    sizes: list[Any] = []
    card = result["ceilings"] if "teraflops" in result["ceilings"] else {"teraflops": 790.0, "terabytes_per_s": 4.3}
    for size in SIZES:
        if time.monotonic() - began > SECONDS:
            result.setdefault("left_out", []).append(size.name)
            continue
        sizes.append(compare(size, card))
        section("sizes", lambda: sizes)
        torch.cuda.empty_cache()
    print(table(result))
    wrong = [row for row in result["correctness"] if not row["ok"]] if isinstance(result["correctness"], list) else [1]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
