"""Counts per cell: the maps of all genes, summed over masks or outlines of cells or nuclei.

    python analysis/cells.py --directory data/section --masks cells.tif
    python analysis/cells.py --directory data/section --masks cells.geojson --nuclei
    python analysis/cells.py --directory data/section            # nuclei that it finds in the H&E

Without --masks, nuclei are found in he.jpg by a simple method: the haematoxylin of every pixel by
colour deconvolution, a threshold (Otsu's, and the surroundings), and a watershed that divides
nuclei that touch (analysis/nuclei.py). Their class is "nucleus found in the H&E". Look at them in
QuPath before you use them: masks by a trained network (StarDist, Cellpose) are better.

--masks is one of two, in pixels of he-raw (the full-resolution image) or, with --frame he, of
he.jpg; pixel sizes and the padding of he.jpg are taken into account:

* a label image, .tif, .png or .npy, as Cellpose, StarDist or QuPath write it: one whole number a
  pixel, 0 for no cell. It is as large as he-raw or as he.jpg, which also tells its frame. A TIFF in
  tiles or strips, or an .npy, is read in bands: its size does not matter. A PNG, or a TIFF that is
  compressed in one piece, is decoded whole.
* outlines, .geojson: Polygons and MultiPolygons, holes and all, of QuPath, of Space Ranger 4
  (cell_segmentations.geojson, or its folder segmented_outputs; its cell 7 is cellid_000000007-1 of
  the matrix) and of Baysor. If the file of QuPath holds cells or detections, annotations and tiles
  are left out. --nuclei takes the nucleus of every cell (nucleusGeometry) in place of its border.
  Of samples by prepare/xenium.py, cell_boundaries and nucleus_boundaries (.parquet, .csv.gz) of the
  run are read, too. What an outline encloses counts, once, also where it crosses itself; an outline
  without an area is left out.

A cell gets, of every superpixel, the share of the counts that is its share of the area; areas are
exact, those of pixels cut by the border of a superpixel too. **A superpixel of 64 um2 is about as
large as a cell, and the maps know nothing finer**: cells in the same superpixel get the same
expression, in proportion to their area, and what lies around a cell in its superpixels is in its
counts. So look at groups of cells, such as a class or a neighbourhood, and not at single ones.

* --share area, the default: what lies between cells belongs to none. Overlapping cells each get
  what they share.
* --share cells: all counts of a superpixel go to the cells in it, in proportion to their areas, so
  that no molecule is lost where there are cells; good for nuclei, which fill part of their cells.

Maps lie where the spots do. If HISTEX.py found the image beside them, cells that were seen in the
image are moved as far back before the counts are summed; x and y stay those of the image. Cells of
a Xenium run lie where its molecules do, and stay; so do all with --by-molecules.

A row of cells.csv.gz is a cell: cell (its label; of outlines, what the file calls it, by cell_id or
the like, else by id, else by its number), x and y (centroid in pixels of he-raw), area_um2,
share_on_tissue, class (of outlines, classification), then the counts of every gene, with four
digits. Outside the tissue no gene is known: a cell gets what its part on the tissue tells, and
nothing is added for the rest; a cell without such a part has empty counts. If the maps have a
standard deviation (HISTEX.py --uncertainty), cells-sd.csv.gz has that of every count, in the same
rows and columns: errors of superpixels that lie together go together (method/errors.py).

cells-counts.geojson has the outlines of the cells, in pixels of he-raw, with the counts of
--geojson-genes genes as measurements: those with the highest held-out r. QuPath opens it: drag it
onto he-raw.

Reads   cnts-super/, image_calibration.json, and mask.png, held-out-r.csv and cnts-super-sd/ if they
        are there; --masks, or without it he.jpg.
Writes  cells.csv.gz, cells-sd.csv.gz, cells-counts.geojson and their record, cells.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "analysis/cells.py"
RAW, CALIBRATED = "he-raw", "he"  # frames
GEOJSON_GENES = 50


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    option = parser.add_argument
    masks_help = "Label image or GeoJSON of the cells (default: nuclei are found in the H&E)."
    option("--masks", type=Path, help=masks_help)
    option(
        "--frame",
        choices=[RAW, CALIBRATED],
        help="The image in whose pixels --masks is given (default: he-raw for outlines; for a "
        "label image, the image that is as large).",
    )
    nuclei_help = "Sum over the nucleus of each cell, not the whole cell, where GeoJSON has both."
    option("--nuclei", action="store_true", help=nuclei_help)
    option(
        "--by-molecules",
        action="store_true",
        help="The cells come from the molecules (Baysor), not from the image: they are not moved "
        "with it, should HISTEX.py have found it beside the spots.",
    )
    option(
        "--share",
        choices=["area", "cells"],
        default="area",
        help="How to share out the counts of a superpixel. area: a cell that covers 30 %% of the "
        "superpixel gets 30 %% of its counts. cells: the cells in it get all of its counts, in "
        "proportion to their areas.",
    )
    option(
        "--geojson-genes",
        type=cli.not_negative,
        metavar="N",
        default=GEOJSON_GENES,
        help="Number of genes in cells-counts.geojson; 0 writes no such file.",
    )
    files.add_output(parser, pictures=False)
    option("--no-plot", action="store_true", help=argparse.SUPPRESS)  # taken before, drew nothing
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import gzip
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from analysis import nuclei, tracing
from analysis import outlines as outline_files
from analysis.inputs import (
    anew,
    choose_genes,
    map_files,
    note_inputs,
    read_first_map,
    read_held_out,
    read_map,
    read_move,
    read_sizes,
)
from analysis.labels import BAND_ROWS, LARGEST_LABEL, open_labels, wrong  # noqa: F401
from analysis.mending import Ring
from analysis.outlines import Outline
from analysis.regions import tissue_of
from analysis.scores import rounded
from analysis.sheets import warn_of_formulas
from method import errors, grid
from reading import images

TINY = 1e-9  # of a superpixel's area: what rounding leaves
MOST_FAR = 0.01  # of the cells, which may lie far off the image and are left out
GZIP_LEVEL = 1  # higher levels save a tenth of the space and take several times longer
ROWS_AT_ONCE = 1024  # of cells.csv.gz


class CellAreas(NamedTuple):
    """Cells and their area in each superpixel; places and areas in pixels of he.jpg."""

    ids: list[Any]  # labels, or the ids of outlines
    centroids: np.ndarray  # (cells, 2), x and y
    area: np.ndarray  # (cells,)
    inside: csr_array  # (cells, superpixels): area in each, as a share of the superpixel's area
    classes: list[str]
    rings: list[list[Ring]]  # in pixels of their frame; empty if nobody asked for them


class PixelFrame(NamedTuple):
    """An image of (rows, columns), whose pixels times ``scale`` are those of he.jpg."""

    name: str
    shape: tuple[int, int]
    scale: tuple[float, float]  # of rows and of columns


def read_frames(stage: utils.Stage) -> dict[str, PixelFrame]:
    """he-raw and he.jpg, by the record of image_calibration.py."""
    raw, scaled, size = read_sizes(stage, "raw_size", "scaled_size", "size")
    scale = scaled[0] / raw[0], scaled[1] / raw[1]
    return {RAW: PixelFrame(RAW, raw, scale), CALIBRATED: PixelFrame(CALIBRATED, size, (1.0, 1.0))}


# --------------------------------------------------------------------------------------------------
# areas of labels
# --------------------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """A side of the image, cut at the borders of pixels and of superpixels."""

    edge: np.ndarray  # (n + 1,) px of he.jpg
    pixel: np.ndarray  # (n,) in which each piece lies
    superpixel: np.ndarray


def cut_side(pixels: int, scale: float) -> Steps:
    borders = np.arange(pixels + 1) * scale
    lines = np.arange(utils.TOKEN_PX, borders[-1], utils.TOKEN_PX)
    edge = np.union1d(borders, lines)
    edge = edge[np.diff(edge, prepend=-1) > TINY]  # borders that coincide but for rounding
    middle = (edge[1:] + edge[:-1]) / 2
    pixel = np.minimum((middle / scale).astype(np.int64), pixels - 1)
    return Steps(edge, pixel, (middle // utils.TOKEN_PX).astype(np.int64))


def runs_of_labels(
    labels: np.ndarray, top: int, rows: Steps, columns: Steps, width: int
) -> tuple[np.ndarray, ...]:
    """Label, superpixel, area, and area times x and y, of a band (n, columns) that starts at top.

    ``width`` is the number of superpixels in a row of the map. Each superpixel of a label occurs
    once. Sums are over runs of equal labels in a row, which are far fewer than pixels.
    """
    first, last = np.searchsorted(rows.pixel, [top, top + len(labels)])
    down = np.arange(first, last)
    cut = labels[:, columns.pixel]
    starts = np.ones(cut.shape, bool)
    starts[:, 1:] = cut[:, 1:] != cut[:, :-1]
    starts[:, 1:] |= columns.superpixel[1:] != columns.superpixel[:-1]
    start = np.flatnonzero(starts)
    end = np.append(start[1:], starts.size)
    label = cut.ravel()[start].astype(np.int64)
    start, end, label = (a[label > 0] for a in (start, end, label))
    row, column = np.divmod(start, cut.shape[1])
    left, right = columns.edge[column], columns.edge[column + end - start]
    of_row = np.searchsorted(row, np.arange(len(labels) + 1))
    at = rows.pixel[down] - top  # the row of pixels of each piece of a row
    n = of_row[at + 1] - of_row[at]
    run = np.repeat(of_row[at] - np.cumsum(n) + n, n) + np.arange(n.sum())
    down = np.repeat(down, n)
    height, y = np.diff(rows.edge)[down], (rows.edge[down] + rows.edge[down + 1]) / 2
    area = height * (right - left)[run]
    superpixel = rows.superpixel[down] * width + columns.superpixel[column[run]]
    return unite(label[run], superpixel, area, area * (left + right)[run] / 2, area * y)


def unite(label: np.ndarray, superpixel: np.ndarray, *sums: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same with every pair of label and superpixel once, in order."""
    wide = int(superpixel.max(initial=0)) + 1
    pair, where = np.unique(label * wide + superpixel, return_inverse=True)
    return (*np.divmod(pair, wide), *(np.bincount(where, a, len(pair)) for a in sums))


