"""What a network must be: the base class that training and prediction rely on.

Letters in shapes: B spots or patches, T superpixels of a patch, K HR points of its context,
G genes, F token features, L latent values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from method import devices
from method.devices import to_device
from method.section import Section, Split

ALL = slice(None)  # genes
MADE_AT_ONCE = 16  # spots


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
    counts_alike: ClassVar[bool] = False  # whether ``to_counts`` grows with the output and is the
    # same in all states: then the median of the outputs is that of the counts
    repeats: ClassVar[bool] = True  # each step of training takes the same operators: a card may
    # record them, if none of them asks for a value and the optimizer is capturable

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__()

    def views(self, tokens: Tensor) -> Tensor:
        """Tokens (B, rows, columns, F) to what is embedded (B, rows - 2 halo, columns - 2 halo, .).

        All states share the views of a map, and training keeps those of the spots: they must not
        depend on trained weights, nor on chance.
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
        """Loss (B, G) of outputs (B, T, G), for areas (B, T) of the discs and counts (B, G).

        A loss of counts takes ``to_counts`` of the output.
        """
        raise NotImplementedError

    def to_counts(self, output: Tensor, genes: slice = ALL) -> Tensor:
        """Outputs (..., G) to counts per superpixel (..., G)."""
        return output

    def forward(
        self, tokens: Tensor, expression: Tensor, offsets: Tensor, chosen: Tensor | None = None
    ) -> Tensor:
        """Output (B, T, G) of patches or, of the superpixels ``chosen`` (B, C) in them, (B, C, G).

        From tokens (B, rows, columns, F) with the halo, counts of HR points (B, K, G), and offsets
        (B, T, K, 2) from HR points to superpixels. Attention has those that are chosen only.
        """
        views, to_middle, distance2 = self.prepared(tokens, offsets, chosen)
        return self.see(views, expression, to_middle, distance2)

    def prepared(
        self, tokens: Tensor, offsets: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``see`` takes beside the expression, from what ``forward`` does. Nothing learns."""
        views, to_middle = self.views(tokens).flatten(1, 2), offsets.mean(dim=1)
        if chosen is not None:
            patch = torch.arange(len(chosen), device=chosen.device)[:, None]
            views, offsets = views[patch, chosen], offsets[patch, chosen]
        return views, to_middle, offsets.square().sum(dim=-1)

    def see(
        self, views: Tensor, expression: Tensor, to_middle: Tensor, distance2: Tensor
    ) -> Tensor:
        """Output (B, C, G) of some superpixels of patches, from their views (B, C, .).

        Further from counts of HR points (B, K, G), the offsets (B, K, 2) from these to the middle
        of the patch, and the squared distances (B, C, K) from them to the superpixels.
        """
        histology = self.embed_histology(views)
        latent = self.fuse(histology, self.embed_expression(expression), to_middle)
        interpolated = torch.empty(0)
        if self.interpolates:
            interpolated = self.interpolation(distance2) @ expression
        return self.decode(latent, interpolated)


def disc_sums(maps: Tensor, areas: Tensor) -> Tensor:
    """Sums (B, G) of patches (B, T, G) over discs, by their areas (B, T)."""
    return torch.einsum("btg,bt->bg", maps, areas)


class Inputs(NamedTuple):
    """What ``see`` takes for spots, of the C superpixels that the section has chosen; the truth."""

    views: Tensor  # (B, C, .)
    expression: Tensor  # (B, K, G)
    to_middle: Tensor  # (B, K, 2)
    distance2: Tensor  # (B, C, K)
    areas: Tensor  # (B, C)
    counts: Tensor  # (B, G)


class Spots:
    """The inputs of a state's spots, which are given by index; kept on the device where they fit.

    Then steps of training neither read the token map nor wait for a transfer.
    """

    def __init__(
        self,
        network: Network,
        section: Section,
        split: Split,
        device: torch.device,
        keep: bool = True,
    ) -> None:
        self.network, self.section, self.split, self.device = network, section, split, device
        self.kept: Inputs | None = None  # HR points by index, in place of their expression
        if not keep:
            return
        n, one = len(section.spots), self.make(np.arange(1), by_index=True)
        n_bytes = n * sum(part.nbytes for part in one) + section.expression.nbytes
        if n_bytes > devices.spare_bytes(device):
            return
        kept = Inputs(*(part.new_empty(n, *part.shape[1:]) for part in one))
        for batch in np.array_split(np.arange(n), math.ceil(n / MADE_AT_ONCE)):
            for whole, part in zip(kept, self.make(batch, by_index=True), strict=True):
                whole[batch[0] : batch[-1] + 1] = part
        self.kept, self.expression = kept, to_device(section.expression, device)

    @torch.no_grad()
    def make(self, batch: np.ndarray, by_index: bool = False) -> Inputs:
        """The inputs of a batch of spots, from the section."""
        section, near = self.section, self.split.near[batch]
        centres = np.floor(section.spots[batch]).astype(int)
        tokens, expression, offsets = section.inputs(centres, near, self.network.halo, self.device)
        chosen = to_device(section.chosen[batch], self.device)
        views, to_middle, distance2 = self.network.prepared(tokens, offsets, chosen)
        return Inputs(
            views=views,
            expression=to_device(near, self.device) if by_index else expression,
            to_middle=to_middle,
            distance2=distance2,
            areas=to_device(section.areas[batch], self.device).gather(1, chosen),
            counts=to_device(section.counts[batch], self.device),
        )

    def batches(self, spots: np.ndarray, n: int) -> Iterator[Inputs]:
        """The inputs of n batches of spots, in this order and about equal in size."""
        if self.kept is None:
            yield from map(self.make, np.array_split(spots, n))
            return
        for batch in to_device(spots, self.device).tensor_split(n):
            taken = Inputs(*(part[batch] for part in self.kept))
            yield taken._replace(expression=self.expression[taken.expression])


def run_batch(
    network: Network, section: Section, split: Split, batch: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, C, G), areas (B, C) and counts (B, G) of a batch of spots, given by index.

    Of the C superpixels of a patch that the section has chosen, those of the disc.
    """
    inputs = Spots(network, section, split, device, keep=False).make(batch)
    return network.see(*inputs[:4]), inputs.areas, inputs.counts


def seed_torch(*numbers: int) -> None:
    torch.manual_seed(int(np.random.default_rng(numbers).integers(2**63)))
