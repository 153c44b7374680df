"""What the documents say, held against what is there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from parts import tiny_model
from rich.console import Console
from world import write_world

from llava_kit import contracts, errors, failures, hookspecs, recipe, train
from llava_kit.cli import app
from llava_kit.contracts import ImageSlot, Layout, Segment, Turn
from llava_kit.inspection import check_parts
from llava_kit.model import build_model
from llava_kit.recipe import load_recipe
from llava_kit.recipe_bind import Slot
from llava_kit.recipe_yaml import Node
from llava_kit.registry import BLOCK_VARIABLE, ENTRY_POINT_GROUP, Registry, load_registry
from llava_kit.run import MAY_CHANGE
from llava_kit.tokens import check_template

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text("utf-8")
PLUGINS = (ROOT / "docs" / "plugins.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "plugins").rglob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
SCHEMA = [
    recipe.Recipe, recipe.ModelParts, recipe.Stage, recipe.Source, recipe.Optimizer, recipe.Schedule,
    recipe.Validation, recipe.Limits, recipe.Saving, recipe.Lora, recipe.Splice,
]  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def marked(text: str, marker: str) -> str:
    """What stands between ``<!-- marker -->`` and the next ``<!-- end -->``."""
    found = re.findall(rf"<!-- {re.escape(marker)} -->(.*?)<!-- end -->", text, re.DOTALL)
    assert len(found) == 1, f"'{marker}' is there {len(found)} times"
    return str(found[0])


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head and without the backticks around a cell."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[re.sub(r"^`([^`]*)`$", r"\1", cell).replace("\\|", "|") for cell in line] for line in cells]


@pytest.fixture(scope="module")
def shipped() -> Registry:
    """The plugins that come with the package, and none else that may be installed."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    registry = load_registry([entry for entry in found if entry.dist and entry.dist.name == "llava-kit"], blocked=())
    assert registry.components and not registry.absent
    return registry


# --- code in the documents -------------------------------------------------------------------------------------------


def install(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put the plugin of a page where Python finds it, with the entry points of its pyproject.toml; its module."""
    [code], [project] = blocks(text, "python"), blocks(text, "toml")
    name = ast.get_docstring(ast.parse(code)).removesuffix(".py")  # type: ignore[union-attr]
    facts = tomllib.loads(project)["project"]
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{facts['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {facts['name']}\nVersion: {facts['version']}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in facts["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def with_documented(package: str) -> Registry:
    """The shipped plugins and those of a package that was just installed."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    entries = [entry for entry in found if entry.dist and entry.dist.name in ("llava-kit", package)]
    registry = load_registry(entries, blocked=())
    assert not registry.absent
    assert any(plugin.package == package for plugin in registry.plugins)
    return registry


def test_the_readmes_connector_works_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, README, monkeypatch)
    registry = with_documented("my-connectors")
    loaded = load_recipe("llava_v1", ["model.connector=scaled", "model.connector.scale=2"], registry)
    connector = loaded.model.connector.build(in_dim=3, out_dim=2)
    assert (connector.per_token, connector.num_tokens(Layout(grid_h=2, grid_w=5, tiles=3, prefix_tokens=1))) == (
        True,
        30,
    )
    with torch.no_grad():
        connector.final.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
        connector.final.bias.copy_(torch.tensor([0.5, 0.0]))
    hidden = connector.hidden(torch.tensor([[[1.0, 2.0, 3.0]]]), Layout(grid_h=1, grid_w=1))
    assert connector.final(hidden).tolist() == [[[2.5, 10.0]]]


def test_the_readmes_connector_fits_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, README, monkeypatch)
    recipe_file = write_world(tmp_path)
    loaded = load_recipe(recipe_file, ["model.connector=scaled"], with_documented("my-connectors"))
    assert check_parts(loaded) == []
    names = {name for name, _ in build_model(loaded).named_parameters() if name.startswith("connector.")}
    assert names == {"connector.final.weight", "connector.final.bias"}


def test_the_readmes_connector_is_as_short_as_it_says() -> None:
    [code] = blocks(README, "python")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(('"""', "from "))]
    assert len(lines) <= 20


