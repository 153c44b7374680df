"""Launches the splice's Triton kernels: the fused operation, and rows moved beside cuBLAS products.

Shapes: V visual rows, S text rows, K connector width, D language model width, R rows of the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from llava_kit import splice_kernels as kernels
from llava_kit.splice_backends import Gradients, Maps, Visual, Wanted, project, visual_gradients, wants_visual

GROUP = 8
"""Row blocks of tiles that are computed close together in time."""
ROWS, COLS = 8, 1024
"""Rows of a program that only copies, and columns it moves at once."""
TABLE_ROWS, TABLE_COLS = 16, 128
BIAS_ROWS, BIAS_COLS = 64, 64
MAX_SLABS = 8


class TritonFused:
    """Projection, bias and both kinds of rows in one kernel; products of the backward pass read through the map."""

    def forward(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
        if visual.weight_DK is None:
            return _move_rows(visual.hidden_VK, table, maps, dtype)
        hidden_VK, weight_DK = visual.hidden_VK.contiguous(), visual.weight_DK.contiguous()
        config = kernels.config_for("project", hidden_VK.dtype, _capability(hidden_VK.device))
        (v, k), (d, _), s = hidden_VK.shape, weight_DK.shape, maps.txt_id_S.shape[0]
        out_RD = table.new_empty(maps.rows, d, dtype=dtype)
        tiles = triton.cdiv(v, config.m) * triton.cdiv(d, config.n)
        programs = tiles + triton.cdiv(s, ROWS)
        _launch(
            kernels.project_kernel,
            (programs,),
            hidden_VK, weight_DK, _or(visual.bias_D, weight_DK), table.contiguous(),
            maps.vis_dst_V, maps.txt_id_S, maps.txt_dst_S, out_RD, v, s, k, d, tiles, programs,
            HAS_BIAS=visual.bias_D is not None, EVEN_K=k % config.k == 0, ROWS=ROWS, COLS=COLS,
            **_tile(config, hidden_VK),
        )  # fmt: skip
        return out_RD

    def backward(self, grad_RD: Tensor, visual: Visual, maps: Maps, wanted: Wanted) -> Gradients:
        grad_RD = grad_RD.contiguous()
        d_table = _table_gradient(grad_RD, maps, wanted)
        if visual.weight_DK is None:
            d_hidden = _gather(grad_RD, maps, visual.hidden_VK) if wanted.hidden else None
            return d_hidden, None, None, d_table
        d_weight, d_bias = _weight_gradient(grad_RD, visual, maps, wanted)
        d_hidden = _hidden_gradient(grad_RD, visual.weight_DK, maps) if wanted.hidden else None
        return d_hidden, d_weight, d_bias, d_table


class CublasScatter:
    """Products by cuBLAS; one kernel moves all rows forward, one gathers the visual rows' gradient."""

    def forward(self, visual: Visual, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
        return _move_rows(project(visual), table, maps, dtype)

    def backward(self, grad_RD: Tensor, visual: Visual, maps: Maps, wanted: Wanted) -> Gradients:
        grad_RD = grad_RD.contiguous()
        d_table = _table_gradient(grad_RD, maps, wanted)
        grad_VD = _gather(grad_RD, maps, visual.hidden_VK) if wants_visual(wanted) else None
        return (*visual_gradients(grad_VD, visual, wanted), d_table)


def _move_rows(visual_VD: Tensor, table: Tensor, maps: Maps, dtype: torch.dtype) -> Tensor:
    (v, d), s = visual_VD.shape, maps.txt_id_S.shape[0]
    out_RD = table.new_empty(maps.rows, d, dtype=dtype)
    _launch(
        kernels.rows_kernel,
        (triton.cdiv(v, ROWS) + triton.cdiv(s, ROWS),),
        visual_VD.contiguous(), table.contiguous(), maps.vis_dst_V, maps.txt_id_S, maps.txt_dst_S, out_RD, v, s, d,
        ROWS=ROWS, COLS=COLS,
    )  # fmt: skip
    return out_RD


def _gather(grad_RD: Tensor, maps: Maps, like_VK: Tensor) -> Tensor:
    v, d = maps.vis_dst_V.shape[0], grad_RD.shape[1]
    grad_VD = like_VK.new_empty(v, d)
    _launch(
        kernels.gather_kernel, (triton.cdiv(v, ROWS),), grad_RD, maps.vis_dst_V, grad_VD, v, d, ROWS=ROWS, COLS=COLS
    )
    return grad_VD


def _weight_gradient(
    grad_RD: Tensor, visual: Visual, maps: Maps, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    if not (wanted.weight or wanted.bias):
        return None, None
    hidden_VK = visual.hidden_VK.contiguous()
    config = kernels.config_for("weight_grad", hidden_VK.dtype, _capability(hidden_VK.device))
    (v, k), d = hidden_VK.shape, grad_RD.shape[1]
    tiles = triton.cdiv(d, config.m) * triton.cdiv(k, config.n) if wanted.weight else 0
    slabs = count_slabs(tiles, v, config.k, _processors(hidden_VK.device))
    # One slab is the result already; several are summed afterwards in their order.
    partial = hidden_VK.dtype if slabs == 1 else torch.float32
    d_weight_UDK = hidden_VK.new_empty(slabs, d if wanted.weight else 0, k, dtype=partial)
    d_bias_UD = hidden_VK.new_empty(slabs, d if wanted.bias else 0, dtype=partial)
    columns = triton.cdiv(d, BIAS_COLS) if wanted.bias else 0
    slab_rows = triton.cdiv(triton.cdiv(v, slabs), config.k) * config.k
    _launch(
        kernels.weight_grad_kernel,
        (tiles + columns, slabs),
        grad_RD, hidden_VK, maps.vis_dst_V, d_weight_UDK, d_bias_UD, v, k, d, tiles, slab_rows,
        ROWS=BIAS_ROWS, COLS=BIAS_COLS, **_tile(config, hidden_VK),
    )  # fmt: skip
    d_weight = d_weight_UDK.sum(0).to(hidden_VK.dtype) if slabs > 1 else d_weight_UDK[0]
    d_bias = d_bias_UD.sum(0).to(hidden_VK.dtype) if slabs > 1 else d_bias_UD[0]
    return d_weight if wanted.weight else None, d_bias if wanted.bias else None


def count_slabs(tiles: int, rows: int, step: int, processors: int) -> int:
    """Into how many parts to cut a sum over rows, so that few processors idle in the last wave."""
    most = max(1, min(MAX_SLABS, rows // (4 * step)))
    # Time in waves of tiles of one slab's length; each slab more costs a pass over the result.
    return min(range(1, most + 1), key=lambda slabs: -(-tiles * slabs // processors) / slabs + 0.05 * slabs)


def _hidden_gradient(grad_RD: Tensor, weight_DK: Tensor, maps: Maps) -> Tensor:
    config = kernels.config_for("hidden_grad", weight_DK.dtype, _capability(weight_DK.device))
    v, (d, k) = maps.vis_dst_V.shape[0], weight_DK.shape
    d_hidden_VK = weight_DK.new_empty(v, k)
    _launch(
        kernels.hidden_grad_kernel,
        (triton.cdiv(v, config.m) * triton.cdiv(k, config.n),),
        grad_RD, weight_DK.contiguous(), maps.vis_dst_V, d_hidden_VK, v, k, d,
        EVEN_D=d % config.k == 0, **_tile(config, weight_DK),
    )  # fmt: skip
    return d_hidden_VK


def _table_gradient(grad_RD: Tensor, maps: Maps, wanted: Wanted) -> Tensor | None:
    if not wanted.table:
        return None
    d = grad_RD.shape[1]
    d_table = grad_RD.new_zeros(wanted.table_rows, d, dtype=wanted.table_dtype)
    _launch(
        kernels.table_grad_kernel,
        (maps.seg_uid.shape[0], triton.cdiv(d, TABLE_COLS)),
        grad_RD, maps.seg_order_S, maps.seg_start, maps.seg_uid, maps.txt_id_S, maps.txt_dst_S, d_table, d,
        ROWS=TABLE_ROWS, COLS=TABLE_COLS,
    )  # fmt: skip
    return d_table


def _tile(config: kernels.Config, operand: Tensor) -> dict[str, Any]:
    """Constants and launch options that every product shares."""
    return {
        "M": config.m,
        "N": config.n,
        "STEP": config.k,
        "GROUP": GROUP,
        "UPCAST": triton.knobs.runtime.interpret,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def _launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Run a kernel on the operands' device; nothing where the grid is empty."""
    if 0 in grid:
        return
    device = operands[0].device
    run: Callable[..., Any] = kernel[grid]
    if device.type == "cuda":
        with torch.cuda.device(device):
            run(*operands, **constants, enable_fp_fusion=True)
    else:
        run(*operands, **constants)


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Any pointer for a kernel that will not read it."""
    return instead if tensor is None else tensor


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
