"""What segment.py, annotate.py and patterns.py share: maps, spots, labels on the grid, pictures.

Labels (rows, columns) are whole numbers: 0 outside the tissue, else 1, 2, ... Places and lengths
are in superpixels of 8 um, (row, column), unless they say um.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.special import comb
from scipy.stats.contingency import crosstab

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import sheets
from analysis.inputs import TRUTH, read_map, read_radius
from analysis.page import region_colours
from analysis.spots import (
    disc_weights,
    interpolation_weights,
    on_tissue,
    superpixel_centres,
    triangulate,
)
from reading import arrays, images, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUPERPIXEL_MM2 = (utils.SUPERPIXEL_UM / 1000) ** 2
SCALE_BARS_UM = (50, 100, 200, 500, 1000, 2000, 5000)
MORE_SPOTS = (  # to run another script would give no more of them
    f"Take a section with more spots on the tissue, or see that {utils.MASK.name} covers them, and "
    f"run the same command."
)
LEGEND_ROWS = 24  # names in one column beside the picture
LETTER_INCHES = 0.085  # width of a letter in them


# --------------------------------------------------------------------------------------------------
# maps and tissue
# --------------------------------------------------------------------------------------------------
def tissue_of(stage: utils.Stage, known: np.ndarray) -> np.ndarray:
    """Where a map is ``known`` (rows, columns) and mask.png, if there is one, says tissue."""
    tissue = known
    if stage.optional(utils.MASK) is not None:
        tissue = known & images.read_mask(stage, known.shape)
    if not tissue.any():
        raise stage.error(
            stage.directory / utils.MASK.name, "and the maps have no superpixel in common."
        )
    return tissue


def read_checked(stage: utils.Stage, path: Path, tissue: np.ndarray) -> np.ndarray:
    """A map (rows, columns) that has counts all over the tissue."""
    image = read_map(path)
    known = image[tissue] if image.shape == tissue.shape else np.array([np.nan])
    if not (np.isfinite(known).all() and known.min() >= 0):
        raise stage.error(
            path,
            f"is {image.shape}; expected {tissue.shape}, with a count of 0 or more for every "
            f"superpixel of the tissue.",
            f"Run: {stage.command(utils.HISTEX)}",
        )
    return image


class MeasuredSpots(NamedTuple):
    """The spots of locs.csv with their counts."""

    ids: pd.Index
    centres: np.ndarray  # (spots, 2)
    counts: csr_array  # (spots, genes) float32
    genes: pd.Index


def read_measured_spots(stage: utils.Stage) -> MeasuredSpots:
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, genes = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    return MeasuredSpots(locs.index, centres_of(locs), counts, pd.Index(genes))


def centres_of(locs: pd.DataFrame) -> np.ndarray:
    """Centres (spots, 2) of a table with x and y in pixels of he.jpg."""
    return locs[["y", "x"]].to_numpy() / utils.TOKEN_PX


def discs_of(
    stage: utils.Stage, centres: np.ndarray, tissue: np.ndarray
) -> tuple[csr_array, np.ndarray]:
    """Area (spots, rows * columns) of the discs; which discs (spots,) lie on the tissue."""
    radius = read_radius(stage.directory)
    discs = disc_weights(centres, radius, tissue.shape)
    return discs, on_tissue(discs, np.where(tissue, 1.0, np.nan), radius)


def columns_of(stage: utils.Stage, measured: pd.Index, genes: list[str]) -> np.ndarray:
    """Column (genes,) of each gene that has a map in the counts, whose genes are ``measured``."""
    column = measured.get_indexer(pd.Index(genes))
    if (column < 0).any():
        absent = utils.some(np.array(genes)[column < 0])
        raise stage.error(stage.path(utils.CNTS), f"lacks genes of maps: {absent}")
    return column


def interpolation_of(stage: utils.Stage, centres: np.ndarray, tissue: np.ndarray) -> csr_array:
    """Weights (rows * columns, spots) of linear interpolation between the spots."""
    if triangulate(centres) is None:
        raise stage.error(
            stage.path(utils.LOCS),
            "has spots that lie on a line: there is no interpolation between them.",
            "Leave out --truth." if getattr(stage.args, "truth", False) else MORE_SPOTS,
        )
    return interpolation_weights(centres, superpixel_centres(tissue.shape))[1]


def smooth(image: np.ndarray, tissue: np.ndarray, sigma_um: float) -> np.ndarray:
    """Gaussian mean (rows, columns) over the tissue alone; 0 outside of it."""
    inside = np.where(tissue, image, 0).astype(np.float32)
    if sigma_um == 0:
        return inside
    sigma, border = sigma_um / utils.SUPERPIXEL_UM, cv2.BORDER_CONSTANT
    share = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), sigma, borderType=border)
    blurred = cv2.GaussianBlur(inside, (0, 0), sigma, borderType=border)
    return np.where(tissue, blurred / np.maximum(share, 1e-9), 0)


# --------------------------------------------------------------------------------------------------
# labels
# --------------------------------------------------------------------------------------------------
def neighbour_pairs(tissue: np.ndarray) -> np.ndarray:
    """Flat indices (pairs, 2) of superpixels of the tissue that share a side."""
    index = np.arange(tissue.size).reshape(tissue.shape)
    down, right = tissue[1:] & tissue[:-1], tissue[:, 1:] & tissue[:, :-1]
    first = np.concatenate([index[:-1][down], index[:, :-1][right]])
    second = np.concatenate([index[1:][down], index[:, 1:][right]])
    return np.column_stack([first, second])


def label_pieces(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected pieces (rows, columns), 0 outside the tissue; the label of each piece."""
    pieces, of_piece = np.zeros(labels.shape, np.int64), [0]
    for label in range(1, labels.max() + 1):
        found, n = ndimage.label(labels == label)
        pieces += np.where(found, found + len(of_piece) - 1, 0)
        of_piece += [label] * n
    return pieces, np.array(of_piece)


