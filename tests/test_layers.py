"""Who may import whom: the picture of the architecture, held by a walk over the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import from tiers below its own, and inside its own tier from modules to the right of it.
TIERS = [
    ["__main__", "cli", "cli_checkpoints", "cli_output", "talk", "plugin_list", "failures"],
    ["run"],
    ["smoke", "watch", "trainer", "evaluate"],
    ["preview", "inspection", "estimates", "report", "report_page", "report_style", "charts", "record"],
    ["exporting", "parity", "interop", "importing"],
    ["layout_hf", "layout_llava", "parts"],
    ["chat"],
    ["model", "checkpoint", "schedule"],
    [
        "loader",
        "data",
        "plan",
        "order",
        "grouping",
        "images",
        "tokens",
        "losses",
        "splice",
        "splice_dispatch",
        "splice_triton",
        "splice_backends",
        "splice_kernels",
        "parallel",
        "environment",
        "weights",
        "adapters",
    ],
    ["json_records", "printing"],
    ["recipe", "recipe_bind", "recipe_spelling", "recipe_yaml"],
    ["registry"],
    ["hookspecs"],
    ["parity_stock"],
]
ANYWHERE = {"contracts", "errors"}
PLUGINS_MAY_USE = {
    "contracts",
    "errors",
    "hookspecs",
    "splice",
    "weights",
    "images",
    "json_records",
    "tokens",
    "adapters",
}
"""What of llava_kit our own plugins use; these names are as public for everybody else."""


def imports(path: Path, *, type_checking: bool = False) -> Iterator[str]:
    """Dotted names a file imports, at any depth; those for type checkers only are left out unless asked for."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped: set[int] = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "llava_kit":
                yield from (f"llava_kit.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rank(module: str) -> tuple[int, int]:
    for tier, names in enumerate(TIERS):
        if module in names:
            return tier, names.index(module)
    raise AssertionError(f"llava_kit.{module} has no place in the picture; give it one in TIERS")


MODULES = sorted(
    path for path in (ROOT / "llava_kit").glob("*.py") if path.stem not in {"__init__", "testing"} | ANYWHERE
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_downwards(path: Path) -> None:
    own = rank(path.stem)
    for name in imports(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "llava_kit" and target and target not in ANYWHERE:
            assert rank(target) > own, f"{path.stem} must not import {target}"


def test_the_framework_names_no_plugin() -> None:
    for path in (ROOT / "llava_kit").glob("*.py"):
        assert "llava_kit_plugins" not in path.read_text("utf-8"), path.name


def test_contracts_import_torch_and_nothing_else_of_weight() -> None:
    allowed = {"__future__", "collections.abc", "dataclasses", "typing", "torch"}
    assert set(imports(ROOT / "llava_kit" / "contracts.py")) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda path: path.stem)
def test_plugins_use_public_names_and_not_each_other(path: Path) -> None:
    for name in imports(path, type_checking=True):
        top, _, rest = name.partition(".")
        assert top != "llava_kit_plugins" or path.stem == "base_models", f"{path.name} imports another plugin"
        if top == "llava_kit":
            assert rest.split(".")[0] in PLUGINS_MAY_USE | {"hookimpl"}, f"{path.name} imports {name}"


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, llava_kit; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
