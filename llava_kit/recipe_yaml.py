"""Recipe text: YAML in which every value knows where it was written, ``extends``, dotted overrides, ``${references}``.

A recipe is data.  Nothing in it is called or imported, and nothing is read from the environment.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from llava_kit.errors import Problem, RecipeError, nearest

SHIPPED_PACKAGE = "llava_kit_recipes"
MAX_CHARS = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_TEXT = 10_000
_TOO_MUCH = f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels"

KeyPath = tuple[str | int, ...]

SLOTS: dict[tuple[str, ...], str] = {
    ("model", "*"): "name",
    ("prepare", "*"): "name",
    ("evaluate", "*"): "name",
    ("stages", "*", "template"): "name",
    ("stages", "*", "data", "*"): "format",
}
"""Where a recipe names a plugin, and the key that holds the name; a plain string there is short for that key alone."""
NAMED: tuple[tuple[str, ...], ...] = (("prepare",), ("stages",), ("stages", "*", "data"), ("evaluate",))
"""Mappings whose keys the recipe's author chooses; ``null`` takes an inherited entry out."""


@dataclass
class Node:
    """A value of a recipe (a mapping or list of nodes, or a scalar) and where it was written."""

    value: Any
    where: str
    text: str = ""
    """A scalar as written: what counts where text is wanted (``revision: 1e5``)."""
    doubt: str = ""
    """Why a scalar is refused everywhere but where text is wanted."""
    broken: bool = False
    """A problem has been reported already."""


def key_name(path: KeyPath) -> str:
    """``("optimizer", "betas", 0)`` -> ``optimizer.betas[0]``"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def at(where: str, path: KeyPath, what: str, hint: str = "") -> Problem:
    """A problem with the value of a key: ``where: full.key.path: what; hint``."""
    return Problem(f"{where}: {key_name(path)}" if path else where, what, hint)


# --- text to nodes ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 as OmegaConf reads it: ``1e-5`` is a number and dates are text; and not nested without end."""

    depth = 0
    count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, _TOO_MUCH, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name: name for name in ("null", "bool", "int", "float", "str")}
_REFUSED = "the tag '{}' is refused"
_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_LEADING_ZERO = re.compile(r"^[-+]?0[\d_]+$")
_BASE_60 = re.compile(r"^[-+]?\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?$")

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag in _SCALARS or tag == _TAG + "merge"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+0123456789."))


class _Reader:
    """Turns one YAML text into nodes; mistakes that leave the rest readable are added to ``problems``."""

    def __init__(self, place: Callable[[int], str], problems: list[Problem]) -> None:
        self.place = place
        self.problems = problems
        self.count = 0

    def read(self, text: str, path: KeyPath = ()) -> Node | None:
        """The node of a whole text, ``None`` when it is empty; a ``RecipeError`` when it is not YAML or too large."""
        if len(text) > MAX_CHARS:
            raise RecipeError(at(self.place(1), path, f"longer than {MAX_CHARS:,} characters", "a recipe is short"))
        try:
            root = yaml.compose(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two from "\\U12345678"
            mark = getattr(error, "problem_mark", None)
            what = getattr(error, "problem", None) or getattr(error, "reason", str(error))
            where = self.place(mark.line + 1 if mark else 1)
            hint = "inside { } or [ ] put text with ${…} in quotes" if "${" in text else ""
            raise RecipeError(at(where, path, f"not valid YAML: {what}", hint)) from error
        return None if root is None else self._node(root, self._where(root), path)

    def _where(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)

    def _node(self, node: yaml.Node, where: str, path: KeyPath) -> Node:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            raise RecipeError(at(where, path[:1], f"{_TOO_MUCH} once its aliases are written out"))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, where, path)
        standard = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _TAG + standard:
            return self._broken(where, path, _REFUSED.format(node.tag), "a recipe is plain data")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where, path)
        items = [self._node(item, self._where(item), (*path, index)) for index, item in enumerate(node.value)]
        return Node(items, where)

    def _mapping(self, node: yaml.MappingNode, where: str, path: KeyPath) -> Node:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            place = self._where(key)
            if key.tag == _TAG + "merge":
                self._broken(place, path, "'<<' is not supported", "a recipe takes over another with 'extends'")
            elif key.tag != _TAG + "str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a mapping or list"
                self._broken(place, path, f"the key {shown} is not text", "put it in quotes")
            elif key.value in entries:
                first = entries[key.value].where
                self._broken(place, (*path, key.value), f"given twice, first at {first}", "remove one of the two")
            else:
                entries[key.value] = self._node(value, place, (*path, key.value))
        return Node(entries, where)

    def _scalar(self, node: yaml.ScalarNode, where: str, path: KeyPath) -> Node:
        kind = _SCALARS.get(node.tag)
        if kind is None:
            return self._broken(where, path, _REFUSED.format(node.tag), "a recipe is plain data")
        try:
            node.value.encode()
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, LookupError) as error:
            return self._broken(where, path, f"{node.value!r:.80} is not of type {kind}", str(error)[:80])
        doubt = ""
        if node.style is None and (_LEADING_ZERO.match(node.value) or _BASE_60.match(node.value)):
            doubt = f"'{node.value}' reads as {value!r} in YAML"
        return Node(value, where, text=node.value, doubt=doubt)

    def _broken(self, where: str, path: KeyPath, what: str, hint: str) -> Node:
        self.problems.append(at(where, path, what, hint))
        return Node(None, where, broken=True)


