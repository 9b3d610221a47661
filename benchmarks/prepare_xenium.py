"""Make a synthetic Xenium section and measure prepare/xenium.py on it.

    python benchmarks/prepare_xenium.py --cells 125000 250000 500000
    python benchmarks/prepare_xenium.py --panel 5000 --truth-genes 5000

Reads   nothing
Writes  wall time and peak memory per number of cells, in Markdown, on the screen.

Cells stand 150 um2 apiece, with 120 molecules of 400 genes each, a tenth of them of poor quality
and some of controls; the H&E is a plain one at 0.27 um per pixel, turned by 90 degrees and by 1
degree more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import run_benchmark
from benchmarks.preparing import add_prepare_options, measure_prepare
from reading import cli

SCRIPT = "benchmarks/prepare_xenium.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--cells",
        type=cli.positive,
        nargs="+",
        default=[500_000],
        help="Sizes to measure (default: 500000).",
    )
    parser.add_argument("--panel", type=cli.positive, default=400, help="Genes of the panel")
    add_prepare_options(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import json

import numpy as np
import pyarrow as pa
import tifffile
from pyarrow import parquet

RUN_UM, IMAGE_UM = 0.2125, 0.27  # um per pixel of the run and of the H&E
CELL_UM2, SPREAD_UM = 150.0, 4.0  # area of a cell, spread of its molecules
PER_CELL, N_CONTROLS = 120, 40
DEGREES = 91.0
ROW_GROUP = 1_000_000
TILE = 1024


def write_outs(
    folder: Path, n_cells: int, n_genes: int, rng: np.random.Generator
) -> tuple[float, int]:
    """transcripts.parquet and experiment.xenium; returns (side in um, molecules)."""
    folder.mkdir(parents=True)
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": RUN_UM}))
    side = float(np.sqrt(n_cells * CELL_UM2))
    names = [f"GENE{i}" for i in range(n_genes)]
    names = pa.array(names + [f"NegControlProbe_{i:05d}" for i in range(N_CONTROLS)])
    share = np.r_[np.full(n_genes, 1 / n_genes), np.full(N_CONTROLS, 0.02 / N_CONTROLS)]
    writer, done, total = None, 0, n_cells * PER_CELL
    cells = max(1, ROW_GROUP // PER_CELL)
    while done < n_cells:
        n = min(cells, n_cells - done)
        m = n * PER_CELL
        xy = rng.uniform(20, side - 20, (n, 1, 2)) + rng.normal(0, SPREAD_UM, (n, PER_CELL, 2))
        xy = xy.reshape(m, 2).clip(0, side).astype(np.float32)
        codes = rng.choice(len(share), m, p=share / share.sum()).astype(np.int32)
        table = pa.table(
            {
                "transcript_id": np.arange(m, dtype=np.uint64),
                "cell_id": np.repeat(np.arange(done, done + n), PER_CELL).astype(np.int32),
                "feature_name": pa.DictionaryArray.from_arrays(codes, names).cast(pa.string()),
                "x_location": xy[:, 0],
                "y_location": xy[:, 1],
                "qv": np.where(rng.random(m) < 0.9, 40, 10).astype(np.float32),
                "is_gene": codes < n_genes,
            }
        )
        writer = writer or parquet.ParquetWriter(folder / "transcripts.parquet", table.schema)
        writer.write_table(table)
        done += n
    if writer is not None:
        writer.close()
    return side, total


def write_image(folder: Path, side_um: float) -> None:
    """he.ome.tif, tiled, and alignment.csv."""
    side = round(side_um * 1.05 / IMAGE_UM)
    tile = np.full((TILE, TILE, 3), (225, 180, 205), np.uint8)
    tiles = (tile for _ in range((-(-side // TILE)) ** 2))
    metadata = {"axes": "YXS", "PhysicalSizeX": IMAGE_UM, "PhysicalSizeY": IMAGE_UM}
    tifffile.imwrite(
        folder / "he.ome.tif", tiles, shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE),
        photometric="rgb", compression="zlib", metadata=metadata, bigtiff=True,
    )  # fmt: skip
    angle = np.radians(DEGREES)
    matrix = np.eye(3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:2, :2] = turn * IMAGE_UM / RUN_UM
    matrix[:2, 2] = side_um / 2 / RUN_UM - matrix[:2, :2] @ np.full(2, side / 2)
    np.savetxt(folder / "alignment.csv", matrix, delimiter=",")


def main(args: argparse.Namespace) -> None:
    def make(n_cells: float, work: Path) -> tuple[list[str], list[str]]:
        cells, rng = int(n_cells), np.random.default_rng(0)
        side, molecules = write_outs(work / "outs", cells, args.panel, rng)
        write_image(work, side)
        options = ["--outs", str(work / "outs"), "--image", str(work / "he.ome.tif")]
        options += ["--alignment", str(work / "alignment.csv")]
        return options, [f"{cells:,}", f"{molecules:,}", f"{side / 1000:.2f}"]

    heads = ("cells", "molecules", "section (mm)")
    measure_prepare(args, "prepare/xenium.py", heads, args.cells, make)


def run(argv: list[str] | None = None) -> int:
    return run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