def merge_small(labels: np.ndarray, min_superpixels: int) -> np.ndarray:
    """Labels in which no piece is smaller, except where it has no neighbour on the tissue.

    A small piece takes the label with which it shares the longest border, the smallest piece first.
    """
    pairs = neighbour_pairs(labels > 0)
    while True:
        pieces, of_piece = label_pieces(labels)
        size = np.bincount(pieces.ravel())
        a, b = pieces.ravel()[pairs[pieces.ravel()[pairs[:, 0]] != pieces.ravel()[pairs[:, 1]]]].T
        a, b = np.concatenate([a, b]), np.concatenate([b, a])
        border = np.zeros((len(size), labels.max() + 1), np.int64)
        np.add.at(border, (a, of_piece[b]), 1)
        movable = (size < min_superpixels) & border.any(1)
        movable[0] = False
        rank = np.empty(len(size), np.int64)
        rank[np.argsort(size, kind="stable")] = np.arange(len(size))
        moves = movable.copy()
        moves[a[movable[a] & movable[b] & (rank[b] < rank[a])]] = False  # wait for the neighbour
        if not moves.any():
            return labels
        of_piece[moves] = border[moves].argmax(1)
        labels = of_piece[pieces]


def by_size(labels: np.ndarray) -> np.ndarray:
    """The labels anew, uint8 or uint16: 1 is the largest, and no number is left out."""
    size = np.bincount(labels.ravel())
    size[0] = 0
    order = np.argsort(-size, kind="stable")[: np.count_nonzero(size)]
    new = np.zeros(len(size), np.uint8 if len(order) < 256 else np.uint16)
    new[order] = np.arange(1, len(order) + 1)
    return new[labels]