# --- files and what they extend --------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A recipe's text, the name it has in messages, and its folder (``None`` inside the shipped package)."""

    label: str
    text: str
    folder: Path | None


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    try:
        folder = importlib.resources.files(SHIPPED_PACKAGE)
    except ModuleNotFoundError:
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_tree(target: str | Path, problems: list[Problem]) -> tuple[Node, str]:
    """A recipe merged over everything it extends, and its name for messages.

    Raises:
        RecipeError: a file is missing, is not YAML or holds no mapping, or the recipes extend each other in a circle.
    """
    file = _find(str(target), None, "")
    label, layers, seen = file.label, list[Node](), list[str]()
    while True:
        identity = str(file.folder.resolve() / Path(file.label).name) if file.folder else file.label
        if identity in seen:
            raise RecipeError(Problem(label, f"extends itself by way of {file.label}"))
        seen.append(identity)
        layers.append(_read_file(file, problems))
        parent = layers[-1].value.pop("extends", None)
        if parent is None or parent.value is None:
            break
        where = f"{parent.where}: extends"
        if not isinstance(parent.value, str) or "${" in parent.value:
            raise RecipeError(Problem(where, "must be the file or name of one recipe"))
        file = _find(parent.value, file, where)
    tree = spell_out_slots(layers.pop())
    while layers:
        tree = spell_out_slots(_merge(tree, layers.pop()))
    return tree, label


def _find(target: str, child: _File | None, where: str) -> _File:
    """The recipe of a path (relative to the file that extends it) or of a shipped name."""
    if child is None or child.folder is not None:
        path = Path(target) if child is None or child.folder is None else child.folder / target
        if os.path.isfile(path):  # noqa: PTH113  (false, where Path.is_file() raises, for a name no file can have)
            return _read_path(path, where)
        if path.suffix and os.path.exists(path):  # noqa: PTH110
            raise RecipeError(Problem(where or target, f"'{path}' is not a regular file"))
    name, shipped = target.removeprefix("recipes/").removesuffix(".yaml"), shipped_recipes()
    if name not in shipped:
        hint = f"give the path of a file or the name of a shipped recipe; {nearest(name, shipped)}"
        raise RecipeError(Problem(where or target, f"there is no recipe '{target}'", hint))
    text = (importlib.resources.files(SHIPPED_PACKAGE) / f"{name}.yaml").read_text(encoding="utf-8")
    return _File(f"{name}.yaml", text, None)


def _read_path(path: Path, where: str) -> _File:
    try:
        size = path.stat().st_size
        if size > 4 * MAX_CHARS:
            raise RecipeError(Problem(str(path), f"{size:,} bytes is too large for a recipe"))
        return _File(str(path), path.read_text(encoding="utf-8-sig"), path.parent)
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(str(path), f"is not UTF-8 text: {error.reason} at byte {error.start}")) from error
    except OSError as error:
        raise RecipeError(Problem(where or str(path), f"cannot be read: {error.strerror} ({path})")) from error


def _read_file(file: _File, problems: list[Problem]) -> Node:
    root = _Reader(lambda line: f"{file.label}:{line}", problems).read(file.text)
    if root is None or not isinstance(root.value, dict):
        found = "is empty" if root is None or root.value is None else f"holds {shown(root)}"
        raise RecipeError(Problem(file.label, found, "a recipe is a mapping with name, model and stages"))
    return root


def _merge(parent: Node, child: Node, path: KeyPath = ()) -> Node:
    """Mappings merge, everything else replaces; so does a slot that names another plugin."""
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    name = _slot_key(path)
    if name in child.value and name in parent.value and child.value[name].value != parent.value[name].value:
        return child
    merged = dict(parent.value)
    for key, value in child.value.items():
        merged[key] = _merge(merged[key], value, (*path, key)) if key in merged else value
    return Node(merged, child.where)


def _matches(path: KeyPath, pattern: tuple[str, ...]) -> bool:
    return len(path) == len(pattern) and all(want in ("*", key) for key, want in zip(path, pattern, strict=True))


def _slot_key(path: KeyPath) -> str:
    return next((name for pattern, name in SLOTS.items() if _matches(path, pattern)), "")