def test_the_documented_template_works_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, PLUGINS, monkeypatch)
    registry = with_documented("my-templates")
    loaded = load_recipe("quickstart", ["stages.align.template=question_answer"], registry)
    template: contracts.Template = loaded.stages["align"].template.build()
    turns = [Turn("human", (ImageSlot(0), "\nWhat?")), Turn("assistant", ("A cat.",))]
    prompt = [
        Segment(kind="control", text="Question: "),
        Segment(kind="image"),
        Segment(kind="text", text="\nWhat?"),
        Segment(kind="control", text="\nAnswer:"),
    ]
    answer = [
        Segment(kind="control", text=" ", trained=True),
        Segment(kind="text", text="A cat.", trained=True),
        Segment(kind="control", text="</s>", trained=True),
    ]
    assert template.render(turns[:1], True) == prompt
    assert template.render(turns, False) == prompt + answer
    for wrong, reply in ((turns, True), (turns[:1], False), (turns[1:], False), ([], False)):
        with pytest.raises(ValueError, match=r"out of order|wrong turn"):
            template.render(wrong, reply)
    check_template(template, tiny_model(tmp_path).language_model.tokenizer)
    with pytest.raises(errors.RecipeError, match="end must be a special token"):
        load_recipe("quickstart", ["stages.align.template={name: question_answer, end: ''}"], registry)


def yaml_blocks() -> Iterator[Any]:
    for name, text in TEXTS.items():
        for number, block in enumerate(blocks(text, "yaml")):
            yield pytest.param(block, id=f"{name}-{number}")


@pytest.mark.parametrize("block", yaml_blocks())
def test_recipes_in_the_documents_load(block: str, tmp_path: Path, shipped: Registry) -> None:
    """A block with a model or a parent is a recipe; others are parts of llava_v1."""
    whole = re.search(r"^(model|extends):", block, re.MULTILINE)
    path = tmp_path / "block.yaml"
    path.write_text(block if whole else f"extends: llava_v1\n{block}", "utf-8")
    load_recipe(path, registry=shipped)


def test_the_readmes_stage_is_that_of_the_recipe() -> None:
    [block] = blocks(README, "yaml")
    text = (ROOT / "recipes" / "llava_v1.yaml").read_text("utf-8")
    before, _, after = text.partition(block)
    assert block.startswith("stages:\n  align:")
    assert before.endswith("\n") and after.startswith("  instruct:")


def test_overrides_in_the_documents_are_right(shipped: Registry) -> None:
    lines = [line for text in TEXTS.values() for block in blocks(text, "sh") for line in block.splitlines()]
    commands = [line.split("#")[0].split() for line in lines if line.startswith("llava-kit train")]
    changed = [(words[2], [word for word in words[3:] if "=" in word]) for words in commands]
    assert any(overrides for _, overrides in changed)
    for target, overrides in changed:
        if target.startswith("runs/"):
            continue  # made by the command above it
        load_recipe(target, overrides, shipped)


def test_entries_can_be_added_whole_only(shipped: Registry) -> None:
    added = "evaluate.more={name: exact_match, questions: q, images: i}"
    assert set(load_recipe("quickstart", [added], shipped).evaluate) == {"held_out", "more"}
    with pytest.raises(errors.RecipeError, match="there is no 'more' in evaluate"):
        load_recipe("quickstart", ["evaluate.more.questions=q"], shipped)


# --- keys and defaults -----------------------------------------------------------------------------------------------


def default_of(one: dataclasses.Field[Any]) -> Any:
    """``MISSING`` where there is none."""
    make: Any = one.default_factory
    return one.default if make is dataclasses.MISSING else make()


def plain(value: Any) -> Any:
    """A default as a recipe writes it; dataclasses that are all default as ``{}``."""
    if dataclasses.is_dataclass(value):
        make: Any = type(value)
        assert value == make()
        return {}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_default(one: dataclasses.Field[Any], cell: str) -> None:
    default = default_of(one)
    if default is dataclasses.MISSING:
        assert cell == "required", one.name
        return
    written = yaml.safe_load(cell)
    if isinstance(default, float) and isinstance(written, str):
        written = float(written)  # YAML 1.1 takes 1e-8 for text, recipes do not
    if "spell" in one.metadata:
        written = one.metadata["spell"](Node(written, "")).value
    if isinstance(written, str) and written.endswith("…"):
        start = written.removesuffix("…")
        assert len(start) > 20 and default.startswith(start), one.name
        return
    assert (written, type(written)) == (plain(default), type(plain(default))), one.name


