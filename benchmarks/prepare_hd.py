"""Make a synthetic Visium HD section of 2 um bins and measure prepare/visium_hd.py on it.

    python benchmarks/prepare_hd.py --size-mm 2 4 6.5

Reads   nothing
Writes  wall time and peak memory per size, in Markdown, on the screen.

A 6.5 mm section has 10.6 million bins. The molecules are drawn without structure, 12 a bin of
18,085 genes by default, about as many as in a good section; the image is a plain one at 0.5 um per
pixel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import run_benchmark
from benchmarks.preparing import add_prepare_options, measure_prepare
from reading import cli

SCRIPT = "benchmarks/prepare_hd.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--size-mm",
        type=float,
        nargs="+",
        default=[6.5],
        help="Sides of the capture area (default: 6.5).",
    )
    parser.add_argument("--molecules", type=float, default=12.0, help="Molecules in a bin")
    add_prepare_options(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import json

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import tifffile

BIN_UM, PIXEL_UM = 2.0, 0.5
MARGIN_PX = 400
DEGREES = 2.0  # by which the array is turned in the image
N_GENES = 18_085  # of 10x's human probe set
ROWS_AT_A_TIME = 250
MATRIX = "filtered_feature_bc_matrix.h5"


def write_outs(
    folder: Path, size_mm: float, molecules: float, rng: np.random.Generator, n_genes: int = N_GENES
) -> int:
    """binned_outputs/square_002um of a section all of tissue; returns the number of bins."""
    n = round(size_mm * 1000 / BIN_UM)
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    turn, step = np.radians(DEGREES), BIN_UM / PIXEL_UM
    right = np.array([np.cos(turn), np.sin(turn)]) * step
    down = np.array([-np.sin(turn), np.cos(turn)]) * step
    left_top = MARGIN_PX + np.array([n * step * np.sin(turn), 0])
    positions, matrix = spatial / "tissue_positions.parquet", folder / MATRIX
    popularity = np.cumsum(1 / np.arange(1, n_genes + 1))  # Zipf
    popularity /= popularity[-1]
    writer = None
    with h5py.File(matrix, "w") as file:
        group = file.create_group("matrix")
        write_features(group, n_genes, n * n)
        options = {"maxshape": (None,), "chunks": (80_000,), "compression": 1}
        data = group.create_dataset("data", (0,), np.int32, **options)
        indices = group.create_dataset("indices", (0,), np.int64, **options)
        barcodes = group.create_dataset("barcodes", (n * n,), "S21", chunks=(min(n * n, 80_000),))
        indptr = np.zeros(n * n + 1, np.int64)
        for first in range(0, n, ROWS_AT_A_TIME):
            row, col = (i.ravel() for i in np.mgrid[first : min(first + ROWS_AT_A_TIME, n), :n])
            names = bin_names(row, col)
            xy = left_top + np.outer(col + 0.5, right) + np.outer(row + 0.5, down)
            table = pyarrow.table(
                {
                    "barcode": pyarrow.array(names.astype("U21")),
                    "in_tissue": np.ones(len(row), np.uint8),
                    "array_row": row.astype(np.uint32),
                    "array_col": col.astype(np.uint32),
                    "pxl_row_in_fullres": xy[:, 1],
                    "pxl_col_in_fullres": xy[:, 0],
                }
            )
            writer = writer or pyarrow.parquet.ParquetWriter(positions, table.schema)
            writer.write_table(table)
            start = first * n
            barcodes[start : start + len(row)] = names
            per_bin = rng.poisson(molecules, len(row))
            genes = np.searchsorted(popularity, rng.random(per_bin.sum(), np.float32))
            owner = np.repeat(np.arange(len(row)), per_bin)
            keys, counts = np.unique(owner * n_genes + genes, return_counts=True)
            used = indptr[start]
            for dataset, values in ((data, counts), (indices, keys % n_genes)):
                dataset.resize((used + len(values),))
                dataset[used:] = values
            filled = np.cumsum(np.bincount(keys // n_genes, minlength=len(row)))
            indptr[start + 1 : start + len(row) + 1] = used + filled
        group["indptr"] = indptr
    if writer is not None:
        writer.close()
    factors = {"bin_size_um": BIN_UM, "microns_per_pixel": PIXEL_UM, "tissue_hires_scalef": 0.1}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    return n * n


def write_features(group: h5py.Group, n_genes: int, n_bins: int) -> None:
    group["shape"] = np.array([n_genes, n_bins])
    features = group.create_group("features")
    features["id"] = np.array([f"ENSG{i:011d}" for i in range(n_genes)], "S")
    features["name"] = np.array([f"GENE{i}" for i in range(n_genes)], "S")
    features["feature_type"] = np.array(["Gene Expression"] * n_genes, "S")


def bin_names(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Barcodes s_002um_RRRRR_CCCCC-1, bytes (n,), without a Python string for each."""
    text = np.empty((len(row), 21), np.uint8)
    text[:] = np.frombuffer(b"s_002um_00000_00000-1", np.uint8)
    for place, values in ((8, row), (14, col)):
        for digit in range(5):
            text[:, place + digit] += (values // 10 ** (4 - digit) % 10).astype(np.uint8)
    return text.view("S21").ravel()


def write_image(path: Path, side: int) -> None:
    """A tiled TIFF, square, of one colour."""
    tile = np.full((512, 512, 3), (225, 180, 205), np.uint8)
    tiles = (tile for _ in range((-(-side // 512)) ** 2))
    tifffile.imwrite(
        path, tiles, shape=(side, side, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb",
        compression="zlib",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    def make(size_mm: float, work: Path) -> tuple[list[str], list[str]]:
        folder = work / "outs" / "binned_outputs" / "square_002um"
        bins = write_outs(folder, size_mm, args.molecules, np.random.default_rng(0))
        turned = size_mm * 1000 / PIXEL_UM * (1 + np.sin(np.radians(DEGREES)))
        write_image(work / "scan.tif", round(turned) + 2 * MARGIN_PX)
        with h5py.File(folder / MATRIX) as file:
            entries = len(file["matrix/data"])
        options = ["--outs", str(work / "outs"), "--image", str(work / "scan.tif")]
        return options, [f"{bins:,}", f"{entries:,}"]

    heads = ("bins of 2 um", "entries")
    measure_prepare(args, "prepare/visium_hd.py", heads, args.size_mm, make)


def run(argv: list[str] | None = None) -> int:
    return run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