def cells_of_labels(
    bands: Iterator[np.ndarray], frame: PixelFrame, shape: tuple[int, int], path: Path
) -> CellAreas:
    """Cells of a label image of that frame, on a map of ``shape`` (rows, columns)."""
    rows, columns = map(cut_side, frame.shape, frame.scale)
    parts, top = [], 0
    for band in bands:
        low, high = int(band.min()), int(band.max())
        if low < 0 or high > LARGEST_LABEL:
            raise wrong(
                path,
                f"holds the label {low if low < 0 else high}; expected 0 for no cell, else "
                f"1 to {LARGEST_LABEL}.",
                "Number the cells anew.",
            )
        parts.append(runs_of_labels(band, top, rows, columns, shape[1]))
        top += len(band)
    if top != frame.shape[0]:
        raise wrong(path, f"ends after {top} of {frame.shape[0]} rows.", "Make it anew.")
    label, superpixel, area, x, y = unite(*map(np.concatenate, zip(*parts, strict=True)))
    ids, cell = np.unique(label, return_inverse=True)
    total, x, y = (np.bincount(cell, a, len(ids)) for a in (area, x, y))
    size = (len(ids), shape[0] * shape[1])
    inside = csr_array((area / utils.TOKEN_PX**2, (cell, superpixel)), size)
    centroids = np.column_stack([x, y]) / np.maximum(total, TINY)[:, None]
    none: list[list[Ring]] = [[] for _ in ids]
    return CellAreas(ids.tolist(), centroids, total, inside, [""] * len(ids), none)


