"""The original's behaviour, worked out by hand, and the table that says where it is held."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from parts import tiny_model

from llava_kit.contracts import IGNORE, IMAGE_TOKEN, Layout, Views
from llava_kit.errors import SampleError
from llava_kit.plan import PlacedImage, PlanSequence, build_plan
from llava_kit.recipe import Optimizer
from llava_kit.schedule import make_optimizer
from llava_kit.tokens import Tokens, fit

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "fidelity.md").read_text("utf-8")
FOUR = Layout(grid_h=2, grid_w=2, prefix_tokens=1)
# Three samples of the original's merge, N = 4 rows an image: one with an image, text only, one with another image.
IDS = [[1, IMAGE_TOKEN, 5, 6], [1, 7, 8, 9, 10], [1, 3, IMAGE_TOKEN, 4, 11, 12]]
X = IGNORE
MERGED = [[1, X, X, X, X, 5, 6], [1, 7, 8, 9, 10], [1, 3, X, X, X, X, 4, 11, 12]]


def sequences() -> list[PlanSequence]:
    made = []
    for number, ids in enumerate(IDS):
        image = PlacedImage(views=Views(pixels_NCHW=torch.zeros(1, 3, 2, 2), layout=FOUR), rows=4)
        labels = [IGNORE if index == IMAGE_TOKEN else index for index in ids]
        images = (image,) * ids.count(IMAGE_TOKEN)
        made.append(PlanSequence(id=str(number), tokens=Tokens(ids=ids, labels=labels), images=images))
    return made


def merged(pad: str) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ids of all rows (image rows are −200, padding −1), labels as the original has them, and the mask."""
    _, plan = build_plan(sequences(), per_token=True, pad=pad)  # type: ignore[arg-type]
    rows = torch.full((plan.rows,), -2)
    rows[plan.txt_dst_S.long()] = plan.txt_id_S.long()
    visual = plan.vis_dst_V[plan.vis_dst_V >= 0].long()
    assert (rows[visual] == -2).all(), "nothing is written twice"
    rows[visual] = IMAGE_TOKEN
    labels = torch.full((plan.rows,), IGNORE)
    labels[plan.label_row_L.long() + 1] = plan.label_id_L  # ours are shifted already
    shape = plan.mask_BT.shape
    return rows.view(shape).tolist(), labels.view(shape).tolist(), plan.mask_BT.int().tolist()


def test_the_merge_of_the_original() -> None:
    rows, labels, mask = merged("right")
    assert [sum(row) for row in mask] == [7, 5, 9]
    for row, label, expected in zip(rows, labels, MERGED, strict=True):
        padding = [X] * (9 - len(expected))
        # The first token has a label in the original too, which its shift throws away.
        assert label == [X, *expected[1:], *padding]
        assert row == [IMAGE_TOKEN if index == X else index for index in expected] + [-1] * len(padding)


def test_the_merge_of_the_original_padded_on_the_left() -> None:
    rows, labels, mask = merged("left")
    for row, label, own, expected in zip(rows, labels, mask, MERGED, strict=True):
        space = 9 - len(expected)
        assert own == [0] * space + [1] * len(expected)
        assert label == [X] * (space + 1) + expected[1:]
        assert row[space:] == [IMAGE_TOKEN if index == X else index for index in expected]


def test_truncation() -> None:
    """To five rows: the original keeps the first five of each; the first has nothing to learn left, the third would
    be cut through its image."""
    first, second, third = sequences()
    with pytest.raises(SampleError, match="nothing to learn: the answer begins behind row 5 of 7"):
        fit(first.tokens, [4], 5)
    assert fit(second.tokens, [], 5).tokens == second.tokens
    cut = fit(third.tokens, [4], 5)
    assert (cut.tokens.ids, cut.images, cut.full_length) == ([1, 3], 0, 9)
    assert fit(third.tokens, [4], 8).tokens.ids == [1, 3, IMAGE_TOKEN, 4, 11]


def test_optimizer_groups_of_the_original(tmp_path: Path) -> None:
    """Four groups: decay or not, by the names of layers; language model or projector, by rate."""
    model = tiny_model(tmp_path, connector="mlp")
    model.vision_encoder.requires_grad_(False)
    optimizer = make_optimizer(model, Optimizer(lr=2e-4, component_lr={"connector": 2e-5}, weight_decay=0.1))
    expected: dict[tuple[float, float], set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if "norm" in name or "bias" in name else 0.1
            rate = 2e-5 if name.startswith("connector.") else 2e-4
            expected.setdefault((rate, decay), set()).add(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        (group["peak_lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert found == expected
    assert len(found) == 4
    assert all((group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8) for group in optimizer.param_groups)


# --- the table -------------------------------------------------------------------------------------------------------

NAMED = re.findall(r"`(tests/\w+\.py)::(\w+)`", TABLE)


def test_every_row_names_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len(rows) > 30
    assert not [row for row in rows if "`tests/" not in row and "held by" not in row]


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED)))
def test_the_tests_it_names_exist(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_keys_it_names_exist() -> None:
    from llava_kit.recipe_spelling import ORIGINAL

    assert set(re.findall(r"`compatibility: \[(\w+)\]`", TABLE)) == set(ORIGINAL)
