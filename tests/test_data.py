from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_tokenizers import llama_like

from llava_kit.contracts import ImageSlot, Layout, Sample, Segment, Turn, Views
from llava_kit.data import Collator, MicroBatch, Quarantine, Rejected, batch_to, write_data_report
from llava_kit.errors import DataError, ModelError, Problem, RecipeError, ResourceError, SampleError
from llava_kit.loader import batches, load, micro_positions, step_positions
from llava_kit.order import Order, Position, largest_remainder
from llava_kit.plan import PlacedImage, PlanSequence, build_plan, check_plan
from llava_kit.tokens import Encoder, Tokens

IMAGE = -200
NONE = -100


@dataclass(frozen=True)
class Limits:
    max_bad_samples: int = 100
    max_bad_fraction: float = 0.01
    max_pixels: int = 50_000_000
    max_aspect: float = 200.0


# --- order -----------------------------------------------------------------------------------------------------------


def order(lengths: dict[str, int], shares: dict[str, float] | None = None, **settings: Any) -> Order:
    all_shares = {name: (shares or {}).get(name) for name in lengths}
    return Order(**{"seed": 0, "stage": "tune", "lengths": lengths, "shares": all_shares, **settings})


def epoch(of: Order, number: int) -> list[Position]:
    return of.positions(number, 0, of.epoch_size)


def test_an_epoch_has_every_sample_once_in_another_order_each_time() -> None:
    made = order({"a": 30, "b": 12})
    everything = {Position("a", index) for index in range(30)} | {Position("b", index) for index in range(12)}
    assert made.epoch_size == 42
    for number in range(3):
        assert len(epoch(made, number)) == 42 and set(epoch(made, number)) == everything
    assert epoch(made, 0) != epoch(made, 1)


def test_the_order_depends_on_seed_stage_and_epoch_and_on_nothing_else() -> None:
    lengths = {"a": 30, "b": 12}
    first = epoch(order(lengths), 5)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert epoch(order(lengths), 5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert epoch(order(lengths, seed=1), 5) != first
    assert epoch(order(lengths, stage="align"), 5) != first


def test_part_of_an_epoch_is_a_slice_of_it() -> None:
    made = order({"a": 10})
    assert made.positions(1, 3, 7) == epoch(made, 1)[3:7]
    assert made.positions(1, 8, 99) == epoch(made, 1)[8:]


def test_shares_draw_in_proportion_and_go_through_a_source_before_they_repeat() -> None:
    made = order({"a": 10, "b": 4}, {"a": 1, "b": 1}, epoch_samples=8)
    seen: Counter[Position] = Counter()
    for number in range(5):
        drawn = epoch(made, number)
        assert Counter(position.source for position in drawn) == {"a": 4, "b": 4}
        assert {p.index for p in drawn if p.source == "b"} == {0, 1, 2, 3}
        seen.update(drawn)
    assert {seen[Position("a", index)] for index in range(10)} == {2}  # 5 epochs of 4 are two rounds of 10


def test_a_source_smaller_than_its_share_is_repeated_evenly() -> None:
    made = order({"a": 3, "b": 100}, {"a": 3, "b": 1}, epoch_samples=16)
    counts = Counter(position.index for position in epoch(made, 0) if position.source == "a")
    assert made.counts == [12, 4]
    assert counts == {0: 4, 1: 4, 2: 4}


def test_without_a_size_an_epoch_by_share_is_as_large_as_the_sources() -> None:
    assert order({"a": 10, "b": 4}, {"a": 1, "b": 1}).counts == [7, 7]


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [([1, 1, 1], 10, [4, 3, 3]), ([0.5, 0.3, 0.2], 10, [5, 3, 2]), ([2, 1], 4, [3, 1]), ([0], 0, [0]), ([5], 3, [3])],
)
def test_largest_remainder(weights: list[float], total: int, expected: list[int]) -> None:
    assert largest_remainder(weights, total) == expected