def spell_out_slots(node: Node, path: KeyPath = ()) -> Node:
    """Write ``connector: mlp`` as ``connector: {name: mlp}``, wherever a plugin is named."""
    name = _slot_key(path)
    if name and isinstance(node.value, str):
        return Node({name: node}, node.where)
    if isinstance(node.value, dict) and len(path) < max(map(len, SLOTS)):
        node.value = {key: spell_out_slots(value, (*path, key)) for key, value in node.value.items()}
    return node


def walk(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Every node below and including this one, with its key path."""
    yield path, node
    if isinstance(node.value, (dict, list)):
        for key, child in node.value.items() if isinstance(node.value, dict) else enumerate(node.value):
            yield from walk(child, (*path, key))


def shown(node: Node) -> str:
    """A value as a message shows it."""
    if isinstance(node.value, (dict, list)):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    return "null" if node.value is None else f"'{node.text or node.value!s:.80}'"


# --- overrides -------------------------------------------------------------------------------------------------------


def apply_override(root: Node, override: str, problems: list[Problem]) -> Node:
    """The tree after one ``dotted.key=value``; the value is YAML, as in a file."""
    where, (name, equals, text) = f"override '{override}'", override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        problems.append(Problem(where, "must be key=value", "for example stages.align.optimizer.lr=1e-3"))
        return root
    try:
        value = _Reader(lambda line: where, problems).read(text, tuple(keys)) or Node("", where)
        _set(root, keys, value)
    except RecipeError as error:
        problems.extend(error.problems)
    return spell_out_slots(root)


def _set(root: Node, keys: Sequence[str], value: Node) -> None:
    node = root
    for depth, key in enumerate(keys):
        path = tuple(keys[:depth])
        if not isinstance(node.value, dict):
            raise RecipeError(at(value.where, path, f"has no key '{key}', it is {shown(node)}"))
        entry, last = node.value.get(key), depth == len(keys) - 1
        chosen = any(_matches(path, pattern) for pattern in NAMED)
        if entry is None and chosen and (not last or value.value is None):
            hint = nearest(key, list(node.value))
            raise RecipeError(at(value.where, (*path, key), f"there is no '{key}' in {key_name(path)}", hint))
        if last:
            node.value[key] = value
        elif entry is None or entry.value is None:
            node.value[key] = Node({}, value.where)
        node = node.value[key]


# --- references ------------------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\{\s*([\w-]+(?:\.[\w-]+)*)\s*\}")


class _WrongReferenceError(Exception):
    """Its arguments are what is wrong and a hint; there are none where the cause has been reported elsewhere."""


class Resolver:
    """Replaces ``${dotted.key}`` by the value of that key, in place."""

    def __init__(self, root: Node, problems: list[Problem]) -> None:
        self.root = root
        self.problems = problems
        self.active: list[str] = []

    def run(self) -> None:
        """Resolve every reference of the tree; wrong ones are reported and marked."""
        for path, node in list(walk(self.root)):
            self._resolve(node, key_name(path))

    def _resolve(self, node: Node, name: str) -> None:
        if node.broken or not isinstance(node.value, str) or "${" not in node.value:
            return
        self.active.append(name)
        try:
            self._replace(node, node.value)
        except _WrongReferenceError as error:
            node.broken = True
            if error.args:
                self.problems.append(Problem(f"{node.where}: {name}", *error.args))
        finally:
            self.active.pop()

    def _replace(self, node: Node, text: str) -> None:
        if "${" in _REFERENCE.sub("", text):
            hint = "a recipe may refer to its own keys, as in ${data_root}; environment and functions are out of reach"
            raise _WrongReferenceError(f"'{text}' is not a reference to a key", hint)
        targets = {key: self._target(key, text) for key in _REFERENCE.findall(text)}
        if _REFERENCE.fullmatch(text):
            [target] = targets.values()
            node.value, node.text, node.doubt = target.value, target.text, target.doubt
            return
        node.value = node.text = _REFERENCE.sub(lambda match: targets[match[1]].text, text)
        if "${" in node.value or len(node.value) > MAX_TEXT:
            what = f"'{text}' makes another reference or more than {MAX_TEXT:,} characters"
            raise _WrongReferenceError(what, "write the value itself")

    def _target(self, key: str, text: str) -> Node:
        node: Node | None = self.root
        for part in key.split("."):
            node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
        if node is None:
            known = [key_name(path) for path, one in walk(self.root) if one.text]
            raise _WrongReferenceError(f"'{text}' refers to '{key}', which is not in the recipe", nearest(key, known))
        if key in self.active:
            raise _WrongReferenceError(f"'{text}' refers to itself", " -> ".join([*self.active, key]))
        self._resolve(node, key)
        if node.broken:
            raise _WrongReferenceError
        if isinstance(node.value, (dict, list)) or node.value is None:
            raise _WrongReferenceError(f"'{text}' refers to {shown(node)}", "refer to a single value")
        return node
