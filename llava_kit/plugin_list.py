"""Who provides what: the installed plugins as rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_kit.registry import Registry, default_registry

if TYPE_CHECKING:
    from rich.table import Table


def describe_plugins(registry: Registry | None = None) -> list[dict[str, Any]]:
    """Every plugin found: name, package, version, state (``ok``, ``blocked`` or ``failed``), reason and components."""
    registry = registry or default_registry()
    rows = []
    for plugin in registry.plugins:
        provided = sorted(
            (component.kind, component.name)
            for component in registry.components.values()
            if component.plugin.name == plugin.name and component.plugin.package == plugin.package
        )
        rows.append(
            {
                "name": plugin.name,
                "package": plugin.package,
                "version": plugin.version,
                "state": "failed" if plugin.failure else "blocked" if plugin.blocked else "ok",
                "reason": plugin.failure,
                "components": [{"kind": kind, "name": name} for kind, name in provided],
            }
        )
    return rows


def plugin_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of :func:`describe_plugins` for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table("plugin", "package", "provides")
    for row in rows:
        provided = "\n".join(f"{component['kind']}: {component['name']}" for component in row["components"])
        state = "" if row["state"] == "ok" else f"{row['state']} {row['reason']}".strip()
        package = f"{row['package']} {row['version']}"
        table.add_row(Text(row["name"]), Text(package), Text(state, style="red") if state else Text(provided))
    return table
