from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava_kit.schedule import learning_rate_factor, make_optimizer, set_learning_rate


def test_warm_up_of_llava_1_5_to_the_digit() -> None:
    # A user's log of the original shows 2.8205e-6 at step 22 of 5,198 with 156 of warm-up and a peak of 2e-5.
    assert f"{2e-5 * learning_rate_factor('cosine', 22, 156, 5198):.4e}" == "2.8205e-06"


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("cosine", 0, 0.0), ("cosine", 5, 0.5), ("cosine", 10, 1.0),
        ("cosine", 60, 0.5), ("cosine", 110, 0.0), ("cosine", 35, 0.5 * (1 + math.cos(math.pi / 4))),
        ("linear", 60, 0.5), ("linear", 110, 0.0), ("constant", 5, 0.5), ("constant", 109, 1.0),
    ],
)  # fmt: skip
def test_factors_by_hand(name: str, step: int, expected: float) -> None:
    assert learning_rate_factor(name, step, 10, 110) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("cosine", "cosine"), ("linear", "linear")])
def test_factors_equal_those_of_transformers(name: str, kind: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=50)
    for step in range(50):
        assert learning_rate_factor(name, step, 7, 50) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def config(**changes: object) -> SimpleNamespace:
    values = {"lr": 1e-3, "component_lr": {}, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    return SimpleNamespace(**(values | changes))


def model() -> nn.ModuleDict:
    parts = {"connector": nn.Linear(2, 3), "language_model": nn.Linear(3, 3), "vision_encoder": nn.Linear(1, 2)}
    return nn.ModuleDict(parts)


def test_groups_separate_rates_and_decay() -> None:
    parts = model()
    parts["vision_encoder"].requires_grad_(False)
    optimizer = make_optimizer(parts, config(component_lr={"connector": 2e-5}, weight_decay=0.1))  # type: ignore[arg-type]
    found = {(g["peak_lr"], g["weight_decay"]): sorted(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert found == {(2e-5, 0.1): [6], (2e-5, 0.0): [3], (1e-3, 0.1): [9], (1e-3, 0.0): [3]}


def test_rates_follow_their_own_peak() -> None:
    optimizer = make_optimizer(model(), config(component_lr={"connector": 2e-5}))  # type: ignore[arg-type]
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(5e-4)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([1e-5, 5e-4])
