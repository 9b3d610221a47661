"""What a network must be: the base class that training and prediction rely on.

Letters in shapes: B spots or patches, T superpixels of a patch, K HR points of its context,
G genes, F token features, L latent values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from method.section import Section, Split, to_device

ALL = slice(None)  # genes


class Network(nn.Module):
    """From the histology and the expression around a patch to the expression of its superpixels.

    A network is made once per state, from the section and the spots (indices) that train the state.
    It works in steps, because a map is predicted step by step: histology and expression are
    embedded once for the whole section, patches are fused one batch at a time, and genes are
    decoded in blocks. In training, ``forward`` takes all steps for a batch of spots.

    A subclass must have ``latent_size``, ``fuse``, ``decode`` and ``loss``. The other steps do
    nothing unless it replaces them.
    """

    halo: ClassVar[int] = 0  # superpixels around a patch that ``views`` looks at and cuts off
    embedding_size: ClassVar[int] = 128  # of the first latent values, written as embedding maps
    latent_size: ClassVar[int]  # L, of a superpixel
    quick: ClassVar[tuple[str, ...]] = ()  # parameters that learn faster, and do not decay
    interpolates: ClassVar[bool] = False  # whether ``decode`` takes interpolated expression

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__()

    def views(self, tokens: Tensor) -> Tensor:
        """Tokens (B, rows, columns, F) to what is embedded (B, rows - 2 halo, columns - 2 halo, .).

        All states share the views of a map, so that these must not depend on trained weights.
        """
        return tokens

    def embed_histology(self, views: Tensor) -> Tensor:
        """Views (..., features) to embedded superpixels (..., features), each by itself."""
        return views

    def embed_expression(self, expression: Tensor) -> Tensor:
        """Counts of HR points (..., G), of a full disc, to (..., features), each by itself."""
        return expression

    def fuse(self, histology: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        """Latent values (B, T, L) of patches.

        From the embedded histology (B, T, .), the embedded expression of the context (B, K, .), and
        the offsets (B, K, 2), in superpixels, from its HR points to the middle of the patch.
        """
        raise NotImplementedError

    def interpolation(self, distance2: Tensor) -> Tensor:
        """Shares (..., K) of a superpixel in the counts of HR points at these squared distances."""
        raise NotImplementedError

    def decode(self, latent: Tensor, interpolated: Tensor, genes: slice = ALL) -> Tensor:
        """Latent values (..., L) to the output (..., G) for some genes.

        ``interpolated`` (..., G) is the expression weighted by ``interpolation``; it is empty if
        the network does not interpolate.
        """
        raise NotImplementedError

    def loss(self, output: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        """Loss (B, G) of outputs (B, T, G), for areas (B, T) of the discs and counts (B, G)."""
        raise NotImplementedError

    def to_counts(self, output: Tensor, genes: slice = ALL) -> Tensor:
        """Outputs (..., G) to counts per superpixel (..., G)."""
        return output

    def forward(self, tokens: Tensor, expression: Tensor, offsets: Tensor) -> Tensor:
        """Output (B, T, G) of patches.

        From tokens (B, rows, columns, F) with the halo, counts of HR points (B, K, G), and offsets
        (B, T, K, 2) from HR points to superpixels.
        """
        histology = self.embed_histology(self.views(tokens)).flatten(1, 2)
        latent = self.fuse(histology, self.embed_expression(expression), offsets.mean(dim=1))
        interpolated = torch.empty(0)
        if self.interpolates:
            interpolated = self.interpolation(offsets.square().sum(dim=-1)) @ expression
        return self.decode(latent, interpolated)


def disc_sums(maps: Tensor, areas: Tensor) -> Tensor:
    """Sums (B, G) of patches (B, T, G) over discs, by their areas (B, T)."""
    return torch.einsum("btg,bt->bg", maps, areas)


def run_batch(
    network: Network, section: Section, split: Split, batch: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, T, G), areas (B, T) and counts (B, G) of a batch of spots, given by index."""
    centres = np.floor(section.spots[batch]).astype(int)
    output = network(*section.inputs(centres, split.near[batch], network.halo, device))
    areas = to_device(section.areas[batch], device)
    counts = to_device(section.counts[batch], device)
    return output, areas, counts


def seed_torch(*numbers: int) -> None:
    torch.manual_seed(int(np.random.default_rng(numbers).integers(2**63)))


@dataclass(frozen=True)
class Pass:
    """One pass of a network over the section: as it is or, from 1 on, with random dropout."""

    network: Network
    dropout: int = 0

    def start(self, *seed: int) -> Network:
        """The network in the mode of this pass; numbers decide which features are hidden."""
        self.network.train(self.dropout > 0)
        if self.dropout:
            seed_torch(self.dropout, *seed)
        return self.network