def keys(cls: Any) -> list[dataclasses.Field[Any]]:
    return [one for one in dataclasses.fields(cls) if one.init and not one.metadata.get("internal")]


@pytest.mark.parametrize("cls", SCHEMA, ids=lambda cls: cls.__name__)
def test_every_key_of_the_schema_is_documented(cls: Any) -> None:
    table = rows(marked(RECIPES, f"table: {cls.__name__}"))
    documented = {row[0]: row for row in table}
    assert sorted(documented) == sorted(one.name for one in keys(cls))
    for one in keys(cls):
        check_default(one, documented[one.name][1])


def test_the_schema_has_no_other_dataclasses() -> None:
    known = {*SCHEMA, recipe.Provenance, Slot}
    there = {cls for _, cls in inspect.getmembers(recipe, dataclasses.is_dataclass) if isinstance(cls, type)}
    assert {cls for cls in there if cls.__module__ in (recipe.__name__, Slot.__module__)} == known


def test_every_key_of_every_shipped_plugin_is_documented(shipped: Registry) -> None:
    for (kind, name), component in shipped.components.items():
        if kind == "templates":
            table = rows(marked(RECIPES, "table: templates"))
            own = {row[0].removeprefix(f"{name}."): row[1] for row in table if row[0].startswith(f"{name}.")}
            assert f"`{name}`" in RECIPES
        else:
            own = {row[0]: row[1] for row in rows(marked(RECIPES, f"table: {kind} {name}"))}
        assert sorted(own) == sorted(one.name for one in keys(component.config)), name
        for one in keys(component.config):
            check_default(one, own[one.name])


def test_no_table_is_of_something_that_is_not_there(shipped: Registry) -> None:
    of_plugins = {f"{kind} {name}" for kind, name in shipped.components if kind != "templates"}
    known = {cls.__name__ for cls in SCHEMA} | of_plugins | {"templates"}
    assert set(re.findall(r"<!-- table: (.*?) -->", RECIPES)) == known
    templates = {row[0].split(".")[0] for row in rows(marked(RECIPES, "table: templates"))}
    assert templates <= set(shipped.names("templates"))


def test_what_a_resumed_run_may_change_is_documented() -> None:
    assert sorted(re.findall(r"`([\w.]+)`", marked(RECIPES, "may change"))) == sorted(
        key.rstrip(".") for key in MAY_CHANGE
    )


