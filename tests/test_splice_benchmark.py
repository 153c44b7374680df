"""The counts and the exactness of the CPU benchmark hold in every test run; its times are looked at by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "cpu_splice.py"


def test_one_operator_no_syncs_and_the_same_numbers_as_everybody(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--counts-only", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "cpu_splice.json").read_text())
    assert result["counts"]["ours"] == {"operators": 1, "syncs": 0}
    assert result["counts"]["transformers"]["syncs"] == 2
    assert result["counts"]["transformers"]["operators"] >= 12
    assert len(result["largest_difference"]) == 4
    assert max(result["largest_difference"].values()) < 1e-5
    assert result["failures"] == []
