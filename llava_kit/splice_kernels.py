"""Triton kernels of the splice: one launch forward, one for the weights' gradient, and one each for rows and table.

All matrices are contiguous, so a row's width is its stride.  Row maps are int32; a negative entry drops a row (or, as
a source, stands for zeros).  Nothing is added atomically: every element of a result is stored by one program, and its
sum runs in a fixed order.

Shapes: V visual rows, S text rows, K connector width, D language model width.

``UPCAST`` is for Triton's interpreter, whose ``tl.dot`` is wrong on bf16; products of bf16 are exact in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """Sizes of a tile (``m`` x ``n``, in steps of ``k``), warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Registers and dynamic shared memory (KiB) as Triton 3.9.0 compiles them; none has a stack frame, that is: no spill.
# tests/test_splice_kernels.py compiles each of them again and holds it to these limits.
CONFIGS: dict[tuple[str, str, int], Config] = {
    ("project", "16", 90): Config(128, 256, 64, warps=8, stages=3),  # 200 registers, 144 KiB
    ("project", "16", 80): Config(128, 128, 64, warps=8, stages=3),  # 192 registers, 64 KiB; 128x256 takes 254
    ("project", "32", 90): Config(128, 128, 32, warps=8, stages=3),  # 238 registers, 64 KiB
    ("project", "32", 80): Config(64, 128, 32, warps=8, stages=3),  # 194 registers, 48 KiB
    # The row map's load inside the loop costs a stage: 5 stages hold three tiles of operands.
    ("weight_grad", "16", 90): Config(128, 256, 64, warps=8, stages=5),  # 204 registers, 144.5 KiB
    ("weight_grad", "16", 80): Config(
        128, 128, 64, warps=8, stages=4
    ),  # 128 registers, 32 KiB: one buffer, not pipelined there
    ("weight_grad", "32", 90): Config(128, 128, 32, warps=8, stages=4),  # 126 registers, 32 KiB
    ("weight_grad", "32", 80): Config(64, 128, 32, warps=8, stages=4),  # 122 registers, 24 KiB
    ("hidden_grad", "16", 90): Config(128, 256, 64, warps=8, stages=3),  # 193 registers, 144 KiB
    ("hidden_grad", "16", 80): Config(128, 128, 64, warps=8, stages=3),  # 184 registers, 64 KiB
    ("hidden_grad", "32", 90): Config(128, 128, 32, warps=8, stages=3),  # 190 registers, 64 KiB
    ("hidden_grad", "32", 80): Config(64, 128, 32, warps=8, stages=3),  # 106 registers, 48 KiB
}


