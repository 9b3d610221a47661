"""How the token grid of an image is cut into the tiles that a network sees, and joined again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from reading import images
from utils import TILE_PX, TOKEN_PX, TOKENS_PER_TILE

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tiling:
    """How the token grid is cut into square tiles; lengths in tokens, the same along both axes."""

    tile: int  # side of a tile, at most
    overlap: int  # tokens that neighbours share, at least
    blend: bool  # a ViT's tiles fade over the overlap; a CNN's are cut in the middle of it

    def side(self, extent: int) -> int:
        """Side of the tiles of an image: a ViT's has to be ``tile``, a CNN's is as short as can be.

        The fewest tiles of at most ``tile`` tokens, and none of them larger than their number asks
        for: so the share of tokens that are computed twice has a limit for images of any size.
        """
        if self.blend or extent <= self.tile:
            return min(self.tile, extent)
        n = -(-(extent - self.overlap) // (self.tile - self.overlap))
        return -(-(extent + (n - 1) * self.overlap) // n)

    def starts(self, extent: int) -> list[int]:
        """First tokens of the fewest tiles that cover the image, spread evenly from edge to edge.

        No tile reaches outside the image, so that nothing has to be invented there: neither white,
        which would be a false edge of the tissue, nor mirrored tissue.
        """
        side = self.side(extent)
        reach = extent - side
        steps = -(-reach // (side - self.overlap)) if reach else 0
        return [round(i * reach / max(steps, 1)) for i in range(steps + 1)]

    def shares(self, extent: int) -> list[np.ndarray]:
        """Share of each tile in its tokens, float32 (t,); the shares of a token add up to 1."""
        starts, place = self.starts(extent), np.arange(self.side(extent))
        dropped = 0 if self.blend else self.overlap // 2
        shares, total = [], np.zeros(extent)
        for start in starts:
            depth = np.full(len(place), np.inf)  # tokens to the next edge that has a neighbour
            if start > 0:
                depth = np.minimum(depth, place + 1)
            if start + len(place) < extent:
                depth = np.minimum(depth, len(place) - place)
            shares.append(np.clip(depth - dropped, 0, self.overlap + 1 if self.blend else 1))
            total[start : start + len(place)] += shares[-1]
        return [
            (share / total[start : start + len(share)]).astype(np.float32)
            for start, share in zip(starts, shares, strict=True)
        ]


# On 11 mm, 1 token costs 17 % more tiles and leaves gradients 4 % too high at the borders; 2 cost
# 36 % and leave none. With 1, half and half is the only share that treats both neighbours alike.
VIT_TILING = Tiling(TOKENS_PER_TILE, overlap=1, blend=True)
# A cell of EfficientNet-lite0 sees 170 px around it, so that --overlap 22 gives the tokens of one
# pass over the whole image. With 5 tokens dropped at inner edges they differ from those by 0.5 to
# 0.7 % of a standard deviation (rms, on two sections), for less than 20 % more tokens on any image.
# Larger tiles would differ less, but take more time per pixel, and more memory: 128 take 1.2 GB.
CNN_TILING = Tiling(128, overlap=10, blend=False)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items; each is made, in a thread, while the one before it is used."""
    with ThreadPoolExecutor(1) as maker:
        upcoming = maker.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = maker.submit(next, items, None)
            yield item


def bands(image: images.ImageRows, starts: Sequence[int], height: int) -> Iterator[np.ndarray]:
    """The pixels of rows of tiles, uint8 (16 t, W, 3).

    Rows that it shares with the band above are taken from there: the image is decoded once.
    """
    band, above_start = np.empty((0, *image.shape[1:]), np.uint8), 0
    for start in starts:
        first, last = TOKEN_PX * start, TOKEN_PX * (start + height)
        shared = band[first - TOKEN_PX * above_start :]
        band = np.empty((last - first, *image.shape[1:]), np.uint8)
        band[: len(shared)] = shared
        for top in range(first + len(shared), last, TILE_PX):  # a copy of all would take memory
            bottom = min(top + TILE_PX, last)
            band[top - first : bottom - first] = image[top:bottom]
        above_start = start
        yield band
