"""Learning rates: a factor of the peak for every step, and the optimizer's parameter groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from llava_kit.recipe import Optimizer


def learning_rate_factor(name: str, step: int, warmup: int, total: int) -> float:
    """The share of the peak learning rate for the optimizer step that follows ``step`` completed ones.

    Linear warm-up from 0, then ``cosine`` or ``linear`` to 0, or ``constant``; as in transformers'
    ``get_*_schedule_with_warmup``.
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress) if name == "linear" else 1.0


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over what trains, each component at its own rate; no weight decay on vectors (biases, norms).

    Every group keeps its peak in ``peak_lr``.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = config.component_lr.get(name.split(".")[0], config.lr)
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
        betas=config.betas,
        eps=config.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group from its own peak; the highest rate of all."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
