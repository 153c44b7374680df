"""Recipes: what loads, what is refused, and that every refusal says where and what would be right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from llava_kit import hookimpl
from llava_kit.errors import RecipeError
from llava_kit.hookspecs import Register
from llava_kit.recipe import Optimizer, Recipe, Schedule, Stage, load_recipe, shipped_recipes
from llava_kit.registry import PluginInfo, Registry

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int
    height: int = 1


@dataclass(frozen=True, kw_only=True)
class EyesConfig:
    model: str = "small"
    layer: int = -2
    size: Size | None = None
    mode: Literal["fast", "exact"] = "fast"
    tags: tuple[str, ...] = ()
    scales: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    depth: int = 2

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth}; for one layer use 'linear'")


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    model: str
    revision: str | None = None
    architecture: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    path: str
    turns: Literal["any", "single", "multi"] = "any"


@dataclass(frozen=True, kw_only=True)
class EmptyConfig:
    pass


class Parts:
    """A plugin with one or two components of each kind; nothing it registers needs torch."""

    @hookimpl
    def register_vision_encoders(self, register: Register) -> None:
        register("eyes", lambda config: ("eyes", config), EyesConfig)

    @hookimpl
    def register_connectors(self, register: Register) -> None:
        register("linear", lambda config, **sizes: ("linear", config, sizes), LinearConfig)
        register("mlp", lambda config, **sizes: ("mlp", config, sizes), MlpConfig)

    @hookimpl
    def register_language_models(self, register: Register) -> None:
        register("words", lambda config: config, WordsConfig)

    @hookimpl
    def register_data_formats(self, register: Register) -> None:
        register("chat", lambda config: config, ChatConfig)

    @hookimpl
    def register_templates(self, register: Register) -> None:
        register("plain", lambda config: config, EmptyConfig)

    @hookimpl
    def register_preparations(self, register: Register) -> None:
        register("fetch", lambda config: config, ChatConfig)

    @hookimpl
    def register_benchmarks(self, register: Register) -> None:
        register("quiz", lambda config: config, EmptyConfig)


@pytest.fixture(scope="module")
def registry() -> Registry:
    made = Registry()
    made.add_plugin(Parts(), PluginInfo(name="parts", package="parts", version="1.0", module="tests"))
    assert not made.absent
    return made


TEXT = """\
name: demo
model:
  vision_encoder: {name: eyes, layer: -3}
  connector: linear
  language_model:
    name: words
    model: ./words
    architecture: {hidden_size: 64, rms_norm_eps: 1e-6}
stages:
  align:
    trainable: [connector]
    samples: 595375
    data:
      captions: {format: chat, path: "${data_root}/chat.json"}
    template: plain
    optimizer:
      lr: 2e-3
    batch_size: 128
    micro_batch_size: 16
    epochs: 1
    max_length: 2048
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the demo recipe, or another text, as ``demo.yaml`` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def load_text(*overrides: str, text: str | bytes = TEXT) -> Recipe:
        Path("demo.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe("demo.yaml", overrides, registry)

    return load_text


def complaints(load: Load, *overrides: str, text: str | bytes = TEXT) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*overrides, text=text)
    assert caught.value.code == 2
    return str(caught.value).splitlines()


# --- what loads ------------------------------------------------------------------------------------------------------