def test_exit_codes_are_documented() -> None:
    def below(cls: type[errors.KitError]) -> Iterator[type[errors.KitError]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    used = {cls.code for cls in below(errors.KitError)}
    used |= {0, errors.EXIT_UNEXPECTED, errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED, failures.EXIT_BROKEN_PIPE}
    assert {int(row[0]) for row in rows(marked(RECIPES, "exit codes"))} == used
    for code in (2, 3, 4, 5, 6):
        assert re.search(rf"[(,] ?{code} [a-z]", README), code


def test_the_files_of_a_run_are_documented(tmp_path: Path) -> None:
    run = train(write_world(tmp_path), run_folder=tmp_path / "run", console=Console(quiet=True))
    patterns = [re.sub("<.*?>", "*", row[0]) for row in rows(marked(RECIPES, "files"))]
    files = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]

    def fits(file: str, pattern: str) -> bool:
        return file.count("/") == pattern.count("/") and fnmatchcase(file, pattern)

    assert [file for file in files if not any(fits(file, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fits(file, pattern) for file in files)] == []


# --- hooks and contracts ---------------------------------------------------------------------------------------------


def function_of(member: Any) -> Any:
    """The function behind a property or class method."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def signature(function: Any) -> str:
    """``name(parameters) -> result`` as it is written, without ``self``."""
    found = inspect.signature(function)
    parameters = [one for one in found.parameters.values() if one.name != "self"]
    return f"{function.__name__}{found.replace(parameters=parameters)}".replace("'", "")


def test_every_hook_is_documented_with_its_signature() -> None:
    hooks = {signature(one): one.__doc__.strip().strip("`") for one in vars(hookspecs).values() if is_hook(one)}
    head = "| hook | what `build` is called as, and returns |"
    documented = {row[0]: row[1] for row in rows(PLUGINS[PLUGINS.index(head) :].split("\n\n")[0])}
    assert len(hooks) == 7
    assert documented == hooks


def is_hook(value: Any) -> bool:
    return inspect.isfunction(value) and value.__name__.startswith("register_")


PROTOCOLS = [
    contracts.VisionEncoder, contracts.Connector, contracts.LanguageModel, contracts.Template, contracts.Benchmark,
    contracts.Preparation, contracts.Exportable, contracts.Importable, contracts.LoraOptions,
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
def test_every_member_of_a_contract_is_documented(protocol: Any) -> None:
    members = {f"{name}: {kind}" for name, kind in inspect.get_annotations(protocol).items()}
    generated = ("__init__", "__subclasshook__")
    functions = {name: function_of(f) for name, f in vars(protocol).items() if inspect.isfunction(function_of(f))}
    members |= {signature(f) for name, f in functions.items() if name not in generated}
    documented = {row[0] for row in rows(marked(PLUGINS, f"contract: {protocol.__name__}"))}
    assert members and members <= documented
    for optional in documented - members:
        assert re.split(r"\W", optional)[0] in protocol.__doc__, f"the contract does not speak of {optional}"


def test_no_contract_is_left_out() -> None:
    own = [cls for _, cls in inspect.getmembers(contracts, inspect.isclass) if cls.__module__ == contracts.__name__]
    protocols = {cls for cls in own if getattr(cls, "_is_protocol", False)}
    assert protocols - {contracts.Module} == set(PROTOCOLS)  # Module is torch's
    assert set(re.findall(r"<!-- contract: (\w+) -->", PLUGINS)) == {cls.__name__ for cls in PROTOCOLS}


def test_every_field_of_the_plain_data_is_documented() -> None:
    table = rows(PLUGINS[PLUGINS.index("| class | fields |") :].split("\n\n")[0])
    assert {"Sample", "Turn", "Segment", "Layout", "Views", "Example", "Score"} <= {row[0] for row in table}
    for name, text in ((row[0], f"`{row[1]}`") for row in table):
        for one in dataclasses.fields(getattr(contracts, name)):
            default = default_of(one)
            given = "" if default is dataclasses.MISSING else f" (`{default!r}`)".replace("''", '""')
            assert f"`{one.name}`{given}" in text, f"{name}.{one.name}"


def test_the_block_variable_is_documented() -> None:
    assert f"{BLOCK_VARIABLE}=" in PLUGINS


# --- the command line ------------------------------------------------------------------------------------------------


def verbs() -> Iterator[tuple[str, str, Any]]:
    """Every command: its group or itself, its own name, and what typer knows of it."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner, one in getattr(command, "commands", {name: command}).items():
            yield name, inner, one


def test_every_verb_is_in_the_readmes_table() -> None:
    table = README[README.index("| command | does |") :].split("\n\n")[0]
    lines = table.splitlines()[2:]
    found = list(verbs())
    assert len(found) > 8
    for group, name, command in found:
        [line] = [one for one in lines if re.search(rf"`{group}\b(?!-)", one)]
        assert re.search(rf"\b{name}\b", line), f"{group} {name}"
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, name


def test_options_in_the_readmes_table_exist() -> None:
    table = README[README.index("| command | does |") :].split("\n\n")[0]
    known: dict[str, set[str]] = {}
    for group, _, command in verbs():
        known.setdefault(group, set()).update(option for one in command.params for option in one.opts)
    for cell in table.splitlines()[2:]:
        for command in re.findall(r"`([^`]*)`", cell.split(" | ")[0]):
            group = command.split()[0]
            assert set(re.findall(r"--[\w-]+", command)) <= known[group], command


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\[[^]]*\]\(([^)\s]+)\)", TEXTS[page])
    for target in (one for one in targets if not re.match(r"[a-z]+:", one)):
        assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_no_page_holds_a_path_of_a_machine(page: str) -> None:
    machine = r"(?<![\w.>}-])(/(home|root|work|opt|tmp|usr|var|mnt|srv|etc|Users)/|[A-Z]:\\)"
    assert re.search(machine, TEXTS[page]) is None