# --------------------------------------------------------------------------------------------------
# areas of outlines
# --------------------------------------------------------------------------------------------------
def rings_to_measure(outlines: list[Outline], scale: np.ndarray) -> grid.Rings:
    """The rings of all outlines, their points times ``scale``: in superpixels."""
    rings = [(i, *ring) for i, outline in enumerate(outlines) for ring in outline.rings]
    number, points, hole = zip(*rings, strict=True)
    size = np.array([len(part) for part in points])
    return grid.Rings(np.array(number), size, np.array(hole), np.concatenate(points) * scale)


def without_far(
    stage: utils.Stage, path: Path, outlines: list[Outline], frame: PixelFrame
) -> list[Outline]:
    """The outlines but those that lie further off the image than it is long; these are few."""
    side = np.array(frame.shape[::-1])
    near = [
        all(((xy >= -side) & (xy <= 2 * side)).all() for xy, _ in outline.rings)
        for outline in outlines
    ]
    far = [outline for outline, is_near in zip(outlines, near, strict=True) if not is_near]
    if len(far) > MOST_FAR * len(outlines):
        raise wrong(
            path,
            f"has {len(far)} of {len(outlines)} cells far outside of the image of {side[0]} x "
            f"{side[1]} px, such as {far[0].id} at {far[0].rings[0][0][0].tolist()}.",
            "Coordinates must be pixels of he-raw, or of he.jpg with --frame he.",
        )
    if far:
        stage.warn(f"{path.name}: {len(far)} cells lie far outside of the image: left out")
    return [outline for outline, is_near in zip(outlines, near, strict=True) if is_near]


