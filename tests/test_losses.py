from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llava_kit import losses
from llava_kit.losses import next_token_loss


def test_sum_of_cross_entropies_by_hand() -> None:
    # logits (0, 0, 0) and (ln 2, 0, 0): -log p = ln 3 for any class, and ln(4/2) = ln 2 for class 0.
    hidden = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0]])
    loss = next_token_loss(hidden, torch.tensor([2, 0], dtype=torch.int32), nn.Identity())
    assert loss.item() == pytest.approx(math.log(3.0) + math.log(2.0), abs=1e-6)


def test_no_labels_give_zero_and_a_graph() -> None:
    head = nn.Linear(3, 5)
    loss = next_token_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int32), head)
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad is not None and head.weight.grad.abs().sum() == 0


def test_chunks_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 7).double()
    hidden = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (10,))
    results = []
    for rows in (100, 3):
        monkeypatch.setattr(losses, "ROWS_AT_ONCE", rows)
        loss = next_token_loss(hidden, labels, head)
        results.append((loss, *torch.autograd.grad(loss, [hidden, head.weight])))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-6, atol=1e-6)  # the sum is taken in fp32
