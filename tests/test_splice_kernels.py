"""Proof of the splice's kernels without a GPU: interpreted against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it must not interpret", allow_module_level=True)

from compile_ahead import compile_ahead

from llava_kit.splice_kernels import CONFIGS, Config

REGISTERS = 255
SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""What a block can have; the configurations for 8.0 are meant for 8.6 and 8.9 too, which have less than it."""


def test_the_kernels_mean_what_the_reference_means() -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_splice_interpreted.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def check(role: str, dtype: str, capability: int, config: Config | None) -> None:
    """No spill, room for a block, and the instructions that make it fast."""
    found = compile_ahead(role, dtype, capability, config)
    assert found.stack == 0, f"spills {found.stack} bytes"
    assert found.count("LDL") == found.count("STL") == 0
    assert found.registers <= REGISTERS
    assert found.shared <= SHARED[capability]
    assert found.count("ATOMG") == found.count("RED") == found.count("ATOM") == 0, "atomics have no order"
    if config is None:
        return
    assert found.count("LDGSTS") > 0, "operands are loaded asynchronously"
    if dtype != "fp32":
        assert found.count("HGMMA" if capability == 90 else "HMMA") > 0


@pytest.mark.parametrize(("role", "bits", "capability"), CONFIGS)
def test_a_shipped_configuration_fits(role: str, bits: str, capability: int) -> None:
    dtype = "bf16" if bits == "16" else "fp32"
    check(role, dtype, capability, CONFIGS[role, bits, capability])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("role", ["rows", "gather", "table_grad"])
def test_a_kernel_that_only_moves_rows_fits(role: str, capability: int) -> None:
    check(role, "bf16", capability, None)


def test_a_spill_would_show() -> None:
    config = replace(CONFIGS["project", "16", 90], warps=4)
    assert compile_ahead("project", "bf16", 90, config).stack > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("role", ["project", "weight_grad", "hidden_grad", "rows", "gather", "table_grad"])
def test_the_full_matrix_fits(role: str, dtype: str, capability: int) -> None:
    config = CONFIGS.get((role, "32" if dtype == "fp32" else "16", 90 if capability == 90 else 80))
    found = compile_ahead(role, dtype, capability, config)
    assert found.stack == 0
    assert found.shared <= SHARED[90 if capability == 90 else 80]