def test_values_are_typed_and_defaults_filled_in(load: Load) -> None:
    recipe = load()
    stage = recipe.stages["align"]
    assert recipe.model.vision_encoder.config == EyesConfig(layer=-3)
    assert recipe.model.language_model.config.architecture == {"hidden_size": 64, "rms_norm_eps": 1e-6}
    assert recipe.model.connector.name == "linear"
    assert stage.trainable == {"connector": ("*",)}
    assert stage.data["captions"].format.config == ChatConfig(path=f"{recipe.data_root}/chat.json")
    assert (stage.data["captions"].share, stage.data["captions"].samples) == (None, None)
    assert stage.optimizer == Optimizer(lr=0.002, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    assert (stage.schedule, stage.precision) == (Schedule(name="cosine", warmup_ratio=0.03), "bf16")


def test_a_slot_builds_its_component_with_its_config(load: Load) -> None:
    slot = load("model.connector={name: mlp, depth: 3}").model.connector
    assert slot.build(in_dim=4, out_dim=8) == ("mlp", MlpConfig(depth=3), {"in_dim": 4, "out_dim": 8})


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("seed=7", "seed", 7),
        ("trackers=[tensorboard]", "trackers", ("tensorboard",)),
        ("stages.align.optimizer.max_grad_norm=null", "stages.align.optimizer.max_grad_norm", None),
        ("stages.align.optimizer.lr=1e-5", "stages.align.optimizer.lr", 1e-5),
        ("stages.align.optimizer.betas=[0.9, 0.95]", "stages.align.optimizer.betas", (0.9, 0.95)),
        ("stages.align.gradient_checkpointing=yes", "stages.align.gradient_checkpointing", True),
        ("stages.align.data.captions.share=2", "stages.align.data.captions.share", 2.0),
        ("stages.align.data.captions.turns=multi", "stages.align.data.captions.format.config.turns", "multi"),
        (
            "stages.align.trainable={language_model: [a.*, b]}",
            "stages.align.trainable",
            {"language_model": ("a.*", "b")},
        ),
        ("stages.align.trainable={connector: all}", "stages.align.trainable", {"connector": ("*",)}),
        ("model.connector=mlp", "model.connector.config", MlpConfig()),
        ("model.vision_encoder.size.width=3", "model.vision_encoder.config.size", Size(width=3)),
        ("model.vision_encoder.tags=[a, 010, no]", "model.vision_encoder.config.tags", ("a", "010", "no")),
        ("model.vision_encoder.scales=[1, 2.5]", "model.vision_encoder.config.scales", [1.0, 2.5]),
        ("model.language_model.revision=1e5", "model.language_model.config.revision", "1e5"),
        ("model.language_model.revision=2024-01-02", "model.language_model.config.revision", "2024-01-02"),
        ("model.language_model.model=os.system", "model.language_model.config.model", "os.system"),
        ("evaluate.quiz=quiz", "evaluate.quiz.name", "quiz"),
        ("name=${model.connector.name}-${seed}", "name", "linear-0"),
    ],
)
def test_overrides(load: Load, override: str, keys: str, value: object) -> None:
    found: Any = load(override)
    for key in keys.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_naming_another_plugin_by_its_name_alone_works_both_ways(load: Load) -> None:
    plain = TEXT.replace("connector: linear", "connector: {name: linear}")
    assert load("model.connector=mlp", text=plain) == load("model.connector.name=mlp") == load("model.connector=mlp")


def test_a_plain_name_replaces_the_whole_slot(load: Load) -> None:
    text = TEXT.replace("connector: linear", "connector: {name: mlp, depth: 5}")
    assert load("model.connector=mlp", text=text).model.connector.config == MlpConfig(depth=2)


def test_null_takes_an_entry_out(load: Load) -> None:
    recipe = load("evaluate.quiz=quiz", "evaluate.quiz=null")
    assert recipe.evaluate == {}


def test_later_overrides_win(load: Load) -> None:
    assert load("seed=1", "seed=2").seed == 2


# --- extends ---------------------------------------------------------------------------------------------------------


def test_extends_merges_mappings_and_replaces_everything_else(load: Load) -> None:
    Path("parent.yaml").write_text(TEXT + "trackers: [a, b]\nevaluate: {quiz: quiz}\n", encoding="utf-8")
    child = """\
extends: parent.yaml
name: child
trackers: [c]
evaluate: {quiz: null}
model: {vision_encoder: {mode: exact}, connector: {name: mlp, depth: 3}}
stages: {align: {trainable: {language_model: all}, optimizer: {lr: 1}}}
"""
    recipe, stage = load(text=child), load(text=child).stages["align"]
    assert (recipe.name, recipe.trackers, recipe.evaluate) == ("child", ("c",), {})
    assert recipe.model.vision_encoder.config == EyesConfig(layer=-3, mode="exact")
    assert recipe.model.connector.config == MlpConfig(depth=3)
    assert stage.trainable == {"language_model": ("*",)}  # a list above, a mapping here
    assert (stage.optimizer.lr, stage.batch_size) == (1.0, 128)


