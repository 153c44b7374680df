"""Plugins: a broken one is named with package and version, keeps nothing, and harms nobody else."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llava_kit import hookimpl, hookspecs
from llava_kit.errors import PluginError
from llava_kit.hookspecs import Register
from llava_kit.registry import PluginInfo, Registry, load_registry


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 1


def build(config: Config) -> Config:
    return config


class Good:
    @hookimpl
    def register_connectors(self, register: Register) -> None:
        register("good", build, Config)


def info(name: str, package: str = "", version: str = "1.0") -> PluginInfo:
    return PluginInfo(name=name, package=package or f"{name}-kit", version=version, module=f"{name}.module")


@pytest.fixture
def registry() -> Registry:
    """A registry in which one plugin works already."""
    made = Registry()
    made.add_plugin(Good(), info("good"))
    return made


def failure(registry: Registry) -> str:
    """Why the one absent plugin is absent; what works must still work, and nothing of the other may be left."""
    [plugin] = registry.absent
    assert list(registry.components) == [("connectors", "good")]
    assert registry.get("connectors", "good").build(Config(size=3)) == Config(size=3)
    return plugin.failure


# --- what works ------------------------------------------------------------------------------------------------------


def test_a_component_is_found_by_kind_and_exact_name(registry: Registry) -> None:
    component = registry.get("connectors", "good")
    assert (component.kind, component.name, component.config) == ("connectors", "good", Config)
    assert str(component.plugin) == "plugin 'good' (good-kit 1.0)"
    assert registry.names("connectors") == ["good"]
    assert registry.names("templates") == []


def test_every_hook_is_a_kind(registry: Registry) -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
    assert [f"register_{kind}" for kind in registry.kinds] == hooks
    assert "connectors" in registry.kinds


def test_the_same_name_may_stand_for_different_kinds(registry: Registry) -> None:
    class Template:
        @hookimpl
        def register_templates(self, register: Register) -> None:
            register("good", build, Config)

    registry.add_plugin(Template(), info("template"))
    assert registry.absent == []
    assert registry.get("templates", "good").plugin.name == "template"
    assert registry.get("connectors", "good").plugin.name == "good"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("goood", "did you mean 'good'?"),
        ("Good", "did you mean 'good'?"),
        ("resampler", "there is good; `llava-kit plugins list` shows what is installed"),
    ],
)
def test_a_wrong_name_gets_the_nearest_one(registry: Registry, name: str, hint: str) -> None:
    with pytest.raises(PluginError) as caught:
        registry.get("connectors", name)
    assert str(caught.value) == f"no connectors named '{name}'; {hint}"
    assert caught.value.code == 4


def test_a_wrong_name_is_explained_by_the_plugins_that_are_not_in_use(registry: Registry) -> None:
    registry.plugins += [
        PluginInfo(name="a", package="a-kit", version="2.0", module="a", failure="ImportError: no b"),
        PluginInfo(name="c", package="c-kit", version="3.0", module="c", blocked=True),
    ]
    with pytest.raises(PluginError) as caught:
        registry.get("connectors", "resampler")
    assert "plugin 'a' (a-kit 2.0) failed: ImportError: no b; plugin 'c' (c-kit 3.0) is blocked" in str(caught.value)


# --- plugins that are wrong ------------------------------------------------------------------------------------------


def test_a_misspelt_hook_is_an_error_with_the_right_name(registry: Registry) -> None:
    class Misspelt:
        @hookimpl
        def register_conectors(self, register: Register) -> None:
            register("other", build, Config)

    registry.add_plugin(Misspelt(), info("misspelt"))
    assert failure(registry) == "there is no hook 'register_conectors'; did you mean 'register_connectors'?"


def test_a_misspelt_hook_does_not_harm_the_next_plugin(registry: Registry) -> None:
    class Misspelt:
        @hookimpl
        def register_conectors(self, register: Register) -> None: ...

    class Next:
        @hookimpl
        def register_templates(self, register: Register) -> None:
            register("next", build, Config)

    registry.add_plugin(Misspelt(), info("misspelt"))
    registry.add_plugin(Next(), info("next"))
    assert [plugin.name for plugin in registry.absent] == ["misspelt"]
    assert registry.names("templates") == ["next"]


def test_hooks_without_the_marker_are_an_error(registry: Registry) -> None:
    class Unmarked:
        def register_connectors(self, register: Register) -> None:
            register("other", build, Config)

    registry.add_plugin(Unmarked(), info("unmarked"))
    assert failure(registry) == "it implements no hook; mark its hooks with @llava_kit.hookimpl"


def test_a_hook_with_a_wrong_argument_is_an_error_on_one_line(registry: Registry) -> None:
    class WrongArgument:
        @hookimpl
        def register_connectors(self, registrar: Register) -> None: ...

    registry.add_plugin(WrongArgument(), info("wrong"))
    assert "'registrar'" in failure(registry)
    assert "\n" not in failure(registry)


def test_a_name_that_is_taken_is_an_error_naming_both_packages(registry: Registry) -> None:
    class Rival:
        @hookimpl
        def register_connectors(self, register: Register) -> None:
            register("other", build, Config)
            register("good", build, Config)

    registry.add_plugin(Rival(), info("rival", "rival-kit", "2.5"))
    assert failure(registry) == (
        "connectors 'good' is registered by plugin 'good' (good-kit 1.0) already; "
        "block one of the two: LLAVA_KIT_BLOCK_PLUGINS=good or =rival"
    )
    with pytest.raises(
        PluginError, match=r"plugin 'rival' \(rival-kit 2\.5\) failed: connectors 'good' is registered by"
    ):
        registry.get("connectors", "other")


def test_plugins_of_two_packages_may_have_the_same_name(registry: Registry) -> None:
    class Namesake:
        @hookimpl
        def register_templates(self, register: Register) -> None:
            register("other", build, Config)

    class Rival(Good):
        pass

    registry.add_plugin(Namesake(), info("good", "namesake-kit"))
    registry.add_plugin(Rival(), info("good", "rival-kit"))
    assert [plugin.package for plugin in registry.absent] == ["rival-kit"]
    assert registry.absent[0].failure.endswith("LLAVA_KIT_BLOCK_PLUGINS=good-kit or =rival-kit")
    assert registry.get("connectors", "good").plugin.package == "good-kit"
    assert registry.names("templates") == ["other"]


@pytest.mark.parametrize("error", [RuntimeError("half-way"), SystemExit("half-way"), GeneratorExit("half-way")])
def test_nothing_stays_of_a_plugin_that_fails_half_way(registry: Registry, error: BaseException) -> None:
    class HalfWay:
        @hookimpl
        def register_vision_encoders(self, register: Register) -> None:
            register("first", build, Config)

        @hookimpl
        def register_connectors(self, register: Register) -> None:
            register("second", build, Config)
            raise error

        @hookimpl
        def register_templates(self, register: Register) -> None:
            register("third", build, Config)

    plugin = HalfWay()
    registry.add_plugin(plugin, info("half"))
    assert failure(registry) == f"{type(error).__name__}: half-way"
    registry.add_plugin(plugin, info("half"))
    assert registry.absent[1].failure == f"{type(error).__name__}: half-way"  # not "already registered"


def test_ctrl_c_is_not_swallowed(registry: Registry) -> None:
    class Interrupted:
        @hookimpl
        def register_connectors(self, register: Register) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.add_plugin(Interrupted(), info("interrupted"))


@dataclass(kw_only=True)
class Thawed:
    size: int = 1


@dataclass(frozen=True)
class Positional:
    size: int = 1
    kept: int = field(default=1, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Shared:
    share: float = 1.0


@pytest.mark.parametrize(
    ("name", "builder", "config", "complaint"),
    [
        ("x", build, dict, "connectors 'x': config must be a dataclass type, got <class 'dict'>"),
        ("x", build, Config(), "connectors 'x': config must be a dataclass type, got Config(size=1)"),
        ("x", build, Thawed, "connectors 'x': Thawed must be frozen; @dataclass(frozen=True, kw_only=True)"),
        ("x", build, Positional, "connectors 'x': the fields of Positional must be keyword-only, size is not"),
        ("x", build, Named, "connectors 'x': Named has a field 'name', which a recipe uses for itself"),
        ("x", "build", Config, "connectors 'x': build must be callable, got str"),
        ("", build, Config, "connectors: a name must be a non-empty string, got ''"),
        (3, build, Config, "connectors: a name must be a non-empty string, got 3"),
    ],
)
def test_a_registration_that_cannot_work_is_refused(
    registry: Registry, name: str, builder: object, config: type, complaint: str
) -> None:
    class Wrong:
        @hookimpl
        def register_connectors(self, register: Register) -> None:
            register("fine", build, Config)
            register(name, builder, config)  # type: ignore[arg-type]

    registry.add_plugin(Wrong(), info("wrong"))
    assert failure(registry).startswith(complaint)


def test_the_keys_of_a_data_source_are_not_the_formats(registry: Registry) -> None:
    class Wrong:
        @hookimpl
        def register_data_formats(self, register: Register) -> None:
            register("named", build, Named)
            register("shared", build, Shared)

    registry.add_plugin(Wrong(), info("wrong"))
    assert failure(registry).startswith("data_formats 'shared': Shared has a field 'share', which a recipe uses")


# --- entry points ----------------------------------------------------------------------------------------------------

GOOD_MODULE = """
from dataclasses import dataclass
from llava_kit import hookimpl

