"""The command line: exit codes, one line for every mistake, and JSON that is nothing but JSON."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from surface import record, write_data, write_parts, write_recipe

from llava_kit import cli
from llava_kit.errors import DataError, DivergedError, KitError, ModelError, Problem, RecipeError, ResourceError
from llava_kit.failures import TerminatedError, run_guarded
from llava_kit.talk import talk


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llava_kit", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with tiny parts, ten samples, and a question to be scored on."""
    folder = tmp_path_factory.mktemp("project")
    write_parts(folder)
    write_data(folder, [record(f"s{number}") for number in range(10)])
    question = {"question_id": "q1", "image": "s1.png", "text": "what?", "answer": "red"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    write_recipe(folder, epochs=None, steps=2)
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> str:
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def run(folder: Path, recipe: str) -> str:
    """A finished run of it."""
    held_out = f"{{name: exact_match, questions: {folder}/questions.jsonl, images: {folder}/images, shuffled: false}}"
    target = str(folder / "run")
    assert cli.run(["train", recipe, "--run", target, f"evaluate.held_out={held_out}", "--json"]) == 0
    return target


# --- what is light stays light ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "list"], ["recipes", "show", "x"]])
def test_light_verbs_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"import sys; from llava_kit import cli; cli.run({arguments!r}); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1]
    assert "'typer'" in loaded
    assert "'torch'" not in loaded and "'transformers'" not in loaded and "'open_clip'" not in loaded


def test_no_arguments_show_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    shown = capsys.readouterr().out
    verbs = ("train", "inspect", "preview", "check-data", "chat", "evaluate", "recipes", "plugins", "env")
    assert all(verb in shown for verb in verbs)


def test_every_verb_has_json_and_debug() -> None:
    import typer

    def leaves(command: Any) -> list[Any]:
        return (
            [leaf for one in command.commands.values() for leaf in leaves(one)]
            if hasattr(command, "commands")
            else [command]
        )

    for leaf in leaves(typer.main.get_command(cli.app)):
        options = {name for parameter in leaf.params for name in parameter.opts}
        assert {"--json", "--debug"} <= options, leaf.name


def test_python_m_is_the_same() -> None:
    done = command("recipes", "list", "--json")
    assert done.returncode == 0
    assert "quickstart" in [one["name"] for one in json.loads(done.stdout)]


# --- recipes, plugins, environment -----------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "list"]) == 0
    assert "llava_v1 " in capsys.readouterr().out
    assert cli.run(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert "name: quickstart" in text
    assert cli.run(["recipes", "copy", "quickstart", str(tmp_path)]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == text
    capsys.readouterr()
    assert cli.run(["recipes", "copy", "quickstart", str(tmp_path)]) == 2
    expected = f"error[2] {tmp_path}/quickstart.yaml: exists already; give another destination\n"
    assert capsys.readouterr().err == expected


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "show", "quikstart"]) == 2
    assert capsys.readouterr().err == "error[2] recipes: there is no recipe 'quikstart'; did you mean 'quickstart'?\n"


def test_plugins_say_who_provides_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plugins", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["connectors"]["package"] == "llava-kit"
    assert {"kind": "connectors", "name": "mlp"} in rows["connectors"]["components"]
    assert cli.run(["plugins", "list"]) == 0
    assert "preparations: hub_data" in capsys.readouterr().out


def test_blocked_and_failed_plugins_are_shown() -> None:
    from llava_kit.plugin_list import describe_plugins
    from llava_kit.registry import PluginInfo, Registry

    about = {"package": "p", "version": "1", "module": "m"}
    plugins = [PluginInfo(name="a", failure="ImportError: x", **about), PluginInfo(name="b", blocked=True, **about)]
    rows = describe_plugins(Registry(plugins=plugins))
    assert [(row["state"], row["reason"]) for row in rows] == [("failed", "ImportError: x"), ("blocked", "")]


def test_env_has_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["env", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["packages"]
    assert cli.run(["env"]) == 0
    assert "torch " in capsys.readouterr().out


# --- looking before training -----------------------------------------------------------------------------------------


def test_inspect_as_table_and_as_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", recipe]) == 0
    assert "trains connector" in capsys.readouterr().out
    assert cli.run(["inspect", recipe, "model.connector=mlp", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parts"][1]["plugin"] == "mlp" and plan["problems"] == []


def test_inspect_reads_run_folders(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", run]) == 0
    assert cli.run(["inspect", str(tmp_path)]) == 4
    assert "no run folder: it has no recipe.yaml" in capsys.readouterr().err


def test_a_dry_run_shows_recipe_and_plan_and_does_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", recipe, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "name: tiny" in shown and "trains connector" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_everything_that_does_not_fit(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    change = ["stages.align.max_length=16", "stages.align.trainable.connector=[nothing]"]
    assert cli.run(["train", recipe, "--dry-run", *change[:1]]) == 2
    err = capsys.readouterr().err
    assert err.count("error[2]") == 1 and "leaves no room for words in 16" in err


def test_the_plan_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "llava_v1", "--dry-run", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    plan = [(stage["samples"], stage["steps"], stage["warmup"]) for stage in stages]
    assert plan == [(595_375, 4_652, 140), (157_712, 14_787, 444)]


def test_preview_prints_an_object_for_each_sample(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["preview", recipe, "--stage", "align", "-n", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["s0", "s1"]
    assert set(rows[0]) == {"id", "input_ids", "labels", "expanded_length", "truncated", "problems"}
    assert cli.run(["preview", recipe]) == 0
    assert "id s0" in capsys.readouterr().out


def test_check_data_exits_3_over_the_limits(folder: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check-data", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["align"]["used"] == 10
    bad = folder / "bad"
    write_data(bad, [record("s1"), record("s2", image="gone.jpg")])
    change = [f"stages.align.data.chat.path={bad}/chat.json", f"stages.align.data.chat.images={bad}/images"]
    assert cli.run(["check-data", recipe, *change, "limits.max_bad_samples=0"]) == 3
    said = capsys.readouterr()
    assert "gone.jpg" in said.out
    assert said.err.startswith("error[3] stages.align.data: 1 of 2 samples cannot be used")


# --- training and use ------------------------------------------------------------------------------------------------


def test_train_makes_a_run_folder_with_scores(run: str) -> None:
    assert (Path(run) / "report.html").is_file()
    assert "held_out" in json.loads((Path(run) / "evaluation" / "summary.json").read_text())


def test_train_refuses_a_folder_that_holds_a_run(run: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", recipe, "--run", run]) == 2
    assert "this folder holds a run already; --resume goes on with it" in capsys.readouterr().err


def test_evaluate_prints_the_summary(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", run, "--on", "held_out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out"]["align"]["count"] == 1
    assert cli.run(["evaluate", run]) == 0
    assert "held_out" in capsys.readouterr().out
    assert cli.run(["evaluate", run, "--on", "heldout"]) == 2
    assert "did you mean 'held_out'?" in capsys.readouterr().err


def test_chat_answers_one_message(run: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / "images" / "s1.png")
    arguments = ["chat", run, "--image", image, "--message", "what?", "--max-new-tokens", "3"]
    assert cli.run([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == "what?" and answer["new_tokens"] <= 3
    assert set(answer) == {"question", "text", "finish_reason", "prompt_tokens", "new_tokens", "seconds"}
    assert cli.run(arguments) == 0


def test_chat_reads_questions_from_a_pipe(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one?\n\ntwo?\n/new\nthree?\n"))
    assert cli.run(["chat", run, "--max-new-tokens", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["one?", "two?", "three?"]
    assert rows[1]["prompt_tokens"] > rows[2]["prompt_tokens"] - 2  # the second has the first in front of it


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--image", "gone.png"], 2, "error[2] gone.png: there is no such image"),
        (["--temperature", "nan"], 2, "error[2] chat: temperature must be between 0 and 100, got nan"),
        (["--top-p", "0"], 2, "error[2] chat: top_p must be above 0 and at most 1, got 0.0"),
        (["--stage", "instruct"], 4, "has no finished stage 'instruct'"),
        (["--max-new-tokens", "many"], 2, "error[2] usage: Invalid value for '--max-new-tokens'"),
    ],
)
def test_chat_names_what_is_wrong(
    run: str, arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["chat", run, "-m", "hi", *arguments]) == code
    assert complaint in capsys.readouterr().err


def test_chat_needs_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["chat", str(tmp_path / "gone"), "-m", "hi"]) == 4
    assert "there is no such folder" in capsys.readouterr().err


# --- the conversation loop -------------------------------------------------------------------------------------------


class Parrot:
    """Repeats what it was asked, and how many pictures came with it; fails on demand."""

    def __init__(self) -> None:
        self.resets = 0

    def ask(self, text: str, images: Any = ()) -> Any:
        if text == "fail":
            raise DataError(Problem("x.png", "the image is broken"))
        return f"{text}/{len(images)}"

    def reset(self) -> None:
        self.resets += 1


def converse(lines: list[str], *, forgiving: bool) -> tuple[list[str], list[str], Parrot]:
    parrot, answers, notes = Parrot(), list[str](), list[str]()

    def answered(_: str, answer: Any) -> None:
        answers.append(answer)

    first = (Path("first.png"),)
    talk(parrot, iter(lines), first, answered=answered, noted=notes.append, forgiving=forgiving)
    return answers, notes, parrot


def test_pictures_go_with_the_next_question(tmp_path: Path) -> None:
    (tmp_path / "a b.png").touch()
    answers, notes, _ = converse(["one", f"/image {tmp_path}/a b.png", "two", "three"], forgiving=True)
    assert answers == ["one/1", "two/1", "three/0"]
    assert notes == ["a b.png goes with the next question"]


def test_new_forgets_everything() -> None:
    answers, notes, parrot = converse(["/new", "one", "", "never asked"], forgiving=True)
    assert (answers, notes, parrot.resets) == (["one/0"], ["a new conversation"], 1)


def test_a_person_is_told_and_goes_on() -> None:
    answers, notes, _ = converse(["/image gone.png", "/what", "fail", "one"], forgiving=True)
    assert answers == ["one/0"]
    assert notes[0] == "gone.png: there is no such image"
    assert notes[1].startswith("/what: no such command; /image FILE shows a picture")
    assert notes[2] == "x.png: the image is broken"


def test_a_pipe_stops_at_a_mistake() -> None:
    with pytest.raises(RecipeError, match="no such command"):
        converse(["/what"], forgiving=False)


# --- how a command ends ----------------------------------------------------------------------------------------------


def fail(error: BaseException, capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, str]:
    def raising() -> None:
        raise error

    code = run_guarded(raising, **({"as_json": False, "debug": False} | options))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"), [(RecipeError, 2), (DataError, 3), (ModelError, 4), (DivergedError, 5), (ResourceError, 6)]
)
def test_every_kind_of_error_has_its_code(kind: type[KitError], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = kind([Problem("here", "is wrong", "mend it"), Problem("there", "two\nlines \x1b[2J")])
    expected = f"error[{code}] here: is wrong; mend it\nerror[{code}] there: two lines \\x1b[2J\n"
    assert fail(error, capsys) == (code, expected)


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fail(ModelError(Problem("here", "is wrong", "mend it")), capsys, as_json=True)
    assert (code, json.loads(said)) == (4, {"code": 4, "where": "here", "message": "is wrong", "hint": "mend it"})


def test_unexpected_errors_have_no_traceback_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = fail(ZeroDivisionError("by nothing\nat all"), capsys)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith("error[1] test_cli.py:")
    assert said.endswith("unexpected ZeroDivisionError: by nothing; run again with --debug for the traceback\n")
    code, said = fail(ZeroDivisionError("by nothing"), capsys, debug=True)
    assert code == 1 and "Traceback (most recent call last)" in said


def test_memory_and_disk_are_resources(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    allocator = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), allocator):
        code, said = fail(error, capsys)
        assert code == 6 and "out of memory" in said
    code, said = fail(OSError(errno.ENOSPC, "No space left", "/x/y"), capsys)
    assert (code, said) == (6, "error[6] /x/y: the disk is full; make room and try again\n")


def test_exit_statuses_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(SystemExit(143), capsys) == (143, "")
    assert fail(SystemExit(None), capsys) == (0, "")
    assert fail(KeyboardInterrupt(), capsys) == (130, "error[130] interrupted\n")
    assert fail(TerminatedError(), capsys) == (143, "error[143] terminated\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["bogus"], "error[2] usage: No such command 'bogus'"),
        (["train"], "error[2] usage: Missing argument 'RECIPE'; see `llava-kit train --help`"),
        (["train", "x", "--bogus"], "error[2] usage: No such option"),
        (["preview", "x", "-n", "0"], "error[2] usage: Invalid value for '-n'"),
        (["train", "nowhere.yaml"], "error[2] nowhere.yaml: there is no recipe 'nowhere.yaml'"),
    ],
)
def test_wrong_command_lines_exit_2(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(complaint) and said.err.count("\n") == 1 and said.out == ""


def test_json_keeps_stdout_clean_when_things_go_wrong(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", recipe, "stages.align.lr=1", "nam=x", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    problems = [json.loads(line) for line in said.err.splitlines()]
    assert len(problems) == 2 and all(set(one) == {"code", "where", "message", "hint"} for one in problems)


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "llava_kit", "recipes", "show", "quickstart"]
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_codes(run: str, number: int, code: int) -> None:
    line = [sys.executable, "-m", "llava_kit", "chat", run]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(line, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        process.stdout.readline()  # it has answered, and waits for the next question
        process.send_signal(number)
        assert process.wait(60) == code
        assert b"Traceback" not in process.stderr.read()