def spot_labels(labels: np.ndarray, discs: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """The label under most of each disc (spots,), 0 for none; the share of the disc it covers.

    ``discs`` (spots, rows * columns) is the area of each spot's disc in each superpixel.
    """
    every = np.column_stack(
        [discs @ (labels == i).ravel().astype(float) for i in range(1, labels.max() + 1)]
    )
    most, whole = every.argmax(1), np.maximum(discs.sum(axis=1), 1e-9)
    area = every[np.arange(len(every)), most]
    return np.where(area > 0, most + 1, 0), area / whole


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two partitions (n,): 1 if they are the same, 0 as by chance.

    NaN of one thing alone, of which there are no pairs.
    """
    if len(a) < 2:
        return np.nan
    both = crosstab(a, b).count
    pairs, first, second = (comb(n, 2).sum() for n in (both, both.sum(1), both.sum(0)))
    expected, most = first * second / comb(len(a), 2), (first + second) / 2
    return 1.0 if most == expected else float((pairs - expected) / (most - expected))


def areas(labels: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Columns of a table: the area of each of the labels 1..n."""
    size = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    return {"superpixels": size, "mm2": size * SUPERPIXEL_MM2, "share_of_tissue": size / size.sum()}


def read_true_regions(stage: utils.Stage, shape: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """``regions`` (rows, columns) of truth.npz, 0 for none, cut or padded; ``region_names``."""
    path = stage.directory / TRUTH
    stage.use(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            found, names = np.asarray(saved["regions"]), [*map(str, saved["region_names"].tolist())]
    except Exception as error:  # damaged bytes can raise nearly anything
        raise utils.StageError(
            f"{path} does not tell the true regions ({error!r:.200}).",
            "--truth is for sections that hold regions (rows, columns), 0 for none, and "
            "region_names, the name of every number.",
        ) from error
    whole = found.dtype.kind in "ui" and found.min(initial=0) >= 0
    if found.ndim != 2 or not whole or found.max(initial=0) >= len(names):
        raise utils.StageError(
            f"{path}: regions are {found.dtype} {found.shape} for {len(names)} names.",
            "Expected whole numbers (rows, columns), each with a name.",
        )
    regions = np.zeros(shape, np.int64)
    rows, columns = (min(n) for n in zip(shape, found.shape, strict=True))
    regions[:rows, :columns] = found[:rows, :columns]
    return regions, names


# --------------------------------------------------------------------------------------------------
# pictures and files
# --------------------------------------------------------------------------------------------------
def add_scale_bar(ax: Axes, shape: tuple[int, int]) -> None:
    """A bar of about a fifth of the width, below the lower left corner of the map."""
    wanted = shape[1] * utils.SUPERPIXEL_UM / 5
    um = min(SCALE_BARS_UM, key=lambda length: abs(length - wanted))
    y, width = shape[0] * 1.02, um / utils.SUPERPIXEL_UM
    ax.plot([0, width], [y, y], color="black", lw=3, solid_capstyle="butt", clip_on=False)
    text = f"{um} µm" if um < 1000 else f"{um // 1000} mm"
    ax.text(width / 2, shape[0] * 1.035, text, ha="center", va="top", fontsize=9)


def plain(text: str) -> str:
    """A text as matplotlib shows it letter by letter: between two $ it would look for formulas."""
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return shown.replace("$", r"\$")


def bare(ax: Axes, title: str = "") -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(plain(title), fontsize=10)


def innermost(region: np.ndarray) -> tuple[int, int]:
    """Row and column of the place in a region (rows, columns) that is furthest from its border."""
    depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 3)
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(row) - 1, int(column) - 1


def draw_labels(
    labels: np.ndarray,
    names: list[str],
    title: str,
    rgb: np.ndarray | None,
    extra: tuple[np.ndarray, str] | None = None,
    grey: int | None = None,
    middle: float = 0.0,
) -> Figure:
    """The H&E if there is one, the labels with their numbers and legend, and an ``extra`` map.

    ``names`` are those of 1, 2, ...; the label ``grey`` has no colour: it stands for none. The map
    is of shares; its colours part at ``middle``, if that lies between 0 and 1.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    colours = ["#ffffff", *label_colours(len(names), grey)]
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], np.uint8)
    panels = (rgb is not None) + 1 + (extra is not None)
    height = 6.0 * labels.shape[0] / labels.shape[1] + 1.0  # inches
    columns = -(-len(names) // LEGEND_ROWS)
    beside = columns * (1.6 + LETTER_INCHES * max(map(len, names)))
    size = (6.2 * panels + beside, max(height, 3.5))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = list(figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0])
    if rgb is not None:
        ax = axes.pop(0)
        ax.imshow(rgb, interpolation="nearest")
        bare(ax, "H&E, mean colour of every superpixel")
    ax = axes.pop(0)
    ax.imshow(palette[labels], interpolation="nearest")
    bare(ax, title)
    add_scale_bar(ax, labels.shape)
    handles, area = [], np.bincount(labels.ravel(), minlength=len(names) + 1)
    for i, name in enumerate(names, start=1):
        text = plain(f"{i}  {name}: {area[i] * SUPERPIXEL_MM2:.3g} mm²")
        handles.append(Patch(facecolor=colours[i], edgecolor="0.3", label=text))
        if area[i]:
            row, column = innermost(labels == i)
            halo = [withStroke(linewidth=2.5, foreground="white")]
            ax.text(column, row, str(i), ha="center", va="center", path_effects=halo)
    figure.legend(handles=handles, loc="outside right center", ncols=columns, frameon=False)
    if extra is not None:
        parted = 0 < middle < 1
        scale: dict[str, Any] = {"cmap": "cividis", "vmin": 0}
        if parted:
            scale = {"cmap": "PuOr", "norm": TwoSlopeNorm(middle, 0, 1)}
        image = axes[0].imshow(extra[0], interpolation="nearest", **scale)
        bare(axes[0], extra[1])
        bar = figure.colorbar(image, ax=axes[0], shrink=0.6)
        if parted:
            bar.set_ticks([0, middle / 2, middle, (1 + middle) / 2, 1])
    return figure


def label_colours(n: int, grey: int | None = None) -> list[str]:
    """A colour for each of 1..n that the colour-blind tell apart; ``grey`` is the label of none."""
    if grey is None:
        return region_colours(n)
    colours = region_colours(n - 1)
    return [*colours[: grey - 1], "#dddddd", *colours[grey - 1 :]]


def read_colours(stage: utils.Stage, shape: tuple[int, int]) -> np.ndarray | None:
    """Mean colours uint8 (rows, columns, 3) of the H&E, if Histology_rgb.npy is there."""
    if stage.optional(utils.RGB) is None:
        return None
    return np.asarray(arrays.read_array(stage, utils.RGB, np.uint8, (*shape, 3)))


def save(stage: utils.Stage, contents: Mapping[utils.Artifact, Any]) -> None:
    """Write arrays, tables and pictures; ``stage.finish`` gives all of them their names."""
    for artifact, content in contents.items():
        with stage.writing(artifact) as partial:
            if isinstance(content, np.ndarray):
                np.save(partial, content, allow_pickle=False)
            elif isinstance(content, pd.DataFrame):
                for column in content.select_dtypes(exclude="number"):
                    sheets.warn_of_formulas(stage, content[column])
                content.to_csv(partial, index=False, lineterminator="\n", float_format="%.5g")
            else:
                content.savefig(partial)


def print_table(table: pd.DataFrame, if_empty: str = "") -> None:
    shown = table.drop(columns="colour", errors="ignore")
    text = shown.to_string(index=False, float_format="%.3g", na_rep="")
    print(if_empty if table.empty else text)


def print_facts(facts: dict[str, Any], margin: str = "") -> None:
    """What the record says, on the terminal: a line per fact, or per group of facts."""
    for name, value in facts.items():
        inner = value if isinstance(value, dict) else {}
        if any(isinstance(fact, dict) for fact in inner.values()):
            print(f"{margin}{name}:")
            print_facts(inner, margin + "  ")
            continue
        parts = [f"{key} {'unknown' if fact is None else fact}" for key, fact in inner.items()]
        print(f"{margin}{name}: {', '.join(parts) or ('unknown' if value is None else value)}")