@dataclass(frozen=True, kw_only=True)
class Config:
    pass

@hookimpl
def register_connectors(register):
    register("{name}", lambda config, **sizes: "built", Config)
"""


class Packages:
    """Installs modules as packages with entry points, each in a folder of its own, without an installer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: list[importlib.metadata.EntryPoint] = []

    def install(self, name: str, source: str, version: str = "1.0", module: str = "") -> None:
        module = module or f"fake_plugin_{name}"
        (self.root / f"{module}.py").write_text(source, encoding="utf-8")
        meta = self.root / f"{name}_kit-{version}.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-kit\nVersion: {version}\n", encoding="utf-8"
        )
        (meta / "entry_points.txt").write_text(f"[llava_kit]\n{name} = {module}\n", encoding="utf-8")
        self.entries += importlib.metadata.Distribution.at(meta).entry_points
        importlib.invalidate_caches()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """Two packages that work, on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LLAVA_KIT_BLOCK_PLUGINS", raising=False)
    made = Packages(tmp_path)
    made.install("alpha", GOOD_MODULE.format(name="alpha"))
    made.install("zulu", GOOD_MODULE.format(name="zulu"))
    yield made
    for module in [name for name in sys.modules if name.startswith("fake_plugin_")]:
        del sys.modules[module]


def test_installed_plugins_are_found_with_package_and_version(packages: Packages) -> None:
    registry = load_registry(packages.entries)
    assert registry.names("connectors") == ["alpha", "zulu"]
    assert registry.plugins == [
        PluginInfo(name="alpha", package="alpha-kit", version="1.0", module="fake_plugin_alpha"),
        PluginInfo(name="zulu", package="zulu-kit", version="1.0", module="fake_plugin_zulu"),
    ]


def test_the_entry_points_of_the_environment_are_the_default(packages: Packages) -> None:
    assert {"alpha", "zulu"} <= set(load_registry().names("connectors"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("import os\nos.environ['NO_SUCH_VARIABLE']\n", "KeyError: 'NO_SUCH_VARIABLE'"),
        ("def broken(:\n", "SyntaxError: "),
        ("raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
        ("", "it implements no hook"),
    ],
)
def test_a_plugin_that_fails_to_import_harms_no_other(packages: Packages, source: str, reason: str) -> None:
    packages.install("broken", source, version="0.9")
    registry = load_registry(packages.entries)
    assert registry.names("connectors") == ["alpha", "zulu"]
    [broken] = registry.absent
    assert (broken.name, broken.package, broken.version) == ("broken", "broken-kit", "0.9")
    assert broken.failure.startswith(reason)
    with pytest.raises(
        PluginError, match=r"no connectors named 'broken'.*plugin 'broken' \(broken-kit 0\.9\) failed: "
    ):
        registry.get("connectors", "broken")


def test_an_entry_point_without_its_module_is_a_failure(packages: Packages) -> None:
    packages.install("gone", "")
    (packages.root / "fake_plugin_gone.py").unlink()
    [gone] = load_registry(packages.entries).absent
    assert gone.failure == "ModuleNotFoundError: No module named 'fake_plugin_gone'"


def test_two_packages_that_register_one_name_are_both_named(packages: Packages) -> None:
    packages.install("bravo", GOOD_MODULE.format(name="alpha"), version="7.1")
    registry = load_registry(packages.entries)
    [bravo] = registry.absent
    assert str(bravo) == "plugin 'bravo' (bravo-kit 7.1)"
    assert "connectors 'alpha' is registered by plugin 'alpha' (alpha-kit 1.0) already" in bravo.failure
    assert registry.get("connectors", "alpha").plugin.package == "alpha-kit"


def test_what_a_plugin_prints_goes_to_stderr(packages: Packages, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = GOOD_MODULE.format(name="noisy").replace("    register(", "    print('at registering')\n    register(")
    packages.install("noisy", f"print('at import')\n{noisy}")
    registry = load_registry(packages.entries)
    said = capsys.readouterr()
    assert registry.names("connectors") == ["alpha", "noisy", "zulu"]
    assert said.out == ""
    assert said.err == "at import\nat registering\n"


@pytest.mark.parametrize("blocked", ["bad", "other, bad", "bad-kit"])
def test_blocked_plugins_are_not_even_imported(
    packages: Packages, blocked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_KIT_BLOCK_PLUGINS", blocked)
    packages.install("bad", "raise KeyboardInterrupt\n")
    registry = load_registry(packages.entries)
    assert "fake_plugin_bad" not in sys.modules
    assert registry.names("connectors") == ["alpha", "zulu"]
    [bad] = registry.absent
    assert (bad.name, bad.blocked, bad.failure) == ("bad", True, "")
    with pytest.raises(PluginError, match=r"plugin 'bad' \(bad-kit 1\.0\) is blocked"):
        registry.get("connectors", "bad")


def test_blocking_one_of_two_rivals_lets_the_other_in(packages: Packages) -> None:
    packages.install("bravo", GOOD_MODULE.format(name="alpha"))
    registry = load_registry(packages.entries, blocked=["alpha"])
    assert registry.get("connectors", "alpha").plugin.name == "bravo"


def test_our_own_plugins_come_first_so_that_a_rival_is_the_one_to_fail(packages: Packages) -> None:
    packages.install("llava", GOOD_MODULE.format(name="alpha"))
    registry = load_registry(packages.entries)
    assert [plugin.package for plugin in registry.plugins] == ["llava-kit", "alpha-kit", "zulu-kit"]
    assert [plugin.package for plugin in registry.absent] == ["alpha-kit"]


def test_a_package_that_is_found_twice_counts_once(packages: Packages) -> None:
    registry = load_registry([*packages.entries, *packages.entries])
    assert [plugin.name for plugin in registry.plugins] == ["alpha", "zulu"]
    assert registry.absent == []


def test_an_entry_point_of_no_package_is_still_named(packages: Packages) -> None:
    [plugin] = load_registry([importlib.metadata.EntryPoint("zulu", "fake_plugin_zulu", "llava_kit")]).plugins
    assert str(plugin) == "plugin 'zulu' (unknown package ?)"


def test_the_plugins_that_ship_all_work() -> None:
    shipped = [plugin for plugin in load_registry(blocked=[]).plugins if plugin.package == "llava-kit"]
    assert shipped, "llava-kit is not installed"
    assert [f"{plugin}: {plugin.failure}" for plugin in shipped if plugin.failure] == []
