"""The loop that both base models are trained with: AdamW, one warm-up, one long way down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def teach(
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    after: Callable[[int, float], None],
    *,
    steps: int,
    peak_lr: float,
    weight_decay: float,
    warm_up: float,
) -> None:
    """Minimise `loss_at(step)`, each call a fresh batch, and call `after(step, loss)` behind every step."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps + 1, pct_start=warm_up)
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after(step, loss.item())
