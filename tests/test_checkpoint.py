from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from llava_kit import checkpoint
from llava_kit.checkpoint import RunFolder, find_damage, list_steps, newest_valid, prune, save_folder, step_folder
from llava_kit.errors import ModelError, ResourceError


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 100)
    (folder / "b.json").write_text("{}")


def save(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        save_folder(step_folder(checkpoints, step), write)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "a.bin").write_bytes(b"a" * 99), "a.bin has 99 bytes instead of 100"),
        (lambda f: (f / "a.bin").write_bytes(b"a" * 99 + b"b"), "a.bin does not match its checksum"),
        (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("[1]"), "MANIFEST.json cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("{}"), "MANIFEST.json is empty"),
    ],
)
def test_every_kind_of_damage_is_found_and_passed_over(tmp_path: Path, harm, complaint: str) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 10, 20)
    assert newest_valid(tmp_path) == (20, [])
    harm(step_folder(tmp_path, 20))
    assert find_damage(step_folder(tmp_path, 20)) == complaint
    step, skipped = newest_valid(tmp_path)
    assert step == 10
    assert [str(problem) for problem in skipped] == [f"{tmp_path}/step-20: {complaint}; passed over"]


def test_pruning_counts_valid_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    (step_folder(tmp_path, 4) / "a.bin").unlink()
    prune(tmp_path, keep=2)
    assert list_steps(tmp_path) == [4, 3, 2]


def test_a_failed_write_leaves_the_old_state_and_no_litter(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"the disk is full, [\d,]+ bytes are free; earlier checkpoints are intact"):
        save_folder(step_folder(tmp_path, 2), full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_files_reach_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, Path.replace

    def opened(path, *args, **kwargs):  # type: ignore[no-untyped-def]
        descriptor = real_open(path, *args, **kwargs)
        names[descriptor] = str(path)
        return descriptor

    def synced(descriptor: int) -> None:
        events.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    save(tmp_path, 1)
    assert events == [
        "fsync a.bin", "fsync b.json", "fsync MANIFEST.json", "fsync .tmp-step-1",
        "rename .tmp-step-1", f"fsync {tmp_path.name}",
    ]  # fmt: skip


KILLED = """
import os, sys
from pathlib import Path
from llava_kit import checkpoint
left = int(sys.argv[2])
def counted(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call
os.fsync, os.mkdir, os.rename = counted(os.fsync), counted(os.mkdir), counted(os.rename)
Path.write_text, Path.write_bytes, Path.replace = map(counted, (Path.write_text, Path.write_bytes, Path.replace))
def write(folder):
    (folder / "a.bin").write_bytes(b"a" * 100)
    (folder / "b.json").write_text("{}")
for step in (1, 2):
    checkpoint.save_folder(checkpoint.step_folder(Path(sys.argv[1]), step), write)
    print(step, flush=True)
checkpoint.prune(Path(sys.argv[1]), keep=1)
"""


def test_killed_at_any_operation_a_told_checkpoint_is_there(tmp_path: Path) -> None:
    """Forks after the imports, so that every crash point costs milliseconds."""
    harness = """
import os, sys, io
source = sys.stdin.read()
from llava_kit import checkpoint
points = 0
while True:
    folder = os.path.join(sys.argv[1], str(points))
    child = os.fork()
    if child == 0:
        sys.argv = ["", folder, str(points)]
        os.dup2(os.open(folder + ".told", os.O_CREAT | os.O_WRONLY), 1)
        exec(compile(source, "child", "exec"), {"__name__": "child"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    points += 1
    if status == 0:
        break
print(points)
"""
    done = subprocess.run(
        [sys.executable, "-c", harness, str(tmp_path)], input=KILLED, capture_output=True, text=True, check=True
    )
    points = int(done.stdout.split()[-1])
    assert points > 15, "there are that many operations to die in"
    for point in range(points):
        told = (tmp_path / f"{point}.told").read_text().split()
        step, _ = newest_valid(tmp_path / str(point))
        assert (step or 0) >= max(map(int, told), default=0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_training_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    first, names = model(), {"0.weight", "0.bias", "1.weight", "1.bias"}
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1)
    for _ in range(3):
        first(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    checkpoint.write_training_state(tmp_path, first, names, optimizer, {"step": 3})
    expected_random = torch.rand(3)
    second = model()
    other = torch.optim.AdamW(second.parameters(), lr=0.1)
    assert checkpoint.read_training_state(tmp_path, second, names, other) == {"step": 3}
    assert torch.equal(torch.rand(3), expected_random)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint.save_file(checkpoint.trained_tensors(model(), {"0.weight", "1.bias"}), tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        checkpoint.load_trained(nn.Sequential(nn.Linear(3, 5)), tmp_path / "w.safetensors")
    assert "0.weight: has shape [4, 3], the model has [5, 3]" in str(caught.value)
    assert "1.bias: the model has no such parameter" in str(caught.value)
    with pytest.raises(ModelError, match=r"w.safetensors: 1.weight: is missing"):
        checkpoint.load_trained(model(), tmp_path / "w.safetensors", {"0.weight", "1.bias", "1.weight"})
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"w.safetensors: cannot be read"):
        checkpoint.load_trained(model(), tmp_path / "w.safetensors")


def test_a_stage_is_finished_when_its_json_says_so_and_its_weights_are_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.finished("align") is None
    run.finish_stage("align", checkpoint.trained_tensors(model(), {"0.weight"}), {"steps": 7})
    facts = run.finished("align")
    assert facts is not None and facts["steps"] == 7
    for damaged in ("{", "[]"):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "stage.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"stage.json: is no JSON"):
            run.finished("damaged")
    weights = run.stage("align") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match=r"does not match its checksum; remove .*stage.json to train the stage again"):
        run.finished("align")


def test_a_run_folder_is_one_process_s_own(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from llava_kit.checkpoint import RunFolder\n"
    code += "from llava_kit.errors import ResourceError\n"
    code += "try:\n  with RunFolder(Path(sys.argv[1])).locked(): print('mine')\n"
    code += "except ResourceError as error: print(error)"

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with RunFolder(tmp_path).locked():
        assert "another process is using this run folder; wait for it, or choose another --run" in other()
    assert other() == "mine"


def test_rows_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [("align", 1), ("align", 2), ("tune", 1), ("tune", 2), ("tune", 3)]
    for stage, step in rows:
        run.append(run.metrics, {"stage": stage, "step": step})
    with run.metrics.open("a") as file:
        file.write('{"stage": "tune", "st')
    run.cut_rows(run.metrics, "tune", 1)
    left = [tuple(json.loads(line).values()) for line in run.metrics.read_text().splitlines()]
    assert left == [("align", 1), ("align", 2), ("tune", 1)]