def cells_of_outlines(
    outlines: list[Outline], frame: PixelFrame, shape: tuple[int, int], path: Path
) -> CellAreas:
    """Cells of outlines in that frame, on a map of ``shape`` (rows, columns)."""
    scale = np.array(frame.scale[::-1]) / utils.TOKEN_PX
    rings = rings_to_measure(outlines, scale)
    cell, row, column, covered = grid.polygon_areas(rings)
    on_map = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
    where = (cell[on_map], (row * shape[1] + column)[on_map])
    area, centroids = grid.polygon_moments(rings, len(outlines))
    return CellAreas(
        [outline.id for outline in outlines],
        centroids * utils.TOKEN_PX,
        area * utils.TOKEN_PX**2,
        csr_array((covered[on_map], where), (len(outlines), shape[0] * shape[1])),
        [outline.of_class for outline in outlines],
        [outline.rings for outline in outlines],
    )


def moved_back(inside: csr_array, shape: tuple[int, int], place: np.ndarray) -> csr_array:
    """The areas (cells, superpixels) at p - ``place`` (2,), which divides them among four."""
    old, parts = inside.tocoo(), []
    places = np.stack(np.divmod(old.col, shape[1]), axis=1)
    for step, share in grid.four_moves(-place):
        there = places + step
        on = ((there >= 0) & (there < shape)).all(axis=1)
        parts.append((share * old.data[on], old.row[on], there[on] @ (shape[1], 1)))
    area, cell, superpixel = map(np.concatenate, zip(*parts, strict=True))
    moved = csr_array((area, (cell, superpixel)), inside.shape)
    moved.eliminate_zeros()
    return moved


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def traced_labels(
    stage: utils.Stage,
    bands: Iterator[np.ndarray],
    frame: PixelFrame,
    shape: tuple[int, int],
    path: Path,
) -> CellAreas:
    """Cells of a label image, with their outlines if cells-counts.geojson is written."""
    tracer = tracing.Tracer()
    if stage.args.geojson_genes:
        bands = tracer.watch(bands)
    cells = cells_of_labels(bands, frame, shape, path)
    return cells._replace(rings=[tracer.rings.get(label, []) for label in cells.ids])


def find_nuclei(
    stage: utils.Stage, tissue: np.ndarray, facts: dict[str, Any]
) -> tuple[CellAreas, PixelFrame]:
    """Nuclei of he.jpg on the ``tissue``; ``facts`` are told how they were found."""
    path, frame = stage.path(utils.HE), read_frames(stage)[CALIBRATED]
    size = tuple(side * utils.TOKEN_PX for side in tissue.shape)
    with images.ImageRows(stage, path) as image:
        if image.shape[:2] != size:
            found = f"is {image.shape[1]} x {image.shape[0]} px; the maps have {tissue.shape}"
            raise stage.error(path, f"{found} superpixels.", anew(stage, utils.HISTEX))
        threshold = nuclei.choose_threshold(image, tissue)
        bands = nuclei.find(image, tissue, threshold)
        cells = traced_labels(stage, bands, frame, tissue.shape, path)
    if not cells.ids:
        raise wrong(path, "shows no nucleus.", "Give the cells by --masks.")
    facts["cells are"] = "nuclei found in the H&E by haematoxylin and watershed"
    facts["threshold of haematoxylin"] = rounded(threshold)
    stage.warn(
        "the cells are nuclei found in the H&E by a simple method: see that they fit, or give "
        "better ones by --masks"
    )
    return cells._replace(classes=[nuclei.FOUND] * len(cells.ids)), frame


