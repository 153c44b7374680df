"""Binds a recipe's nodes to typed dataclasses, each plugin's keys to its own, and reports every mistake it meets.

What a field may be: ``str``, ``int``, ``float``, ``bool``, ``Literal``, unions of these with ``None``, ``list``,
``tuple``, ``dict[str, …]``, ``Any``, other dataclasses and :class:`Slot`.  Fields steer their reading by metadata:
``kind`` (the kind of plugin in a slot), ``inline`` (the slot's keys stand beside the other fields'), ``spell`` (turns a
short form into the full one), ``check`` (complaints about a value by itself) and ``internal`` (no key of the recipe).
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava_kit.errors import PluginError, Problem, nearest
from llava_kit.recipe_yaml import KeyPath, Node, at, shown
from llava_kit.registry import Component, Registry

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_IN_DOUBT = "write a number plainly, text in quotes"


@dataclass(frozen=True)
class Slot:
    """A place of the recipe that a plugin fills: the component, and its config with the recipe's values."""

    component: Component
    config: Any

    @property
    def name(self) -> str:
        return self.component.name

    def build(self, **kwargs: Any) -> Any:
        """The component itself; ``kwargs`` are what its kind is built with (connectors: ``in_dim``, ``out_dim``)."""
        return self.component.build(self.config, **kwargs)


class UnreadableError(Exception):
    """A value cannot be used; why is among the binder's problems."""


