"""The choice among the splice's backends.

Which one is fastest depends on sizes and device, so on a GPU they are timed once per size.  What was chosen is kept
for the rest of the run, and for its resumption: another backend rounds differently.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava_kit.errors import Problem, ResourceError
from llava_kit.splice_backends import Backend, Maps, Reference, Strided, Visual, Wanted, strided_refusal, unavailable

logger = logging.getLogger(__name__)

NAMES = ("reference", "triton", "cublas_scatter", "strided")
AUTO = "auto"


def unavailable_because(name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device; empty when it can."""
    if name in ("reference", "strided"):
        return ""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return ""
    if device.type != "cuda":
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return (
        "" if capability >= (8, 0) else f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    )


def make_backend(name: str) -> Backend:
    """The backend of a name."""
    if name == "reference":
        return Reference()
    if name == "strided":
        return Strided()
    from llava_kit import splice_triton  # Triton is not there everywhere

    return splice_triton.TritonFused() if name == "triton" else splice_triton.CublasScatter()


class Dispatcher:
    """Chooses a backend per size, dtype and device, and remembers it.

    ``configure`` says what a run wants; until then everything is chosen automatically.
    """

    def __init__(self) -> None:
        self.wanted = AUTO
        self.chosen: dict[str, str] = {}
        self._backends: dict[str, Backend] = {}

    def configure(self, wanted: str, device: torch.device, chosen: Mapping[str, str] | None = None) -> None:
        """Begin anew: forget earlier choices, and take over ``chosen`` from the run that is resumed.

        Raises:
            ResourceError: the backend that is asked for cannot run here; the message says why.
        """
        if wanted != AUTO:
            self.backend(wanted, device)
        self.wanted = wanted
        self.chosen = dict(chosen or {})

    def pick(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> str:
        """The name of the backend for these operands; timed when the size is new on a GPU."""
        key = _key(visual, dtype, bool(maps.uniform))
        if key not in self.chosen:
            name, why = self.wanted, "as the recipe says"
            if name == AUTO:
                name, why = self._choose(visual, table, maps, dtype)
            self.chosen[key] = name
            logger.info("splice: %s for %s (%s)", name, key, why)
        return self.chosen[key]

    def picked(self, visual: Visual, dtype: torch.dtype, uniform: bool) -> str:
        """What :meth:`pick` said in the forward pass."""
        return self.chosen[_key(visual, dtype, uniform)]

    def backend(self, name: str, device: torch.device) -> Backend:
        """The backend itself, made once.

        Raises:
            ResourceError: it cannot run here; the message says why.
        """
        if name not in self._backends:
            reason = unavailable_because(name, device)
            if reason:
                raise unavailable(name, reason)
            self._backends[name] = make_backend(name)
        return self._backends[name]

    def _choose(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> tuple[str, str]:
        if visual.hidden_VK.device.type != "cuda":
            return "reference", "no GPU"
        if torch.cuda.is_current_stream_capturing():
            hint = "run one step of each size before capturing"
            raise ResourceError(Problem("splice", "a backend must be chosen before a CUDA graph is captured", hint))
        times = {name: self._time(name, visual, table, maps, dtype) for name in candidates(visual, maps, dtype)}
        shown = ", ".join(f"{name} {microseconds:.0f} us" for name, microseconds in times.items())
        return min(times, key=lambda name: times[name]), shown

    def _time(self, name: str, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> float:
        """Median time of forward and backward as stage 1 needs them, in microseconds."""
        backend = self.backend(name, visual.hidden_VK.device)
        linear = visual.weight_DK is not None
        wanted = Wanted(
            hidden=not linear,
            weight=linear,
            bias=visual.bias_D is not None,
            table=False,
            table_rows=table.shape[0],
            table_dtype=table.dtype,
        )
        times: list[float] = []
        for attempt in range(9):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            out_RD = backend.forward(visual, table, maps, dtype)
            backend.backward(out_RD, visual, maps, wanted)
            end.record()
            end.synchronize()
            if attempt >= 2:  # the first ones compile
                times.append(start.elapsed_time(end) * 1000)
        return statistics.median(times)


def candidates(visual: Visual, maps: Maps, dtype: torch.dtype) -> list[str]:
    """Backends worth timing for these operands."""
    device = visual.hidden_VK.device
    names = [name for name in NAMES if not unavailable_because(name, device)]
    widths = [visual.hidden_VK.shape[1], maps_width(visual)]
    if visual.hidden_VK.dtype == torch.float64 or dtype == torch.float64:
        names = [name for name in names if name in ("reference", "strided")]
    if any(width % 16 for width in widths) and "triton" in names:
        names.remove("triton")  # unaligned rows end the asynchronous copies
    if strided_refusal(visual, maps, dtype):
        names.remove("strided")
    return names


def maps_width(visual: Visual) -> int:
    """D."""
    return visual.hidden_VK.shape[1] if visual.weight_DK is None else visual.weight_DK.shape[0]


def _key(visual: Visual, dtype: torch.dtype, uniform: bool) -> str:
    """Equal for operands that share a choice: rows within a power of two."""
    device = visual.hidden_VK.device
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    bucket = 1 << max(visual.hidden_VK.shape[0] - 1, 0).bit_length()
    layout = "uniform" if uniform else "ragged"
    kinds = f"{visual.hidden_VK.dtype} to {dtype}".replace("torch.", "")
    fused = "" if visual.weight_DK is not None else ", no layer"
    return f"{name}, {kinds}, {bucket} x {visual.hidden_VK.shape[1]} to {maps_width(visual)}, {layout}{fused}"


DISPATCHER = Dispatcher()
"""Of this process.  Operators have no other place to keep a choice."""


def describe_choice() -> dict[str, Any]:
    """For ``environment.json`` and checkpoints."""
    return {"backend": DISPATCHER.wanted, "chosen": dict(sorted(DISPATCHER.chosen.items()))}
