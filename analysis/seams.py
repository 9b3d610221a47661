"""Find seams in maps: steps along the lines of a grid that are larger than along other lines.

Each grid is compared with itself moved by 1, 2, ... superpixels, for which the tissue is the same.
"""

from __future__ import annotations

import math

import numpy as np

from method.tiling import Tiling

# Of rows, then columns: summed differences (lines, genes) across each line, pairs (lines,)
Gradients = list[tuple[np.ndarray, np.ndarray]]

# Tiles as Histology_Extractor.py lays them out: side and least overlap, in tokens, and whether the
# side is as short as the number of tiles allows.
TILINGS = {"ViT tiles of 14": (14, 1, False), "CNN tiles": (128, 10, True)}
TILE_PERIOD = 14  # tokens of 224 px
CONTROL_PERIODS = (9, 15)  # of which nothing is known that could leave a seam
PATCHES_SHARE = 1  # superpixels, of the default preset (method/prediction.py)
MOST_OFFSETS = 32  # beyond that far from a line, the tissue is another


def known_periods(radius: float) -> dict[int, str]:
    """Grids of whole superpixels from the map's corner, whose lines are looked at."""
    half = math.ceil(radius)
    grids = [
        (2 * half + 1 - min(PATCHES_SHARE, half), "patches of the default preset"),
        (2 * math.floor(radius) + 1, "published blocks"),
        (TILE_PERIOD, "tiles of 224 px"),
    ]
    periods: dict[int, str] = {}
    for period, name in grids:
        periods[period] = f"{periods[period]}, {name}" if period in periods else name
    return dict(sorted((dict.fromkeys(CONTROL_PERIODS, "control") | periods).items()))


def line_gradients(maps: np.ndarray) -> Gradients:
    """Differences of neighbours in maps (rows, columns, genes).

    Line i lies between superpixels i and i + 1. Pairs with a NaN do not count.
    """
    result = []
    for axis in (0, 1):
        step = np.abs(np.diff(np.moveaxis(maps, axis, 0).astype(np.float64), axis=0))
        inside = np.asarray(np.isfinite(step).all(2))
        result.append((np.where(inside[..., None], step, 0).sum(1), inside.sum(1)))
    return result


def grid_lines(extent: int, period: int) -> np.ndarray:
    """Lines (as in ``line_gradients``) between blocks of ``period`` superpixels from the corner."""
    return np.arange(period, extent, period) - 1


def tile_lines(extent: int, tile: int, overlap: int, shorten: bool) -> np.ndarray:
    """Lines in the middle of the overlaps of tiles that are spread evenly over the extent."""
    tiling = Tiling(tile, overlap, blend=not shorten)
    starts = np.array(tiling.starts(extent))
    return (starts[1:] + starts[:-1] + tiling.side(extent)) // 2 - 1


def offset_gradients(gradients: Gradients, lines: list[np.ndarray], offsets: int) -> np.ndarray:
    """Mean difference (offsets, genes) across a grid's lines, moved by 0, 1, ... superpixels.

    NaN where no line is left on the map.
    """
    profile = []
    for offset in range(offsets):
        total, pairs = 0.0, 0
        for (sums, counts), own in zip(gradients, lines, strict=True):
            moved = own[own + offset < len(counts)] + offset
            total, pairs = total + sums[moved].sum(0), pairs + counts[moved].sum()
        profile.append(total / pairs if pairs else np.full(gradients[0][0].shape[1], np.nan))
    return np.array(profile)


def describe_seam(profile: np.ndarray) -> dict[str, float | int | None]:
    """Excess, rank and z of the first of the offsets (offsets,) against the others."""
    own, others = profile[0], profile[1:]
    if not np.isfinite(profile).all() or others.mean() == 0:
        return {"excess": None, "rank": None, "offsets": len(profile), "z": None}
    spread = others.std(ddof=1)
    return {
        "excess": round(float(own / others.mean() - 1), 5),
        "rank": int((others >= own).sum()) + 1,
        "offsets": len(profile),
        "z": round(float((own - others.mean()) / spread), 2) if spread > 0 else None,
    }


def score_seams(
    gradients: Gradients, radius: float
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Seams of all genes together, by grid; and the excess of each gene (genes,) by column name."""
    shape = [len(pairs) + 1 for _, pairs in gradients]
    mean = sum(sums.sum(0) for sums, _ in gradients)
    varies = mean > 0
    grids = {
        f"every {period}, {what}": ([grid_lines(n, period) for n in shape], period)
        for period, what in known_periods(radius).items()
    }
    for what, (tile, overlap, shorten) in TILINGS.items():
        lines = [tile_lines(n, tile, overlap, shorten) for n in shape]
        grids[what] = (lines, min(tile - overlap, MOST_OFFSETS))
    together, by_gene = {}, {}
    for name, (lines, offsets) in grids.items():
        profile = offset_gradients(gradients, lines, offsets)
        relative = profile[:, varies] / mean[varies]
        together[name] = describe_seam(relative.mean(1) if varies.any() else profile[:, 0])
        with np.errstate(invalid="ignore", divide="ignore"):
            by_gene[name] = profile[0] / profile[1:].mean(0) - 1
    columns = {
        f"seam_{offsets}": by_gene[name]
        for name, (_, offsets) in grids.items()
        if name.endswith(("tiles of 224 px", "blocks", "preset"))
    }
    return together, columns