class Binder:
    """Reads nodes as types; mistakes go to ``problems`` and reading goes on."""

    def __init__(self, registry: Registry, problems: list[Problem]) -> None:
        self.registry = registry
        self.problems = problems

    def _fail(self, node: Node, path: KeyPath, what: str, hint: str = "") -> NoReturn:
        self.problems.append(at(node.where, path, what, hint))
        raise UnreadableError(what)

    def read(self, hint: Any, node: Node, path: KeyPath, kind: str = "") -> Any:
        """The node as a value of type ``hint``.

        Raises:
            UnreadableError: it is none; the reason has been added to ``problems``.
        """
        if node.broken:
            raise UnreadableError("broken")
        if node.value == "???":
            self._fail(node, path, "has no value yet")
        if hint is Slot:
            return self._slot(node, path, kind, "name")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.dataclass(hint, node, path)
        origin, args = get_origin(hint) or hint, get_args(hint)
        if origin in (Union, types.UnionType):
            concrete = [arg for arg in args if arg is not types.NoneType]
            if node.value is None and len(concrete) < len(args):
                return None
            if len(concrete) == 1:
                return self.read(concrete[0], node, path, kind)
        if origin is dict:
            return self._dict(args[1] if args else Any, node, path, kind)
        if origin in (list, tuple):
            return self._sequence(origin, args, node, path)
        return self._anything(node, path) if hint is Any else self._scalar(hint, node, path)

    def _scalar(self, hint: Any, node: Node, path: KeyPath) -> Any:
        value, literal = node.value, get_origin(hint) is Literal
        wanted = _WANTED.get(hint) or (f"one of {', '.join(map(str, get_args(hint)))}" if literal else str(hint))
        if isinstance(value, (dict, list)) or value is None or (hint is bool and type(value) is int):
            self._fail(node, path, f"must be {wanted}, got {shown(node)}")
        if hint is str:
            return value if isinstance(value, str) else node.text
        if node.doubt:
            self._fail(node, path, f"must be {wanted}, but {node.doubt}", _IN_DOUBT)
        self._finite(value, node, path)
        try:
            result: Any = OmegaConf.to_object(DictConfig({"value": value}, element_type=hint))
        except OmegaConfBaseException:
            near = nearest(str(value), [str(arg) for arg in get_args(hint)]) if literal else ""
            self._fail(node, path, f"must be {wanted}, got {shown(node)}", near)
        return self._finite(result["value"], node, path)

    def _finite(self, value: Any, node: Node, path: KeyPath) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(node, path, f"must be a finite number, got {shown(node)}")
        if isinstance(value, int) and abs(value) >= 2**63:
            self._fail(node, path, f"must be below 2^63, got {shown(node)}")
        return value

    def _anything(self, node: Node, path: KeyPath) -> Any:
        if isinstance(node.value, dict):
            return self._dict(Any, node, path)
        if isinstance(node.value, list):
            return self._sequence(list, (), node, path)
        if node.doubt:
            self._fail(node, path, node.doubt, _IN_DOUBT)
        return self._finite(node.value, node, path)

    def _dict(self, hint: Any, node: Node, path: KeyPath, kind: str = "") -> dict[str, Any]:
        """A mapping by name; entries that are null are left out where entries are mappings themselves."""
        if not isinstance(node.value, dict):
            self._fail(node, path, f"must be a mapping, got {shown(node)}")
        nested = hint is Slot or dataclasses.is_dataclass(hint)
        entries = {key: one for key, one in node.value.items() if not (nested and one.value is None and not one.broken)}
        values = self._all([(hint, one, (*path, key)) for key, one in entries.items()], kind)
        return dict(zip(entries, values, strict=True))

    def _sequence(self, origin: Any, args: tuple[Any, ...], node: Node, path: KeyPath) -> Any:
        if not isinstance(node.value, list):
            self._fail(node, path, f"must be a list, got {shown(node)}")
        length = len(node.value)
        hints: Sequence[Any] = args or (Any, ...)
        if origin is list or Ellipsis in hints:
            hints = [hints[0]] * length
        if len(hints) != length:
            self._fail(node, path, f"must have {len(hints)} values, got {length}")
        items = zip(hints, node.value, strict=True)
        return origin(self._all([(hint, item, (*path, index)) for index, (hint, item) in enumerate(items)]))

    def _all(self, parts: Sequence[tuple[Any, Node, KeyPath]], kind: str = "") -> list[Any]:
        """Read all parts, also behind a wrong one."""
        values, failed = [], False
        for hint, node, path in parts:
            try:
                values.append(self.read(hint, node, path, kind))
            except UnreadableError:
                failed = True
        if failed:
            raise UnreadableError("a part is unreadable")
        return values

    def dataclass(self, cls: Any, node: Node, path: KeyPath, beside: Sequence[str] = ()) -> Any:
        """An instance of the dataclass ``cls`` with the node's values; ``beside`` are keys that others read.

        Unknown keys, missing keys, wrong values and each argument of a ``ValueError`` from ``cls`` are reported.
        """
        if not isinstance(node.value, dict):
            self._fail(node, path, f"must be a mapping, got {shown(node)}")
        hints = self._hints(cls, node, path)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")}
        inline = next((name for name, f in fields.items() if f.metadata.get("inline")), "")
        if not inline:
            self._refuse_unknown(cls, node, path, [*fields, *beside])
        values, failed = dict[str, Any](), set[str]()
        for name, one in fields.items():
            try:
                if name == inline:
                    others = [other for other in fields if other != inline]
                    values[name] = self._slot(node, path, one.metadata["kind"], inline, others)
                elif name in node.value:
                    entry = one.metadata.get("spell", _as_written)(node.value[name])
                    values[name] = self.read(hints[name], entry, (*path, name), one.metadata.get("kind", ""))
                    self._complain(complaints(one, values[name]), node, path)
                elif _required(one):
                    self._fail(node, (*path, name), "is missing")
            except UnreadableError:
                failed.add(name)
        if any(_required(fields[name]) for name in failed):
            raise UnreadableError("a required value is unreadable")
        return self._construct(cls, values, failed, node, path)

    def _construct(self, cls: Any, values: dict[str, Any], failed: set[str], node: Node, path: KeyPath) -> Any:
        """Let ``cls`` check ranges and relations; complaints begin with the key they are about."""
        try:
            instance = cls(**values)
        except ValueError as error:
            # A complaint that begins with a failed key is about the default that stands in for it.
            told = [message for message in map(str, error.args) if _keys(message)[0] not in failed]
            self._complain(told, node, path)
            raise UnreadableError("refused by its class") from error
        if failed:
            raise UnreadableError("a value is unreadable")
        return instance

    def _complain(self, messages: Iterable[str], node: Node, path: KeyPath) -> None:
        for message in messages:
            problem = at(nearest_place(node, _keys(message)), path, message)
            if problem not in self.problems:
                self.problems.append(problem)

    def _refuse_unknown(self, cls: Any, node: Node, path: KeyPath, known: Sequence[str]) -> None:
        for key, entry in node.value.items():
            if key not in known:
                what = f"Key '{key}' not in '{cls.__name__}'"
                self.problems.append(at(entry.where, (*path, key), what, nearest(key, known)))

    def _hints(self, cls: Any, node: Node, path: KeyPath) -> dict[str, Any]:
        try:
            return get_type_hints(cls)
        except (NameError, TypeError, AttributeError) as error:
            self._fail(node, path, f"the types of {cls.__module__}.{cls.__name__} cannot be read: {error}")

    def _slot(self, node: Node, path: KeyPath, kind: str, key: str, beside: Sequence[str] = ()) -> Slot:
        """The plugin that ``key`` names, its config read from the other keys."""
        if not isinstance(node.value, dict):
            self._fail(node, path, f"must be a name or a mapping with '{key}', got {shown(node)}")
        if key not in node.value:
            near = get_close_matches(key, list(node.value), n=1)
            names = f"one of {', '.join(self.registry.names(kind))}"
            self._fail(node, (*path, key), "is missing", f"did you mean '{key}' by '{near[0]}'?" if near else names)
        name = self.read(str, node.value[key], (*path, key))
        try:
            component = self.registry.get(kind, name)
        except PluginError as error:
            [problem] = error.problems
            self._fail(node.value[key], (*path, key), problem.what, problem.hint)
        others = (key, *beside)
        rest = Node({name: entry for name, entry in node.value.items() if name not in others}, node.where)
        return Slot(component, self.dataclass(component.config, rest, path, others))


def _as_written(node: Node) -> Node:
    return node


def _keys(message: str) -> list[str]:
    """The keys a complaint begins with: ``component_lr.connector must be …``"""
    return re.split(r"[^\w.-]", message, maxsplit=1)[0].split(".")


def complaints(one: dataclasses.Field[Any], value: Any) -> list[str]:
    """What the field's ``check`` has against a value by itself; each begins with the field's name."""
    check = one.metadata.get("check")
    return [] if check is None or value is None else list(check(one.name, value))


def _required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def nearest_place(node: Node, keys: Sequence[str]) -> str:
    """Where the value was written that ``keys`` lead to, as far as they lead."""
    for key in keys:
        if not isinstance(node.value, dict) or key not in node.value:
            break
        node = node.value[key]
    return node.where