def read_cells(stage: utils.Stage, shape: tuple[int, int]) -> tuple[CellAreas, PixelFrame]:
    path, args, frames = stage.args.masks, stage.args, read_frames(stage)
    again = f"Run: {stage.command()}"
    if outline_files.ending(path) in (*outline_files.GEOJSON, *outline_files.TABLES):
        if args.frame == CALIBRATED and outline_files.ending(path) in outline_files.TABLES:
            raise wrong(path, "is in um of a Xenium run.", "Leave out --frame.")
        outlines = outline_files.read_outlines(stage, path, args.nuclei)
        frame = frames[args.frame or RAW]
        outlines = without_far(stage, path, outlines, frame)
        return cells_of_outlines(outlines, frame, shape, path), frame
    if args.nuclei:
        raise wrong(path, "holds no outlines; --nuclei is for GeoJSON.", "Leave out --nuclei.")
    found, dtype, bands = open_labels(path)
    if dtype.kind not in "ui" or len(found) != 2:
        raise wrong(
            path,
            f"is {dtype} {found}; expected one whole number a pixel (rows, columns).",
            "Save the labels of the cells, not a picture of them.",
        )
    wanted = [frames[args.frame]] if args.frame else list(frames.values())
    fitting = [f for f in wanted if f.shape == tuple(found)]
    if not fitting:
        sizes = " or ".join(f"{f.shape[1]} x {f.shape[0]} px ({f.name})" for f in wanted)
        raise wrong(
            path,
            f"is {found[1]} x {found[0]} px; expected {sizes}.",
            "Segment one of these images, without cropping or scaling it.",
        )
    frame = fitting[0]
    cells = traced_labels(stage, bands, frame, shape, path)
    if not cells.ids:
        raise wrong(path, "holds no cell: all labels are 0.", again)
    return cells, frame


def share_out(inside: csr_array) -> csr_array:
    """Every superpixel's counts to the cells in it, in proportion to their areas in it."""
    taken = inside.sum(axis=0)
    return csr_array(inside.multiply(1 / np.where(taken > 0, taken, 1)))


def each_map(
    stage: utils.Stage, files: dict[str, Path], tissue: np.ndarray
) -> Iterator[np.ndarray]:
    """The superpixels of the tissue (P,) in the map of each gene, one in memory at a time."""
    for path in files.values():
        image = read_map(path)
        if image.shape != tissue.shape or not np.isfinite(image[tissue]).all():
            raise stage.error(
                path,
                f"is {image.shape}; expected {tissue.shape}, with a count for every superpixel of "
                f"the tissue.",
                f"Run: {stage.command(utils.HISTEX)}",
            )
        yield image[tissue].astype(np.float64)


def sum_genes(maps: Iterable[np.ndarray], n: int, weights: csr_array) -> tuple[np.ndarray, float]:
    """Counts float32 (genes, cells) of n maps (P,); the share of all counts that is in cells.

    A column of ``weights`` (cells, superpixels of the tissue) is the cells' shares of it.
    """
    counts, total = np.empty((n, weights.shape[0]), np.float32), 0.0
    for row, inside in zip(counts, maps, strict=True):
        row[:] = weights @ inside
        total += inside.sum()
    return counts, float(counts.sum(dtype=np.float64) / total) if total else np.nan


def sd_of_genes(
    maps: Iterable[np.ndarray], n: int, weights: csr_array, tissue: np.ndarray
) -> np.ndarray:
    """Standard deviation float32 (genes, cells) of the counts, by that of n maps (P,)."""
    sums = errors.Sums(weights, np.argwhere(tissue))
    found = np.empty((n, weights.shape[0]), np.float32)
    for row, inside in zip(found, maps, strict=True):
        row[:] = sums.sd(inside)
    return found