def test_naming_another_plugin_replaces_the_parents_slot_and_naming_the_same_one_merges(load: Load) -> None:
    text = TEXT.replace("connector: linear", "connector: {name: mlp, depth: 5}")
    Path("parent.yaml").write_text(text, encoding="utf-8")
    other = load(text="extends: parent.yaml\nmodel: {connector: {name: linear, bias: no}}\n")
    assert other.model.connector.config == LinearConfig(bias=False)
    same = load(text="extends: parent.yaml\nmodel: {connector: {name: mlp}}\n")
    assert same.model.connector.config == MlpConfig(depth=5)
    plain = load(text="extends: parent.yaml\nmodel: {connector: mlp}\n")
    assert plain.model.connector.config == MlpConfig(depth=2)


def test_extends_reaches_over_folders_and_to_shipped_recipes(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "parent.yaml").write_text(TEXT)
    (tmp_path / "deep" / "child.yaml").write_text("extends: ../parent.yaml\nname: child\n")
    assert load_recipe(tmp_path / "deep" / "child.yaml", registry=registry).name == "child"
    (tmp_path / "own.yaml").write_text("extends: llava_v1\nmodel: {connector: nothing}\n")
    with pytest.raises(RecipeError, match=r"own\.yaml:2: model\.connector\.name: no connectors named 'nothing'"):
        load_recipe(tmp_path / "own.yaml", registry=registry)


def test_a_mistake_is_placed_in_the_file_that_made_it(load: Load) -> None:
    Path("parent.yaml").write_text(TEXT.replace("epochs: 1", "epochs: one"), encoding="utf-8")
    assert complaints(load, text="extends: parent.yaml\nseed: x\n") == [
        "demo.yaml:2: seed: must be a whole number, got 'x'",
        "parent.yaml:20: stages.align.epochs: must be a whole number, got 'one'",
    ]


@pytest.mark.parametrize(
    ("extends", "complaint"),
    [
        ("demo.yaml", "demo.yaml: extends itself by way of demo.yaml"),
        ("back.yaml", "demo.yaml: extends itself by way of demo.yaml"),
        ("nope.yaml", "demo.yaml:1: extends: there is no recipe 'nope.yaml'; give the path"),
        ("llava_v2", "did you mean 'llava_v1'?"),
        ("[a, b]", "demo.yaml:1: extends: must be the file or name of one recipe"),
        ("${name}", "demo.yaml:1: extends: must be the file or name of one recipe"),
    ],
)
def test_wrong_extends(load: Load, extends: str, complaint: str) -> None:
    Path("back.yaml").write_text("extends: demo.yaml\n", encoding="utf-8")
    [line] = complaints(load, text=f"extends: {extends}\n{TEXT}")
    assert complaint in line


