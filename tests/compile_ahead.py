"""Compiles the splice kernels for a GPU that need not be there, and reads off what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_kit import splice_kernels as kernels
from llava_kit.splice_kernels import Config

NAMES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
EVEN = {"V", "S", "K", "D", "slab_rows"}
"""Sizes that are multiples of 16 here, as a launch with such sizes tells the compiler too."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of stack (a spill), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction occurs."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def arguments(role: str, dtype: str, config: Config | None) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel of a role, the types of its runtime arguments, and its constants."""
    t, i = NAMES[dtype], "*i32"
    maps = {"txt_id": i, "txt_dst": i, "seg_order": i, "seg_start": i, "seg_uid": i, "vis_dst": i}
    types = maps | dict.fromkeys(("V", "S", "K", "D", "tiles", "programs", "slab_rows"), "i32")
    floats = ("hidden", "weight", "bias", "table", "out", "grad", "d_weight", "d_bias", "d_hidden", "d_table", "visual")
    types |= dict.fromkeys(floats, t)
    constants: dict[str, Any] = {"UPCAST": False, "PRECISION": "ieee", "HAS_BIAS": True, "EVEN_K": True, "EVEN_D": True}
    if config is not None:
        constants |= {"M": config.m, "N": config.n, "STEP": config.k, "GROUP": 8}
    rows, cols = {"rows": (8, 1024), "gather": (8, 1024), "table_grad": (16, 128)}.get(role, (8, 1024))
    if role == "weight_grad":
        rows, cols = 64, 64
    return getattr(kernels, f"{role}_kernel"), types, constants | {"ROWS": rows, "COLS": cols}


def compile_ahead(role: str, dtype: str, capability: int, config: Config | None, *, stages: int = 3) -> Resources:
    """Compile one kernel for ``sm_<capability>`` at even sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = arguments(role, dtype, config)
    names = kernel.arg_names
    constexprs = {name: constants[name] for name in names if name in constants}
    signature = {name: "constexpr" if name in constexprs else types[name] for name in names}
    even = [n for n in names if signature[n].startswith("*") or n in EVEN]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    warps = config.warps if config else 4
    options = {"num_warps": warps, "num_stages": config.stages if config else stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Resources(int(found[1]), int(found[2]), int(built.metadata.shared), str(built.asm["sass"]))