def read_spreads(stage: utils.Stage, genes: list[str]) -> dict[str, Path]:
    """The files of cnts-super-sd/, in the order of the genes."""
    found = map_files(stage.directory, utils.SPREAD)
    if missing := [gene for gene in genes if gene not in found]:
        raise stage.error(
            stage.path(utils.SPREAD),
            f"lacks {len(missing)} of {len(genes)} genes, such as {missing[0]}.",
            f"Run: {stage.command(utils.HISTEX)} --uncertainty --force",
        )
    return {gene: found[gene] for gene in genes}


def write_cells(
    path: Path,
    cells: CellAreas,
    xy: np.ndarray,
    share: np.ndarray,
    genes: list[str],
    counts: np.ndarray,
) -> None:
    """A table of cells; the same always give the same bytes. ``counts`` are (genes, cells)."""
    area_um2 = cells.area * utils.PIXEL_SIZE_UM**2
    facts = {"cell": np.array(cells.ids, object)}
    for name, values, form in (
        ("x", xy[:, 0], "%.2f"), ("y", xy[:, 1], "%.2f"), ("area_um2", area_um2, "%.2f"),
        ("share_on_tissue", share, "%.3f"),
    ):  # fmt: skip
        facts[name] = np.char.mod(form, values)
    table = pd.DataFrame({**facts, "class": cells.classes})
    counts[:, share == 0] = np.nan
    with path.open("wb") as file, gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
        for top in range(0, len(table), ROWS_AT_ONCE):
            rows = slice(top, top + ROWS_AT_ONCE)
            block = pd.DataFrame(counts[:, rows].T, table.index[rows], genes)
            pd.concat([table[rows], block], axis=1).to_csv(
                packed, index=False, header=top == 0, float_format="%.4g", lineterminator="\n"
            )


def write_geojson(
    stage: utils.Stage,
    cells: CellAreas,
    frame: PixelFrame,
    share: np.ndarray,
    genes: list[str],
    counts: np.ndarray,
) -> None:
    """cells-counts.geojson, with the counts (genes, cells) of the best explained genes."""
    chosen = choose_genes(genes, read_held_out(stage), None, stage.args.geojson_genes)
    rows = [genes.index(gene) for gene in chosen]
    scale = np.array(frame.scale[::-1]) / read_frames(stage)[RAW].scale[::-1]
    area = cells.area * utils.PIXEL_SIZE_UM**2

    def features() -> Iterator[str]:
        for i, name in enumerate(cells.ids):
            told = {"area_um2": round(float(area[i]), 1), "share_on_tissue": round(share[i], 3)}
            if share[i] > 0:
                values = counts[rows, i].tolist()
                told |= {g: float(f"{v:.4g}") for g, v in zip(chosen, values, strict=True)}
            yield tracing.feature(name, cells.classes[i], cells.rings[i], scale, told)

    with stage.writing(files.CELLS_GEOJSON) as partial:
        tracing.write_features(partial, features())


def check_inputs(stage: utils.Stage) -> None:
    """Before any work: what is needed is there, what is written is not the user's."""
    args = stage.args
    if args.masks is None:
        stage.require(utils.HE)
        if args.nuclei or args.frame:
            raise utils.StageError(
                "--nuclei and --frame are about --masks, which is not given.", "Leave them out."
            )
    else:
        args.masks = outline_files.in_folder(args.masks, args.nuclei)
        if not args.masks.is_file():
            raise wrong(args.masks, "is missing.", "Give the file of cells by --masks.")
    stage.require(utils.MAPS)
    stage.guard(files.CELLS, files.CELLS_SD)
    if args.geojson_genes:
        stage.guard(files.CELLS_GEOJSON)
    else:
        stage.retire(files.CELLS_GEOJSON)


