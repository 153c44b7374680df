"""Next-token loss over the labelled positions only.

Shapes: L labelled rows, D language model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 2048
"""Rows whose logits exist at the same time: at 32,000 tokens of vocabulary 262 MB in fp32, and as much in backward."""


def next_token_loss(hidden_LD: Tensor, label_L: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of cross-entropies of the labelled rows, in fp32.

    A sum and no mean: the caller divides by the labels of the whole global batch, so that the way a batch is cut into
    micro-batches changes nothing.
    """
    if hidden_LD.shape[0] <= ROWS_AT_ONCE:
        return _cross_entropy_sum(hidden_LD, label_L, logits)
    chunks = zip(hidden_LD.split(ROWS_AT_ONCE), label_L.split(ROWS_AT_ONCE), strict=True)
    parts = [checkpoint(_cross_entropy_sum, rows, labels, logits, use_reentrant=False) for rows, labels in chunks]
    return torch.stack(parts).sum()


def _cross_entropy_sum(hidden_LD: Tensor, label_L: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(logits(hidden_LD).float(), label_L.long(), reduction="sum")