# --- one complaint for each mistake ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.connector.name=liner", "model.connector.name: no connectors named 'liner'; did you mean 'linear'?"),
        ("model.connector=liner", "model.connector.name: no connectors named 'liner'; did you mean 'linear'?"),
        ("model.connector.bais=true", "model.connector.bais: Key 'bais' not in 'LinearConfig'; did you mean 'bias'?"),
        ("model.connector={depth: 2}", "model.connector.name: is missing; one of linear, mlp"),
        ("model.connector={nmae: mlp}", "model.connector.name: is missing; did you mean 'name' by 'nmae'?"),
        (
            "model.connector={name: mlp, depth: 1}",
            "model.connector: depth must be at least 2, got 1; for one layer use",
        ),
        ("model.connector=null", "model.connector: must be a name or a mapping with 'name', got null"),
        ("model.connector=[mlp]", "model.connector: must be a name or a mapping with 'name', got a list"),
        ("model.vision_encoder.layer=1.5", "model.vision_encoder.layer: must be a whole number, got '1.5'"),
        ("model.vision_encoder.size={}", "model.vision_encoder.size.width: is missing"),
        (
            "model.vision_encoder.size={width: 1, hight: 2}",
            "size.hight: Key 'hight' not in 'Size'; did you mean 'height'?",
        ),
        (
            "model.vision_encoder.mode=fats",
            "model.vision_encoder.mode: must be one of fast, exact, got 'fats'; did you mean",
        ),
        ("model.vision_encoder.tags=a", "model.vision_encoder.tags: must be a list, got 'a'"),
        ("model.vision_encoder.scales=[1, x]", "model.vision_encoder.scales[1]: must be a number, got 'x'"),
        ("model.language_model.model=null", "model.language_model.model: must be text, got null"),
        ("model.language_model.model=[a]", "model.language_model.model: must be text, got a list"),
        ("model.language_model.architecture.eps=.nan", "architecture.eps: must be a finite number, got '.nan'"),
        ("model.language_model.architecture.eps=010", "architecture.eps: '010' reads as 8 in YAML"),
        ("modle.connector=mlp", "modle: Key 'modle' not in 'Recipe'; did you mean 'model'?"),
        ("stages.aling.epochs=2", "stages.aling: there is no 'aling' in stages; did you mean 'align'?"),
        ("stages.aling=null", "stages.aling: there is no 'aling' in stages; did you mean 'align'?"),
        ("stages.align.data.caption.share=2", "data.caption: there is no 'caption' in stages.align.data; did you mean"),
        (
            "stages.align.optimizer.lrr=1",
            "stages.align.optimizer.lrr: Key 'lrr' not in 'Optimizer'; did you mean 'lr'?",
        ),
        ("stages.align.optimizer.lr=-1", "stages.align.optimizer: lr must be positive, got -1.0"),
        ("stages.align.optimizer.lr=.inf", "stages.align.optimizer.lr: must be a finite number, got '.inf'"),
        ("stages.align.optimizer.lr='nan'", "stages.align.optimizer.lr: must be a finite number, got 'nan'"),
        ("stages.align.optimizer.lr=true", "stages.align.optimizer.lr: must be a number, got 'true'"),
        ("stages.align.optimizer.betas=[0.9]", "stages.align.optimizer.betas: must have 2 values, got 1"),
        ("stages.align.optimizer.betas=[0.9, 1]", "betas must be from 0 to below 1, got (0.9, 1.0)"),
        ("stages.align.optimizer.eps=0", "stages.align.optimizer: eps must be positive, got 0.0"),
        ("stages.align.optimizer.weight_decay=-1", "weight_decay must be 0 or more, got -1.0"),
        ("stages.align.optimizer.max_grad_norm=0", "max_grad_norm must be positive, got 0.0"),
        ("stages.align.optimizer.component_lr={connector: 0}", "component_lr.connector must be positive, got 0.0"),
        (
            "stages.align.optimizer.component_lr={language_model: 1}",
            "stages.align: optimizer.component_lr.language_model: 'language_model' is not trained here; there is",
        ),
        (
            "stages.align.schedule.warmup_ratio=1",
            "stages.align.schedule: warmup_ratio must be from 0 to below 1, got 1.0",
        ),
        ("stages.align.schedule.name=cosin", "stages.align.schedule.name: must be one of cosine, linear, constant"),
        ("stages.align.batch_size=100", "batch_size 100 is no multiple of micro_batch_size 16; 10 or 20 would fit"),
        ("stages.align.batch_size=0", "stages.align: batch_size must be at least 1, got 0"),
        ("stages.align.micro_batch_size=-1", "stages.align: micro_batch_size must be at least 1, got -1"),
        ("stages.align.max_length=1e3", "stages.align.max_length: must be a whole number, got '1e3'"),
        ("stages.align.max_length=1:30", "stages.align.max_length: must be a whole number, but '1:30' reads as 90"),
        ("stages.align.max_length=9223372036854775808", "stages.align.max_length: must be below 2^63"),
        ("stages.align.epochs=null", "stages.align: epochs or steps is missing"),
        ("stages.align.gradient_checkpointing=1", "gradient_checkpointing: must be true or false, got '1'"),
        (
            "stages.align.trainable=[]",
            "stages.align: trainable must name a component; there is vision_encoder, connector",
        ),
        ("stages.align.trainable=[conector]", "trainable.conector: no component 'conector'; did you mean 'connector'?"),
        ("stages.align.trainable={connector: []}", "trainable.connector must be 'all', 'lora' or a list of patterns"),
        ("stages.align.trainable={connector: most}", "stages.align.trainable.connector: must be a list, got 'most'"),
        ("stages.align.trainable=connector", "stages.align.trainable: must be a mapping, got 'connector'"),
        ("stages.align.data={}", "stages.align: data must have at least one source"),
        ("stages.align.data.captions.share=0", "stages.align.data.captions: share must be positive, got 0.0"),
        ("stages.align.data.captions.share=most", "stages.align.data.captions.share: must be a number, got 'most'"),
        ("stages.align.data.captions.samples=0", "stages.align.data.captions: samples must be at least 1, got 0"),
        (
            "stages.align.data.captions.shre=1",
            "data.captions.shre: Key 'shre' not in 'ChatConfig'; did you mean 'share'?",
        ),
        ("stages={}", "stages must have at least one stage"),
        ("stages=null", "stages: must be a mapping, got null"),
        ("model=3", "model: must be a mapping, got '3'"),
        ("name=../demo", "name must be letters, digits, '_' and '-' only, got '../demo'"),
        ("evaluate={../x: quiz}", "evaluate.../x: a name may hold letters, digits, '_' and '-' only"),
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("workers=-1", "workers must be 0 or more, got -1"),
        ("data_root=", "data_root must be a folder, got ''"),
        ("limits.max_bad_fraction=1.5", "limits: max_bad_fraction must be from 0 to 1, got 1.5"),
        ("saving.keep=0", "saving: keep must be at least 1, got 0"),
        ("name=???", "name: has no value yet"),
        ("extends=other", "extends: Key 'extends' not in 'Recipe'"),
        ("name.first=x", "name: has no key 'first', it is 'demo'"),
        ("seed", "must be key=value"),
        ("=1", "must be key=value"),
        ("stages..align=1", "must be key=value"),
        ("seed=[", "seed: not valid YAML: "),
        ("model.connector={name: ${name}}", "inside { } or [ ] put text with ${…} in quotes"),
        (
            "seed=!!python/object/apply:os.system [x]",
            "seed: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is",
        ),
    ],
)
def test_each_mistake_is_named_by_its_key_and_override(load: Load, override: str, complaint: str) -> None:
    [line] = complaints(load, override)
    assert line.startswith(f"override '{override}': ")
    assert complaint in line


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.align.steps=10", "demo.yaml:20: stages.align: epochs and steps are both given; leave one out"),
        ("stages.align.data.captions=null", "demo.yaml:13: stages.align: data must have at least one source"),
        (
            "stages.align.data.more={format: chat, path: x, share: 1}",
            "demo.yaml:13: stages.align: data mixes shares; give every source a number, or all of them 'all'",
        ),
    ],
)
def test_what_does_not_fit_together_is_placed_at_the_first_key(load: Load, override: str, complaint: str) -> None:
    assert complaints(load, override) == [complaint]