def main(stage: utils.Stage) -> None:
    args = stage.args
    facts: dict[str, Any] = {}
    check_inputs(stage)
    note_inputs(stage, utils.SPREAD)
    with_sd = stage.find(utils.SPREAD) is not None
    maps = map_files(stage.directory)
    first, shape = read_first_map(stage, maps)
    tissue = tissue_of(stage, np.isfinite(first))
    if args.masks is None:
        cells, frame = find_nuclei(stage, tissue, facts)
    else:
        stage.use(args.masks)
        cells, frame = read_cells(stage, shape)
    cells = follow_image(stage, cells, shape, facts)
    on_tissue = cells.inside[:, np.flatnonzero(tissue)]
    share = on_tissue.sum(axis=1) * utils.TOKEN_PX**2 / np.maximum(cells.area, TINY)
    share = share.clip(0, 1)  # but for rounding, it is no larger
    off = int((share == 0).sum())
    if off == len(share):
        raise wrong(
            args.masks,
            f"has {off} cells, none of them on the tissue (frame {frame.name}).",
            "Coordinates must be pixels of he-raw, or of he.jpg with --frame he.",
        )
    if off:
        stage.warn(f"{off} of {len(share)} cells are not on the tissue: their counts are empty")
    weights = on_tissue if args.share == "area" else share_out(on_tissue)
    print(f"{len(share):,} cells, {len(maps)} genes, pixels of {frame.name}")
    counts, caught = sum_genes(each_map(stage, maps, tissue), len(maps), weights)
    facts |= {
        "cells": len(share),
        "cells on tissue": len(share) - off,
        "genes": len(maps),
        "frame": frame.name,
        "share": args.share,
        "median area um2": rounded(np.median(cells.area) * utils.PIXEL_SIZE_UM**2),
        "superpixels per cell": rounded(weights.nnz / max(len(share) - off, 1)),
        "tissue within cells": rounded(on_tissue.sum() / tissue.sum()),
        "counts within cells": rounded(caught),
    }
    print(
        f"median area {facts['median area um2']} um2; the cells hold "
        f"{facts['tissue within cells']:.1%} of the tissue and {caught:.1%} of the counts"
    )
    write_outputs(stage, cells, frame, share, list(maps), counts)
    if with_sd:
        spreads = read_spreads(stage, list(maps))
        sd = sd_of_genes(each_map(stage, spreads, tissue), len(maps), weights, tissue)
        with stage.writing(files.CELLS_SD) as partial:
            write_cells(partial, cells, centres_of(stage, cells), share, list(maps), sd)
    else:
        stage.retire(files.CELLS_SD)
    stage.finish(**facts)


def follow_image(
    stage: utils.Stage, cells: CellAreas, shape: tuple[int, int], facts: dict[str, Any]
) -> CellAreas:
    """The cells where the maps have them, should HISTEX.py have moved the image."""
    if lie_as_molecules(stage.args) or not (place := read_move(stage)).any():
        return cells
    down, right = place * utils.SUPERPIXEL_UM
    print(
        f"HISTEX.py found the image {down:+.1f} um down and {right:+.1f} um right of the spots: "
        f"the cells are moved back, to where the maps have them"
    )
    facts["moved back by um"] = [rounded(down), rounded(right)]
    return cells._replace(inside=moved_back(cells.inside, shape, place))


def lie_as_molecules(args: argparse.Namespace) -> bool:
    """Whether the cells do, and not as the image; boundaries of Xenium are tables."""
    of_xenium = args.masks and outline_files.ending(args.masks) in outline_files.TABLES
    return args.by_molecules or bool(of_xenium)


def centres_of(stage: utils.Stage, cells: CellAreas) -> np.ndarray:
    """Centres (cells, 2), x and y, in pixels of he-raw."""
    return cells.centroids / read_frames(stage)[RAW].scale[::-1]


def write_outputs(
    stage: utils.Stage,
    cells: CellAreas,
    frame: PixelFrame,
    share: np.ndarray,
    genes: list[str],
    counts: np.ndarray,
) -> None:
    """The table and, if it is asked for, the GeoJSON of counts (genes, cells)."""
    for names in (cells.ids, cells.classes, genes):
        warn_of_formulas(stage, names)
    if stage.args.geojson_genes:
        write_geojson(stage, cells, frame, share, genes, counts)
    with stage.writing(files.CELLS) as partial:
        write_cells(partial, cells, centres_of(stage, cells), share, genes, counts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