def test_what_is_held_out_is_never_trained_on() -> None:
    made = order({"a": 30, "b": 10}, held_out=8)
    held_out = set(made.held_out)
    assert Counter(position.source for position in held_out) == {"a": 6, "b": 2}
    assert made.epoch_size == 32
    for number in range(3):
        assert not held_out & set(epoch(made, number))
    assert made.held_out == order({"a": 30, "b": 10}, held_out=8).held_out
    by_share = order({"a": 30, "b": 10}, {"a": 1, "b": 1}, epoch_samples=60, held_out=8)
    assert not set(by_share.held_out) & set(epoch(by_share, 0))


def test_holding_out_everything_is_an_error() -> None:
    with pytest.raises(
        RecipeError, match=r"stages.tune.validation.samples: holding out 9 of 4 samples leaves none of a"
    ):
        order({"a": 4}, held_out=9)


# --- steps and micro-batches -----------------------------------------------------------------------------------------


def test_steps_cut_each_epoch_and_its_last_may_be_short() -> None:
    made = order({"a": 10})
    steps = [step_positions(made, step, 4) for step in range(6)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    assert [*chain(*steps[:3])] == epoch(made, 0) and [*chain(*steps[3:])] == epoch(made, 1)


def test_processes_share_a_step_and_do_equally_many_micro_batches() -> None:
    step = [Position("a", index) for index in range(7)]
    parts = [micro_positions(step, 2, rank, 2) for rank in range(2)]
    assert [[[p.index for p in micro] for micro in part] for part in parts] == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    short = [micro_positions(step[:1], 2, rank, 2) for rank in range(2)]
    assert short == [[[Position("a", 0)]], [[]]]


# --- plans, worked out by hand ---------------------------------------------------------------------------------------


def picture(value: float, rows: int, layout: Layout, text: Any = None) -> PlacedImage:
    pixels = torch.full((layout.tiles, 3, 2, 2), value)
    return PlacedImage(views=Views(pixels_NCHW=pixels, layout=layout), rows=rows, text=text)


TWO_ROWS = Layout(grid_h=1, grid_w=2, prefix_tokens=1)


def four_sequences() -> list[PlanSequence]:
    def sequence(name: str, ids: list[int], labels: list[int], *images: PlacedImage) -> PlanSequence:
        return PlanSequence(id=name, tokens=Tokens(ids=ids, labels=labels), images=images)

    return [
        sequence("one", [1, IMAGE, 7, 8], [NONE, NONE, 7, 8], picture(0.1, 2, TWO_ROWS)),
        sequence("text", [1, 5, 6], [NONE, NONE, 6]),
        sequence(
            "two",
            [IMAGE, 4, IMAGE],
            [NONE, 4, NONE],
            picture(0.2, 2, TWO_ROWS),
            picture(0.3, 2, TWO_ROWS),
        ),
        sequence("last", [9, 3, IMAGE], [9, 3, NONE], picture(0.4, 2, TWO_ROWS)),
    ]


def test_a_plan_with_no_one_and_two_images_padded_on_the_right() -> None:
    images, plan = build_plan(four_sequences(), per_token=True, pad="right")
    # T = 5.  one:  1 i i 7 8   text: 1 5 6 . .   two: i i 4 i i   last: 9 3 i i .
    assert plan.lengths == (5, 3, 5, 4)
    # Each image is a class token, which goes nowhere, and two patches.
    assert plan.vis_dst_V.tolist() == [-1, 1, 2, -1, 10, 11, -1, 13, 14, -1, 17, 18]
    text = dict(zip(plan.txt_dst_S.tolist(), plan.txt_id_S.tolist(), strict=True))
    assert text == {0: 1, 3: 7, 4: 8, 5: 1, 6: 5, 7: 6, 8: -1, 9: -1, 12: 4, 15: 9, 16: 3, 19: -1}
    # Label 9 stands at the very start of its sequence: nothing is in front of it to predict it.
    assert plan.label_row_L.tolist() == [2, 3, 6, 11, 15]
    assert plan.label_id_L.tolist() == [7, 8, 6, 4, 3]
    assert plan.label_counts == (2, 1, 1, 1) and plan.label_count == 5
    assert plan.mask_BT.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    (group,) = images
    assert group.pixels_NCHW[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (group.layout, group.text) == (TWO_ROWS, None)
    assert {t.dtype for t in (plan.vis_dst_V, plan.txt_id_S, plan.txt_dst_S, plan.label_row_L)} == {torch.int32}
    assert plan.label_id_L.dtype == torch.int64


def test_a_plan_padded_on_the_left() -> None:
    _, plan = build_plan(four_sequences(), per_token=True, pad="left")
    # T = 5.  one:  1 i i 7 8   text: . . 1 5 6   two: i i 4 i i   last: . 9 3 i i
    assert plan.vis_dst_V.tolist() == [-1, 1, 2, -1, 10, 11, -1, 13, 14, -1, 18, 19]
    text = dict(zip(plan.txt_dst_S.tolist(), plan.txt_id_S.tolist(), strict=True))
    assert text == {0: 1, 3: 7, 4: 8, 5: -1, 6: -1, 7: 1, 8: 5, 9: 6, 12: 4, 15: -1, 16: 9, 17: 3}
    assert plan.label_row_L.tolist() == [2, 3, 8, 11, 16]
    assert plan.mask_BT.int().tolist()[3] == [0, 1, 1, 1, 1]


def test_connectors_that_do_not_work_per_token_give_their_own_rows() -> None:
    images = (picture(0.1, 3, TWO_ROWS, text="what?"),)
    sequence = PlanSequence(id="s", tokens=Tokens(ids=[IMAGE, 7], labels=[NONE, 7]), images=images)
    (group,), plan = build_plan([sequence], per_token=False, pad="right")
    assert (plan.vis_dst_V.tolist(), plan.txt_dst_S.tolist()) == ([0, 1, 2], [3])
    assert plan.label_row_L.tolist() == [2]
    assert group.text == ("what?",)


def test_tiles_have_a_prefix_each() -> None:
    layout = Layout(grid_h=1, grid_w=2, tiles=2, prefix_tokens=1)
    images = (picture(0.1, 4, layout),)
    sequence = PlanSequence(id="s", tokens=Tokens(ids=[1, IMAGE], labels=[NONE, NONE]), images=images)
    (group,), plan = build_plan([sequence], per_token=True, pad="right")
    assert plan.vis_dst_V.tolist() == [-1, 1, 2, -1, 3, 4]
    assert group.pixels_NCHW.shape == (2, 3, 2, 2)


def test_images_of_one_layout_go_together_and_the_plan_follows() -> None:
    tall = Layout(grid_h=3, grid_w=1)
    kinds = [(TWO_ROWS, 2), (tall, 3), (replace(TWO_ROWS, crop=(0, 0, 9, 9)), 2)]
    images = tuple(picture(number, rows, layout) for number, (layout, rows) in enumerate(kinds))
    tokens = Tokens(ids=[IMAGE] * 3, labels=[NONE] * 3)
    groups, plan = build_plan([PlanSequence(id="s", tokens=tokens, images=images)], per_token=True, pad="right")
    assert [group.pixels_NCHW[:, 0, 0, 0].tolist() for group in groups] == [[0, 2], [1]]
    # Rows of the sequence: 0 and 1, then 2 to 4, then 5 and 6; the first group has the first and the last image.
    assert plan.vis_dst_V.tolist() == [-1, 0, 1, -1, 5, 6, 2, 3, 4]


def test_a_batch_of_text_only_has_no_images() -> None:
    images, plan = build_plan(four_sequences()[1:2], per_token=True, pad="right")
    assert images == ()
    assert (plan.vis_dst_V.tolist(), plan.txt_id_S.tolist()) == ([], [1, 5, 6])


def test_wrong_numbers_of_rows_name_the_sample() -> None:
    sequence = four_sequences()[0]
    wrong_rows = replace(sequence, images=(picture(0.1, 5, TWO_ROWS),))
    with pytest.raises(ModelError, match="sample 'one': the connector claims 5 rows for an image of 2 patches"):
        build_plan([wrong_rows], per_token=True, pad="right")
    flat = Views(pixels_NCHW=torch.zeros(3, 2, 2), layout=TWO_ROWS)
    with pytest.raises(
        ModelError, match=r"sample 'one': preprocess gave pixels of shape \(3, 2, 2\) for a layout of 1"
    ):
        build_plan([replace(sequence, images=(PlacedImage(views=flat, rows=2),))], per_token=True, pad="right")


def test_a_plan_that_misses_a_row_or_writes_it_twice_names_the_sample() -> None:
    sequences = four_sequences()
    ids = [sequence.id for sequence in sequences]
    _, plan = build_plan(sequences, per_token=True, pad="right")
    twice = plan.vis_dst_V.clone()
    twice[twice == 11] = 12
    with pytest.raises(ModelError, match="sample 'two': row 1 of its sequence is written 0 times"):
        check_plan(replace(plan, vis_dst_V=twice), ids)
    with pytest.raises(ModelError, match="it writes outside its 20 rows"):
        check_plan(replace(plan, txt_dst_S=plan.txt_dst_S + 7), ids)


# --- collator --------------------------------------------------------------------------------------------------------


class Bare:
    """Question, then the learned answer and its end token."""

    stop = ("</s>",)

    def render(self, turns: Sequence[Turn], reply: bool) -> list[Segment]:
        if len(turns) > 4:
            raise ValueError("five turns are too many")
        segments = []
        for turn in turns:
            trained = turn.role == "assistant"
            for part in turn.parts:
                image = isinstance(part, ImageSlot)
                segments.append(Segment(kind="image" if image else "text", text="" if image else part, trained=trained))
            if trained:
                segments.append(Segment(kind="control", text="</s>", trained=True))
        return segments

    def required_tokens(self) -> tuple[str, ...]:
        return ("</s>",)


def preprocess(image: Image.Image) -> Views:
    """A pixel per image, and as many patches in a row as the image is wide."""
    value = image.getpixel((0, 0))[0] / 255  # type: ignore[index]
    return Views(
        pixels_NCHW=torch.full((1, 3, 1, 1), value), layout=Layout(grid_h=1, grid_w=image.width, prefix_tokens=1)
    )


def num_tokens(layout: Layout) -> int:
    return layout.grid_h * layout.grid_w


def make(max_length: int = 40, **settings: Any) -> Collator:
    parts: dict[str, Any] = {"preprocess": preprocess, "num_tokens": num_tokens, "template": Bare(), "limits": Limits()}
    return Collator(
        **{**parts, "encoder": Encoder(llama_like()), "max_length": max_length, "per_token": True, **settings}
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (2, 1), (255, 0, 0)).save(path)
    return path


def sample(name: str, question: str, answer: str, *images: Path) -> Sample:
    slots = tuple(ImageSlot(index) for index in range(len(images)))
    return Sample(id=name, turns=(Turn("human", (*slots, question)), Turn("assistant", (answer,))), images=images)


def numbered(*samples: Any) -> list[tuple[Position, Any]]:
    return [(Position("a", index), one) for index, one in enumerate(samples)]


def test_samples_become_a_batch(image: Path) -> None:
    micro = make()(numbered(sample("x", "7", "8", image), sample("y", "7", "8")))
    assert micro.batch is not None and not micro.rejected
    batch = micro.batch
    assert batch.ids == ("x", "y")
    assert batch.images[0].pixels_NCHW.flatten().tolist() == [1, 1, 1]
    assert batch.plan.label_counts == (2, 2)
    assert batch.plan.lengths[0] == batch.plan.lengths[1] + 2  # two patches
    eos = 2
    assert batch.plan.label_id_L.tolist().count(eos) == 2


def test_each_sample_has_its_own_images_and_none_is_mixed_up(tmp_path: Path) -> None:
    paths = []
    for value in (10, 20, 30):
        paths.append(tmp_path / f"{value}.png")
        Image.new("RGB", (2, 1), (value, 0, 0)).save(paths[-1])
    micro = make()(numbered(sample("b", "7", "8", paths[2]), sample("t", "7", "8"), sample("a", "7", "8", *paths[:2])))
    assert micro.batch is not None
    (group,) = micro.batch.images
    assert (group.pixels_NCHW[:, 0, 0, 0] * 255).round().tolist() == [30, 10, 20]
    width = micro.batch.plan.mask_BT.shape[1]
    owners = [row // width for row in micro.batch.plan.vis_dst_V.tolist() if row >= 0]
    assert owners == [0, 0, 2, 2, 2, 2]


def test_samples_that_cannot_be_used_are_set_aside_with_their_reason(image: Path) -> None:
    broken = SampleError(Problem("chat.json, sample 's9'", "wrong record: conversations is missing"))
    long = Sample(id="long", turns=sample("", "7", "8").turns * 3)
    lost = sample("lost", "7", "8", image.with_name("gone.png"))
    slots = Sample(id="slots", turns=(Turn("human", (ImageSlot(1),)), Turn("assistant", ("8",))), images=(image,))
    micro = make()(numbered(broken, long, lost, slots, sample("cut", "7" * 60, "8"), sample("good", "7", "8")))
    assert micro.batch is not None and micro.batch.ids == ("good",)
    assert [(one.id, str(one.error), one.reason) for one in micro.rejected] == [
        ("a[0]", "chat.json, sample 's9': wrong record: conversations is missing", "wrong record"),
        (
            "long",
            "sample 'long': the template cannot write it: five turns are too many",
            "the template cannot write it",
        ),
        ("lost", f"{image.with_name('gone.png')}: there is no such image", "there is no such image"),
        (
            "slots",
            "sample 'slots': placeholder mismatch: the turns show images [1], the sample has 1; "
            "each image must have one place, in order",
            "placeholder mismatch",
        ),
        (
            "cut",
            "sample 'cut': nothing to learn: the answer begins behind row 40 of 64; "
            "raise max_length or shorten the sample",
            "nothing to learn",
        ),
    ]
    assert [one.position.index for one in micro.rejected] == [0, 1, 2, 3, 4]


def test_a_batch_of_nothing_usable_is_none() -> None:
    micro = make()(numbered(SampleError(Problem("x", "y"))))
    assert micro.batch is None and len(micro.rejected) == 1
    assert make()([]) == MicroBatch(batch=None)


def test_what_is_cut_off_is_counted(image: Path) -> None:
    collator = make(max_length=8)
    encoded = collator.encode(sample("x", "7", "8" * 30, image))
    assert (encoded.truncated, encoded.sequence.length, encoded.full_length) == (True, 8, 36)
    micro = collator(numbered(sample("x", "7", "8" * 30, image), sample("y", "7", "8")))
    assert (micro.truncated, len(micro.rejected)) == (1, 0)


def test_an_image_behind_the_cut_is_left_out(image: Path) -> None:
    turns = (*sample("", "7", "8").turns, Turn("human", (ImageSlot(0),)), Turn("assistant", ("9",)))
    micro = make(max_length=6)(numbered(Sample(id="x", turns=turns, images=(image,))))
    assert micro.batch is not None
    assert (micro.batch.images, micro.truncated) == ((), 1)


def test_prompts_are_padded_on_the_left_and_have_no_labels(image: Path) -> None:
    asked = [replace(one, turns=one.turns[:1]) for one in (sample("x", "7", "", image), sample("y", "7 7", ""))]
    micro = make().prompts([*asked, replace(asked[0], id="gone", images=(image.with_name("gone.png"),))])
    assert micro.batch is not None
    assert micro.batch.plan.mask_BT[:, -1].all()
    assert micro.batch.plan.label_count == 0
    assert [(one.id, one.reason) for one in micro.rejected] == [("gone", "there is no such image")]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused() -> None:
    micro = make(max_length=8).prompts([Sample(id="x", turns=(Turn("human", ("7" * 9,)),))])
    assert "the conversation is too long: 11 rows, where 8 hold the answer too" in str(micro.rejected[0].error)


def test_connectors_that_read_the_question_get_it_and_nothing_else(image: Path) -> None:
    micro = make(tokenize=str.upper)(numbered(sample("x", "what?", "secret", image)))
    assert micro.batch is not None
    assert micro.batch.images[0].text == ("WHAT?",)


def test_a_batch_moves_to_a_device(image: Path) -> None:
    batch = make(tokenize=lambda text: torch.ones(1))(numbered(sample("x", "7", "8", image))).batch
    assert batch is not None
    moved = batch_to(batch, "meta")
    assert {moved.plan.vis_dst_V.device.type, moved.images[0].pixels_NCHW.device.type} == {"meta"}
    assert moved.images[0].text[0].device.type == "meta"
    assert (moved.ids, moved.plan.lengths, moved.images[0].layout) == (
        ("x",),
        batch.plan.lengths,
        batch.images[0].layout,
    )


def test_a_collator_travels_to_other_processes(image: Path) -> None:
    collator = pickle.loads(pickle.dumps(make()))
    assert collator(numbered(sample("x", "7", "8", image))).batch.ids == ("x",)


# --- loading ---------------------------------------------------------------------------------------------------------


class Numbers(Sequence[Sample]):
    """Twenty samples that say their number; number 3 is broken."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: Any) -> Any:
        if index == 3:
            raise SampleError(Problem("numbers", "three is broken"))
        return sample(f"n{index}", "7", str(index))


class Killed(Numbers):
    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Stuck(Numbers):
    def __getitem__(self, index: Any) -> Any:
        time.sleep(3)


class Changed(Numbers):
    def __getitem__(self, index: Any) -> Any:
        raise DataError(Problem("chat.json", "the file was changed", "start again"))


class Wrong(Numbers):
    def __getitem__(self, index: Any) -> Any:
        raise ZeroDivisionError("a mistake of the program")


def steps(start: int, workers: int = 0, rank: int = 0, world: int = 1) -> list[list[tuple[str, ...]]]:
    """The ids of all micro-batches of two epochs from a step on."""
    made = order({"a": 20})
    loaded = batches(
        made,
        {"a": Numbers()},
        make(),
        batch_size=8,
        micro_batch_size=2,
        start=start,
        total_steps=6,
        workers=workers,
        rank=rank,
        world=world,
    )
    return [[micro.batch.ids if micro.batch else () for micro in step] for step in loaded]


def test_every_sample_of_an_epoch_comes_and_the_broken_one_is_reported() -> None:
    found = steps(0)
    assert [len(step) for step in found] == [4, 4, 2, 4, 4, 2]
    for first in (0, 3):
        ids = [name for step in found[first : first + 3] for micro in step for name in micro]
        assert sorted(ids) == sorted(f"n{index}" for index in range(20) if index != 3)


def test_going_on_from_a_step_gives_what_would_have_come() -> None:
    whole = steps(0)
    for start in (1, 3, 5, 6):
        assert steps(start) == whole[start:]


def test_other_processes_give_the_same_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    assert steps(1, workers=2) == steps(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_together_do_what_one_does() -> None:
    alone = [sorted(name for micro in step for name in micro) for step in steps(0)]
    parts = [steps(0, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(step) for step in part] for part in parts] == [[2, 2, 1, 2, 2, 1]] * 2
    together = [sorted(n for part in parts for micro in part[step] for n in micro) for step in range(6)]
    assert together == alone


def first_batch(source: Numbers, timeout: float = 60.0) -> MicroBatch:
    return next(load([[Position("a", 0)]], {"a": source}, make(), workers=1, timeout=timeout))


def test_a_killed_process_is_named_as_such() -> None:
    with pytest.raises(ResourceError, match=r"data loader: a process died or is stuck: .*; lower 'workers'"):
        first_batch(Killed())


def test_a_stuck_process_does_not_hold_up_the_run_for_ever() -> None:
    with pytest.raises(ResourceError, match="timed out after 1 seconds"):
        first_batch(Stuck(), timeout=1)


def test_errors_cross_the_process_border_whole() -> None:
    with pytest.raises(DataError) as error:
        first_batch(Changed())
    assert error.value.problems == (Problem("chat.json", "the file was changed", "start again"),)
    with pytest.raises(ZeroDivisionError):
        first_batch(Wrong())


# --- quarantine ------------------------------------------------------------------------------------------------------


def set_aside(index: int, what: str = "the image is broken: no end", used: int = 0) -> MicroBatch:
    rejected = Rejected(id=f"s{index}", position=Position("a", index), error=SampleError(Problem(f"{index}.png", what)))
    _, plan = build_plan(four_sequences(), per_token=True, pad="right")
    batch = None
    if used:
        from llava_kit.contracts import Batch

        batch = Batch(images=(), plan=plan, ids=tuple(f"u{number}" for number in range(used)))
    return MicroBatch(batch=batch, rejected=(rejected,), truncated=used)


def test_every_sample_is_accounted_for() -> None:
    account = Quarantine(Limits(), total=1000)
    for micro in (set_aside(1, used=3), set_aside(2, used=4), set_aside(1), set_aside(5, "there is no such image")):
        account.add(micro)
    report = account.to_dict()
    assert (report["seen"], report["used"], report["truncated"]) == (11, 7, 7)
    assert report["seen"] == report["used"] + sum(reason["count"] for reason in report["reasons"].values())
    broken = report["reasons"]["the image is broken"]
    assert (broken["count"], broken["ids"], broken["first_path"]) == (3, ["s1", "s2"], "1.png")
    assert broken["samples"][1] == {
        "id": "s2",
        "position": ["a", 2],
        "where": "2.png",
        "what": "the image is broken: no end",
        "hint": "",
    }


def test_an_account_can_be_saved_and_gone_on_with() -> None:
    account = Quarantine(Limits(), total=1000)
    account.add(set_aside(1, used=3))
    saved = json.loads(json.dumps(account.to_dict()))
    account.add(set_aside(2))  # changes nothing that was saved
    other = Quarantine(Limits(), total=1000)
    other.load_dict(saved)
    assert other.to_dict() == saved
    other.add(set_aside(1))
    assert other.to_dict()["reasons"]["the image is broken"]["ids"] == ["s1"]


@pytest.mark.parametrize(
    ("limits", "total", "tolerated"),
    [
        (Limits(), 500_000, 100),
        (Limits(), 700, 7),
        (Limits(), 50, 1),  # a single broken image does not stop a small run
        (Limits(max_bad_samples=0), 50, 0),
        (Limits(max_bad_fraction=0.0), 50, 0),
        (Limits(max_bad_fraction=1.0), 50, 49),
    ],
)
def test_how_much_is_tolerated(limits: Limits, total: int, tolerated: int) -> None:
    assert Quarantine(limits, total).tolerated == tolerated  # type: ignore[arg-type]


def test_more_than_tolerated_stops_the_run_and_lists_samples() -> None:
    account = Quarantine(Limits(max_bad_samples=2), total=1000)
    for _ in range(5):
        account.add(set_aside(1))  # the same sample in every epoch
    account.add(set_aside(2))
    with pytest.raises(DataError) as error:
        account.add(set_aside(3))
    assert str(error.value).split("\n") == [
        "data: 3 of 1,000 samples cannot be used, more than the 2 tolerated; "
        "mend the data, or raise limits.max_bad_samples and limits.max_bad_fraction",
        "s1: 1.png: the image is broken: no end",
        "s2: 2.png: the image is broken: no end",
        "s3: 3.png: the image is broken: no end",
    ]
    assert error.value.code == 3


def test_the_data_report_has_all_stages(tmp_path: Path) -> None:
    account = Quarantine(Limits(), total=10)
    for stage in ("align", "tune"):
        write_data_report(tmp_path / "data_report.json", stage, account)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report == {"align": account.to_dict(), "tune": account.to_dict()}
    assert list(tmp_path.iterdir()) == [tmp_path / "data_report.json"]
