"""Finds plugins, collects the components they register, and looks them up by exact name.

Every plugin is loaded on its own and registers all or nothing: one that fails to import, names a hook that does not
exist or clashes with another is recorded with its package and version, and harms nobody who does not need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pluggy

from llava_kit import hookspecs
from llava_kit.errors import PluginError, Problem, nearest

ENTRY_POINT_GROUP = "llava_kit"
BLOCK_VARIABLE = "LLAVA_KIT_BLOCK_PLUGINS"
HOOK_PREFIX = "register_"
RESERVED_KEYS = {"data_formats": {"format", "share", "samples"}}
"""Keys of a recipe's plugin slots that are not the plugin's own; ``name`` for all other kinds."""


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """Where a plugin comes from and what became of it."""

    name: str
    package: str
    version: str
    module: str
    failure: str = ""
    blocked: bool = False

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.package} {self.version})"


@dataclass(frozen=True, kw_only=True)
class Component:
    """A registered component: what a recipe may name in a slot of this kind."""

    kind: str
    name: str
    build: Callable[..., Any]
    config: type[Any]
    plugin: PluginInfo


@dataclass
class Registry:
    """All components by kind and name, and the fate of every plugin found."""

    plugins: list[PluginInfo] = field(default_factory=list)
    components: dict[tuple[str, str], Component] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    @property
    def kinds(self) -> list[str]:
        """The kinds of component, as in the hooks' names: ``vision_encoders``, ``connectors``, …"""
        return [name.removeprefix(HOOK_PREFIX) for name in vars(hookspecs) if name.startswith(HOOK_PREFIX)]

    def names(self, kind: str) -> list[str]:
        """The registered names of one kind, sorted."""
        return sorted(name for of_kind, name in self.components if of_kind == kind)

    def get(self, kind: str, name: str) -> Component:
        """The component registered as ``name``.

        Raises:
            PluginError: there is none; the message has the nearest name, and the plugins that failed or are blocked.
        """
        try:
            return self.components[kind, name]
        except KeyError:
            absent = [f"{p} {'is blocked' if p.blocked else 'failed: ' + p.failure}" for p in self.absent]
            found = nearest(name, self.names(kind))
            installed = [] if found.startswith("did you mean") else ["`llava-kit plugins list` shows what is installed"]
            hint = "; ".join([found, *installed, *absent])
            raise PluginError(Problem("", f"no {kind} named '{name}'", hint)) from None

    @property
    def absent(self) -> list[PluginInfo]:
        """Plugins that were found but are not in use: failed or blocked."""
        return [plugin for plugin in self.plugins if plugin.failure or plugin.blocked]

    def add_plugin(self, plugin: object, info: PluginInfo) -> None:
        """Take in everything ``plugin`` (a module or object with hook implementations) registers, or nothing."""
        name = f"{info} #{len(self.plugins)}"  # packages may name their entry points alike, pluggy's plugins may not
        try:
            self._manager.register(plugin, name=name)
            self._refuse_unknown_hooks(plugin)
            with contextlib.redirect_stdout(sys.stderr):
                staged = self._collect(plugin, info)
        except BaseException as error:  # noqa: BLE001  (a plugin may raise anything, SystemExit too)
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._record_failure(info, error)
            return
        self.components.update(staged)
        self.plugins.append(info)

    def add_entry_point(self, entry: importlib.metadata.EntryPoint, info: PluginInfo) -> None:
        """Import a plugin and take it in; a failed import is recorded with its reason."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a chatty import must not end up in --json output
                plugin = entry.load()
        except BaseException as error:  # noqa: BLE001  (a plugin may raise anything, SystemExit too)
            self._record_failure(info, error)
            return
        self.add_plugin(plugin, info)

    def _record_failure(self, info: PluginInfo, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        self.plugins.append(dataclasses.replace(info, failure=" ".join(reason.split())))

    def _refuse_unknown_hooks(self, plugin: object) -> None:
        known = [HOOK_PREFIX + kind for kind in self.kinds]
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            raise PluginError(Problem("", "it implements no hook", "mark its hooks with @llava_kit.hookimpl"))
        for caller in callers:
            if not caller.has_spec():
                raise PluginError(Problem("", f"there is no hook '{caller.name}'", nearest(caller.name, known)))

    def _collect(self, plugin: object, info: PluginInfo) -> dict[tuple[str, str], Component]:
        staged: dict[tuple[str, str], Component] = {}
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        for caller in self._manager.get_hookcallers(plugin) or []:
            kind = caller.name.removeprefix(HOOK_PREFIX)

            def register(name: str, build: Callable[..., Any], config: type[Any], kind: str = kind) -> None:
                component = Component(kind=kind, name=name, build=build, config=config, plugin=info)
                _check_component(component)
                earlier = staged.get((kind, name)) or self.components.get((kind, name))
                if earlier is not None:
                    hint = f"block one of the two: {_how_to_block(earlier.plugin, info)}"
                    what = f"{kind} '{name}' is registered by {earlier.plugin} already"
                    raise PluginError(Problem("", what, hint))
                staged[kind, name] = component

            self._manager.subset_hook_caller(caller.name, others)(register=register)
        return staged


def _check_component(component: Component) -> None:
    """Refuse a registration that could not work later, while it is clear who made it."""
    config: Any = component.config
    where = f"{component.kind} '{component.name}'"
    if not isinstance(component.name, str) or not component.name:
        raise PluginError(Problem(component.kind, f"a name must be a non-empty string, got {component.name!r}"))
    if not callable(component.build):
        raise PluginError(Problem(where, f"build must be callable, got {type(component.build).__name__}"))
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise PluginError(Problem(where, f"config must be a dataclass type, got {config!r}"))
    if not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PluginError(Problem(where, f"{config.__name__} must be frozen", "@dataclass(frozen=True, kw_only=True)"))
    taken = sorted({f.name for f in dataclasses.fields(config)} & RESERVED_KEYS.get(component.kind, {"name"}))
    if taken:
        what = f"{config.__name__} has a field '{taken[0]}', which a recipe uses for itself"
        raise PluginError(Problem(where, what, "give it another name"))
    positional = [f.name for f in dataclasses.fields(config) if f.init and not f.kw_only]
    if positional:
        what = f"the fields of {config.__name__} must be keyword-only, {positional[0]} is not"
        raise PluginError(Problem(where, what, "@dataclass(frozen=True, kw_only=True)"))


def _how_to_block(one: PluginInfo, other: PluginInfo) -> str:
    names = (one.name, other.name) if one.name != other.name else (one.package, other.package)
    return f"{BLOCK_VARIABLE}={names[0]} or ={names[1]}"


def _describe(entry: importlib.metadata.EntryPoint) -> PluginInfo:
    distribution = entry.dist
    package, version = (distribution.name, distribution.version) if distribution else ("unknown package", "?")
    return PluginInfo(name=entry.name, package=package, version=version, module=entry.value)


def load_registry(
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None, blocked: Iterable[str] | None = None
) -> Registry:
    """Load every installed plugin that is not blocked, in the order of package and name.

    Args:
        entry_points: what to load; by default all entry points of the group ``llava_kit``.
        blocked: plugins or packages to leave out; by default those in ``LLAVA_KIT_BLOCK_PLUGINS``, separated by commas.
    """
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if blocked is None:
        blocked = os.environ.get(BLOCK_VARIABLE, "").split(",")
    blocked_names = {name.strip() for name in blocked}
    registry = Registry()
    found = {(info.package != "llava-kit", info.package, info.name): (entry, info)
             for entry, info in ((entry, _describe(entry)) for entry in entry_points)}  # fmt: skip
    for _, (entry, info) in sorted(found.items()):
        if blocked_names & {info.name, info.package}:
            registry.plugins.append(dataclasses.replace(info, blocked=True))
        else:
            registry.add_entry_point(entry, info)
    return registry


@cache
def default_registry() -> Registry:
    """The registry of this process; plugins load when it is first asked for."""
    return load_registry()