def test_the_same_mistakes_in_a_file_have_its_line(load: Load) -> None:
    text = TEXT.replace("lr: 2e-3", "lr: -1").replace("connector: linear", "connector: liner")
    assert complaints(load, text=text) == [
        "demo.yaml:4: model.connector.name: no connectors named 'liner'; did you mean 'linear'?",
        "demo.yaml:17: stages.align.optimizer: lr must be positive, got -1.0",
    ]


def test_all_mistakes_come_in_one_report(load: Load) -> None:
    text = TEXT.replace("batch_size: 128", "batch_size: many").replace("lr: 2e-3", "lr: 0\n      betas: [2, 0]")
    lines = complaints(load, "wrokers=1", "name=a b", "limits.max_pixels=0", "limits.max_bad_samples=x", text=text)
    assert lines == [
        "override 'wrokers=1': wrokers: Key 'wrokers' not in 'Recipe'; did you mean 'workers'?",
        "override 'name=a b': name must be letters, digits, '_' and '-' only, got 'a b'",
        "demo.yaml:17: stages.align.optimizer: lr must be positive, got 0.0",
        "demo.yaml:18: stages.align.optimizer: betas must be from 0 to below 1, got (2.0, 0.0)",
        "demo.yaml:19: stages.align.batch_size: must be a whole number, got 'many'",
        "override 'limits.max_bad_samples=x': limits.max_bad_samples: must be a whole number, got 'x'",
        "override 'limits.max_pixels=0': limits: max_pixels must be at least 1, got 0",
    ]