def config_for(role: str, dtype: torch.dtype, capability: int) -> Config:
    """The shipped configuration of a kernel: ``role`` is ``project``, ``weight_grad`` or ``hidden_grad``.

    Args:
        capability: compute capability times ten.  9.x and 10.x have the shared memory of a Hopper, the others of
            8.x and 12.x have a good deal less.
    """
    return CONFIGS[role, "32" if dtype == torch.float32 else "16", 90 if capability // 10 in (9, 10) else 80]


@triton.jit
def _multiply(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile_position(tile, rows, cols, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """Tiles in groups of GROUP row blocks, so that neighbours in time share what they read in the L2 cache."""
    blocks_m = tl.cdiv(rows, M)
    blocks_n = tl.cdiv(cols, N)
    group = tile // (GROUP * blocks_n)
    first = group * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    inside = tile % (GROUP * blocks_n)
    return first + inside % height, inside // height


@triton.jit
def _copy_rows(block, source, source_row, out_row, out, count, D, HAS_SOURCE_ROW: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr):  # fmt: skip
    """``out[out_row[i]] = source[source_row[i]]`` for ROWS values of i, cast to the dtype of ``out``."""
    i = block * ROWS + tl.arange(0, ROWS)
    if HAS_SOURCE_ROW:  # noqa: SIM108 - decided when the kernel is compiled
        read = tl.load(source_row + i, mask=i < count, other=-1)
    else:
        read = tl.where(i < count, i, -1)
    write = tl.load(out_row + i, mask=i < count, other=-1)
    read_from = source + read.to(tl.int64)[:, None] * D
    write_to = out + write.to(tl.int64)[:, None] * D
    for start in range(0, D, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        values = tl.load(
            read_from + cols, mask=(read >= 0)[:, None] & (cols < D), other=0.0, eviction_policy="evict_first"
        )
        tl.store(write_to + cols, values.to(out.dtype.element_ty), mask=(write >= 0)[:, None] & (cols < D))


@triton.jit
def _project_tile(tile, hidden, weight, bias, vis_dst, out, V, K, D, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
                  UPCAST: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    """``out[vis_dst] = hidden @ weight.T + bias`` for one tile."""
    block_m, block_n = _tile_position(tile, V, D, M, N, GROUP)
    rows = block_m * M + tl.arange(0, M)
    cols = block_n * N + tl.arange(0, N)
    ks = tl.arange(0, STEP)
    a_at = hidden + rows.to(tl.int64)[:, None] * K + ks[None, :]
    b_at = weight + cols.to(tl.int64)[None, :] * K + ks[:, None]
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, STEP):
        # Masks, never indices clamped with tl.where: clamping would end the asynchronous copies.
        a_mask = (rows < V)[:, None]
        b_mask = (cols < D)[None, :]
        if not EVEN_K:
            a_mask = a_mask & (start + ks < K)[None, :]
            b_mask = b_mask & (start + ks < K)[:, None]
        a = tl.load(a_at, mask=a_mask, other=0.0)
        b = tl.load(b_at, mask=b_mask, other=0.0)
        acc = _multiply(a, b, acc, UPCAST, PRECISION)
        a_at += STEP
        b_at += STEP
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    write = tl.load(vis_dst + rows, mask=rows < V, other=-1)
    write_to = out + write.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(write_to, acc.to(out.dtype.element_ty), mask=(write >= 0)[:, None] & (cols < D)[None, :])


@triton.jit
def project_kernel(hidden, weight, bias, table, vis_dst, txt_id, txt_dst, out, V, S, K, D, tiles, programs,
                   HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):  # fmt: skip
    """The whole forward pass.  Text programs are spread evenly among the tiles: a tile leaves most of the memory
    bandwidth idle, and text rows need nothing else."""
    program = tl.program_id(0).to(tl.int64)
    text = programs - tiles
    before = (program * text // programs).to(tl.int32)
    after = ((program + 1) * text // programs).to(tl.int32)
    if after > before:
        _copy_rows(before, table, txt_id, txt_dst, out, S, D, True, ROWS, COLS)
    else:
        _project_tile(program.to(tl.int32) - before, hidden, weight, bias, vis_dst, out, V, K, D, HAS_BIAS, EVEN_K,
                      UPCAST, PRECISION, M, N, STEP, GROUP)  # fmt: skip


@triton.jit
def rows_kernel(visual, table, vis_dst, txt_id, txt_dst, out, V, S, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The forward pass of rows that are projected already."""
    program = tl.program_id(0)
    visual_programs = tl.cdiv(V, ROWS)
    if program < visual_programs:
        _copy_rows(program, visual, vis_dst, vis_dst, out, V, D, False, ROWS, COLS)
    else:
        _copy_rows(program - visual_programs, table, txt_id, txt_dst, out, S, D, True, ROWS, COLS)


@triton.jit
def gather_kernel(grad, vis_dst, out, V, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``out[v] = grad[vis_dst[v]]``, zeros for a dropped row."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = tl.load(vis_dst + i, mask=i < V, other=-1)
    for start in range(0, D, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        inside = (i < V)[:, None] & (cols < D)
        read_from = grad + read.to(tl.int64)[:, None] * D + cols
        values = tl.load(read_from, mask=inside & (read >= 0)[:, None], other=0.0)
        tl.store(out + i.to(tl.int64)[:, None] * D + cols, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_tile(tile, first, last, grad, hidden, vis_dst, d_weight, K, D, UPCAST: tl.constexpr,
                 PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    """``d_weight = grad[vis_dst].T @ hidden`` over the visual rows from ``first`` to ``last``, for one tile."""
    block_m, block_n = _tile_position(tile, D, K, M, N, GROUP)
    ds = block_m * M + tl.arange(0, M)
    ks = block_n * N + tl.arange(0, N)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(first, last, STEP):
        rows = start + tl.arange(0, STEP)
        read = tl.load(vis_dst + rows, mask=rows < last, other=-1)
        g_at = grad + read.to(tl.int64)[:, None] * D + ds[None, :]
        g = tl.load(g_at, mask=(read >= 0)[:, None] & (ds < D)[None, :], other=0.0)
        h_at = hidden + rows.to(tl.int64)[:, None] * K + ks[None, :]
        h = tl.load(h_at, mask=(rows < last)[:, None] & (ks < K)[None, :], other=0.0)
        acc = _multiply(tl.trans(g.to(h.dtype)), h, acc, UPCAST, PRECISION)
    at = d_weight + ds.to(tl.int64)[:, None] * K + ks[None, :]
    tl.store(at, acc.to(d_weight.dtype.element_ty), mask=(ds < D)[:, None] & (ks < K)[None, :])


@triton.jit
def _bias_columns(block, first, last, grad, vis_dst, d_bias, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = block * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        read = tl.load(vis_dst + rows, mask=rows < last, other=-1)
        at = grad + read.to(tl.int64)[:, None] * D + cols[None, :]
        acc += tl.load(at, mask=(read >= 0)[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    tl.store(d_bias + cols, tl.sum(acc, 0).to(d_bias.dtype.element_ty), mask=cols < D)


@triton.jit
def weight_grad_kernel(grad, hidden, vis_dst, d_weight, d_bias, V, K, D, tiles, slab_rows, UPCAST: tl.constexpr,
                       PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
                       GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Gradients of weight and bias, read through the row map; one slab of rows per ``program_id(1)``.

    The bias has programs of its own: summing the operand of the product in its loop would end the pipelining.
    """
    program = tl.program_id(0)
    slab = tl.program_id(1)
    first = slab * slab_rows
    last = tl.minimum(first + slab_rows, V)
    if program < tiles:
        at = d_weight + slab.to(tl.int64) * D * K
        _weight_tile(program, first, last, grad, hidden, vis_dst, at, K, D, UPCAST, PRECISION, M, N, STEP, GROUP)
    else:
        _bias_columns(program - tiles, first, last, grad, vis_dst, d_bias + slab * D, D, ROWS, COLS)


@triton.jit
def hidden_grad_kernel(grad, weight, vis_dst, d_hidden, V, K, D, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
                       PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
                       GROUP: tl.constexpr):  # fmt: skip
    """``d_hidden = grad[vis_dst] @ weight``; zeros for dropped rows."""
    block_m, block_n = _tile_position(tl.program_id(0), V, K, M, N, GROUP)
    rows = block_m * M + tl.arange(0, M)
    ks = block_n * N + tl.arange(0, N)
    ds = tl.arange(0, STEP)
    read = tl.load(vis_dst + rows, mask=rows < V, other=-1)
    g_at = grad + read.to(tl.int64)[:, None] * D + ds[None, :]
    w_at = weight + ds.to(tl.int64)[:, None] * K + ks[None, :]
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, D, STEP):
        g_mask = (read >= 0)[:, None]
        w_mask = (ks < K)[None, :]
        if not EVEN_D:
            g_mask = g_mask & (start + ds < D)[None, :]
            w_mask = w_mask & (start + ds < D)[:, None]
        w = tl.load(w_at, mask=w_mask, other=0.0)
        g = tl.load(g_at, mask=g_mask, other=0.0).to(w.dtype)
        acc = _multiply(g, w, acc, UPCAST, PRECISION)
        g_at += STEP
        w_at += STEP * K
    at = d_hidden + rows.to(tl.int64)[:, None] * K + ks[None, :]
    tl.store(at, acc.to(d_hidden.dtype.element_ty), mask=(rows < V)[:, None] & (ks < K)[None, :])


@triton.jit
def table_grad_kernel(grad, seg_order, seg_start, seg_uid, txt_id, txt_dst, d_table, D, ROWS: tl.constexpr,
                      COLS: tl.constexpr):  # fmt: skip
    """The gradient of one token's row, summed over the places where it stands, for COLS columns."""
    segment = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.load(seg_start + segment)
    last = tl.load(seg_start + segment + 1)
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        place = tl.load(seg_order + i, mask=i < last, other=0)
        row = tl.load(txt_dst + place, mask=i < last, other=0)
        counts = (i < last) & (tl.load(txt_id + place, mask=i < last, other=-1) >= 0)
        at = grad + row.to(tl.int64)[:, None] * D + cols[None, :]
        acc += tl.load(at, mask=counts[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    to = d_table + tl.load(seg_uid + segment).to(tl.int64) * D + cols
    tl.store(to, tl.sum(acc, 0).to(d_table.dtype.element_ty), mask=cols < D)
