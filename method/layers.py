"""Layers and means of our own that networks are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureDropout(nn.Module):
    """Hides a share of the features of a patch (B, ..., F), the same in all superpixels of it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        kept = torch.rand(shape, device=x.device) >= self.share
        return x * (kept / (1 - self.share))


def sliding_mean(x: Tensor, size: int, dim: int) -> Tensor:
    """Means of every ``size`` neighbours along an axis. Twice as fast as torch's pooling here."""
    n = x.shape[dim] - size + 1
    total = x.narrow(dim, 0, n)
    for start in range(1, size):
        following = x.narrow(dim, start, n)
        total = total + following if start == 1 else total.add_(following)
    return total if size == 1 else total.div_(size)


def neighbourhoods(x: Tensor, scales: tuple[int, ...], halo: int) -> Tensor:
    """Tokens and their means over squares of these sides: (B, rows, columns, F (1 + scales)).

    Of x (B, rows + 2 halo, columns + 2 halo, F); the halo is half of the largest scale.
    """
    views = []
    for size in (1, *scales):
        cut = halo - size // 2  # so that all scales end up on the same superpixels
        part = x[:, cut : x.shape[1] - cut, cut : x.shape[2] - cut]
        views.append(sliding_mean(sliding_mean(part, size, 1), size, 2))
    return torch.cat(views, dim=-1)