def test_a_default_is_not_blamed_for_a_wrong_value(load: Load) -> None:
    assert complaints(load, "stages.align.epochs=x") == [
        "override 'stages.align.epochs=x': stages.align.epochs: must be a whole number, got 'x'"
    ]


def test_keys_of_the_former_plugin_are_not_dropped_in_silence(load: Load) -> None:
    text = TEXT.replace("connector: linear", "connector: {name: mlp, depth: 3}")
    assert complaints(load, "model.connector.name=linear", text=text) == [
        "demo.yaml:4: model.connector.depth: Key 'depth' not in 'LinearConfig'; there is bias, name"
    ]


def test_an_unknown_plugin_is_explained_by_the_ones_that_failed(load: Load, registry: Registry) -> None:
    other = Registry()
    other.plugins.append(
        PluginInfo(name="eyes", package="eyes-kit", version="2.0", module="m", failure="ImportError: x")
    )
    Path("demo.yaml").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"no vision_encoders named 'eyes'.*plugin 'eyes' \(eyes-kit 2.0\) failed"):
        load_recipe("demo.yaml", registry=other)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from leaves(entry, (*path, key))
    else:
        yield path


def test_every_value_of_a_recipe_is_checked(load: Load) -> None:
    resolved = load(
        "prepare.get={name: fetch, path: x}", "evaluate.quiz=quiz", "model.vision_encoder.size.width=1"
    ).to_dict()
    free = ("model", "language_model", "architecture")  # the plugin takes anything there
    paths = [path for path in leaves(resolved) if path[:3] != free]
    assert len(paths) > 50
    for *above, last in paths:
        broken = json.loads(json.dumps(resolved))
        mapping = broken
        for key in above:
            mapping = mapping[key]
        value = mapping[last]
        mapping[last] = "x" if isinstance(value, dict) else {"no": ["such", "value"]}
        lines = complaints(load, text=json.dumps(broken))
        assert any(".".join([*above, last]) in line and line.startswith("demo.yaml:") for line in lines), (above, last)
        mapping[last] = value
        mapping[f"{last}q"] = value
        if above[-1:] in (["trainable"], ["prepare"], ["evaluate"], ["stages"]):
            continue
        lines = complaints(load, text=json.dumps(broken))
        assert any(f"Key '{last}q' not in" in line and f"'{last}'" in line for line in lines), (above, last)


# --- files that are no recipes ---------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdef"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "demo.yaml: is empty; a recipe is a mapping with name, model and stages"),
        ("# nothing\n", "demo.yaml: is empty"),
        ("hello", "demo.yaml: holds 'hello'; a recipe is a mapping"),
        ("- a\n- b\n", "demo.yaml: holds a list; a recipe is a mapping"),
        ("name: a\nmodel: [\n", "demo.yaml:3: not valid YAML: "),
        ("name: a\n\tmodel: b\n", "demo.yaml:2: not valid YAML: found character '\\t'"),
        ("name: a\n---\nname: b\n", "demo.yaml:2: not valid YAML: but found another document"),
        ("name: '\0'\n", "not valid YAML: special characters are not allowed"),
        ('name: "\\UFFFFFFFF"\n', "demo.yaml:1: not valid YAML: "),
        (b"name: \xff\n", "demo.yaml: is not UTF-8 text: invalid start byte at byte 6"),
        ("name: " + "[" * 40 + "]" * 40, "demo.yaml:1: not valid YAML: more than 10,000 values or 32 levels"),
        ("[" * 5000, "demo.yaml:1: not valid YAML: more than 10,000 values or 32 levels"),
        ("name: [" + "1," * 20_000 + "]", "not valid YAML: more than 10,000 values or 32 levels"),
        ("name: &a [*a]", "demo.yaml:1: name: more than 10,000 values or 32 levels once its aliases are written out"),
        (BOMB, "more than 10,000 values or 32 levels once its aliases are written out"),
        ("#" * 1_000_001, "longer than 1,000,000 characters; a recipe is short"),
        ("#" * 4_000_001, "demo.yaml: 4,000,001 bytes is too large for a recipe"),
    ],
)
def test_files_that_are_no_recipes(load: Load, text: str | bytes, complaint: str) -> None:
    [line] = complaints(load, text=text)
    assert complaint in line


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("seed: 1\nseed: 2\n", "demo.yaml:23: seed: given twice, first at demo.yaml:22; remove one of the two"),
        ("limits: {keep: 1, keep: 1}\n", "demo.yaml:22: limits.keep: given twice"),
        ("1: x\n", "demo.yaml:22: the key 1 is not text; put it in quotes"),
        ("on: x\n", "demo.yaml:22: the key on is not text; put it in quotes"),
        ("? [a]\n: x\n", "demo.yaml:22: the key a mapping or list is not text"),
        ("<<: {seed: 1}\n", "demo.yaml:22: '<<' is not supported; a recipe takes over another with 'extends'"),
        ("seed: !!int x\n", "demo.yaml:22: seed: 'x' is not of type int"),
        ("seed: !!float ''\n", "demo.yaml:22: seed: '' is not of type float"),
        ("seed: !function x.py\n", "demo.yaml:22: seed: the tag '!function' is refused; a recipe is plain data"),
        ("seed: !!set {a}\n", "demo.yaml:22: seed: the tag 'tag:yaml.org,2002:set' is refused"),
        ("seed: 0777\n", "demo.yaml:22: seed: must be a whole number, but '0777' reads as 511 in YAML; write a number"),
        ('data_root: "\\ud800"\n', "demo.yaml:22: data_root: '\\ud800' is not of type str"),
    ],
)
def test_yaml_surprises(load: Load, more: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints(load, text=TEXT + more))


def test_a_target_that_is_no_recipe_is_explained(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for target, complaint in (
        (
            "lava_v1",
            "there is no recipe 'lava_v1'; give the path of a file or the name of a shipped recipe; did you mean",
        ),
        ("x" * 5000, "there is no recipe"),
        ("a\0b", "there is no recipe"),
        (tmp_path / "folder.yaml", "is not a regular file"),
    ):
        with pytest.raises(RecipeError, match=complaint):
            load_recipe(target, registry=registry)


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "name=${oc.env:HOME}",
            "name: '${oc.env:HOME}' is not a reference to a key; a recipe may refer to its own keys",
        ),
        ("name=${now:}", "name: '${now:}' is not a reference to a key"),
        ("name=${${seed}}", "name: '${${seed}}' is not a reference to a key"),
        ("name=${", "name: '${' is not a reference to a key"),
        (
            "name=${data_rot}",
            "name: '${data_rot}' refers to 'data_rot', which is not in the recipe; did you mean 'data_root'?",
        ),
        ("name=${name}", "name: '${name}' refers to itself; name -> name"),
        ("name=${model}", "name: '${model}' refers to a mapping; refer to a single value"),
    ],
)
def test_wrong_references(load: Load, override: str, complaint: str) -> None:
    [line] = complaints(load, override)
    assert line.startswith(f"override '{override}': {complaint}")


def test_a_circle_of_references_is_reported_once(load: Load) -> None:
    [line] = complaints(load, "name=${data_root}", "data_root=x${name}")
    assert "'${name}' refers to itself" not in line
    assert line.endswith("refers to itself; name -> data_root -> name")


def test_references_cannot_grow_without_end(load: Load) -> None:
    text = TEXT.replace("./words", "x" * 9000)
    overrides = ["model.language_model.revision=${model.language_model.model}${model.language_model.model}"]
    [line] = complaints(load, *overrides, text=text)
    assert "more than 10,000 characters; write the value itself" in line


def test_the_environment_cannot_be_smuggled_in(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "secret")
    lines = complaints(load, "data_root=$", "name=${data_root}{oc.env:CANARY}")
    assert "makes another reference" in lines[0]
    assert "secret" not in "".join(lines)


# --- what a loaded recipe does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps", "warmup"),
    [(595_375, 128, 1, 4_652, 140), (157_712, 32, 3, 14_787, 444), (665_298, 128, 1, 5_198, 156), (100, 50, 1, 2, 1)],
)
def test_steps_and_warmup(load: Load, samples: int, batch: int, epochs: int, steps: int, warmup: int) -> None:
    stage = replace(load().stages["align"], batch_size=batch, micro_batch_size=1, epochs=epochs, samples=samples)
    assert stage.epoch_samples() == samples
    assert stage.total_steps(samples) == steps
    assert stage.schedule.warmup(steps) == warmup


def test_warmup_steps_win_over_the_ratio_and_rounding_is_not_fooled() -> None:
    assert Schedule(warmup_steps=0).warmup(1000) == 0
    assert Schedule(warmup_ratio=0.07).warmup(100) == 7  # 0.07 * 100 is 7.000000000000001


def test_an_epoch_is_declared_or_counted(load: Load) -> None:
    stage = load("stages.align.samples=null", "stages.align.data.more={format: chat, path: x, samples: 5}").stages[
        "align"
    ]
    assert stage.epoch_samples({"captions": 7, "more": 100}) == 12
    with pytest.raises(
        RecipeError, match=r"data\.captions: how many samples there are is not known; declare 'samples'"
    ):
        stage.epoch_samples()
    assert replace(stage, epochs=None, steps=9).total_steps(12) == 9


def test_a_stage_made_in_python_is_checked_too(load: Load) -> None:
    stage = load().stages["align"]
    with pytest.raises(ValueError, match="warmup_steps must be below steps") as caught:
        Stage(
            **{**vars(stage), "epochs": None, "steps": 5, "schedule": Schedule(warmup_steps=5), "micro_batch_size": 3}
        )
    assert caught.value.args == (
        "batch_size 128 is no multiple of micro_batch_size 3; 2 or 4 would fit",
        "schedule.warmup_steps must be below steps (5), got 5",
    )


def test_the_source_says_where_a_value_was_written(load: Load) -> None:
    source = load("seed=3").source
    assert source.label == "demo.yaml"
    assert source.where("stages", "align", "max_length") == "demo.yaml:21: stages.align.max_length"
    assert source.where("stages", "align", "precision") == "demo.yaml:10: stages.align.precision"
    assert source.where("seed") == "override 'seed=3': seed"


def test_a_saved_recipe_loads_as_the_same(load: Load, registry: Registry, tmp_path: Path) -> None:
    recipe = load(
        "model.language_model.revision='010'", "model.language_model.architecture={a: '1e-5', b: [1, null, no]}"
    )
    recipe.save(tmp_path / "saved.yaml")
    assert "${" not in (tmp_path / "saved.yaml").read_text()
    again = load_recipe(tmp_path / "saved.yaml", registry=registry)
    assert again == recipe
    assert again.model.language_model.config.architecture == {"a": "1e-5", "b": [1, None, False]}
    assert again.to_dict() == recipe.to_dict()


# --- the shipped recipes ---------------------------------------------------------------------------------------------


def test_recipes_are_found_by_name_without_torch() -> None:
    code = "import sys, llava_kit.recipe as r; print(r.shipped_recipes()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([path.stem for path in SHIPPED])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_saving(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(path.stem) == load_recipe(f"recipes/{path.name}") == load_recipe(path.name) == recipe
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize("name", ["llava_v1", "llava_v1_13b"])
def test_the_full_recipes_plan_what_the_paper_did(name: str) -> None:
    assert name in shipped_recipes()
    stages = load_recipe(name).stages
    plan = {key: stage.total_steps(stage.epoch_samples()) for key, stage in stages.items()}
    assert plan == {"align": 4_652, "instruct": 14_787}
    assert {key: stage.schedule.warmup(plan[key]) for key, stage in stages.items()} == {"align": 140, "instruct": 444}
    assert [(stage.optimizer.lr, stage.batch_size) for stage in stages.values()] == [(2e-3, 128), (2e-5, 32)]
    assert [source.share for source in stages["instruct"].data.values()] == [0.5, 0.5]
