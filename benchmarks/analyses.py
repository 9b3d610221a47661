"""Measure time and peak memory of the scripts in analysis/ on one finished section.

    python benchmarks/analyses.py --directory data/section

Reads   a sample after all five scripts. For one of 812 x 812 superpixels and 1,000 genes, write its
        files by benchmarks/scaling.py --section-mm 6.5 and run the five scripts on them. What else
        the scripts ask for is made up: 10 labels of 8 markers and 500 sets of 20 genes, drawn at
        random, and discs of 10 um, 12 um apart, for cells.
Writes  a table in Markdown on the screen; the results themselves go into a folder that is removed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.measure import origin, run_benchmark, run_measured, script_command, table
from reading import cli

SCRIPT = "benchmarks/analyses.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--directory",
        type=cli.sample_directory,
        required=True,
        help="A sample after all five scripts.",
    )
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import numpy as np
import tifffile

from analysis.inputs import map_files, read_map

LABELS, MARKERS = 10, 8  # markers of each label
SETS, GENES_OF_SET = 500, 20
CELL_UM, PITCH_UM = 10, 12


def write_markers(path: Path, genes: list[str], rng: np.random.Generator) -> None:
    lines = [
        f"{gene},label {label}"
        for label in range(LABELS)
        for gene in rng.choice(genes, min(MARKERS, len(genes)), replace=False)
    ]
    path.write_text("\n".join(["gene,label", *lines]) + "\n", encoding="utf-8")


def write_sets(path: Path, genes: list[str], rng: np.random.Generator) -> None:
    size = min(GENES_OF_SET, len(genes))
    sets = [rng.choice(genes, size, replace=False) for _ in range(SETS)]
    lines = ["\t".join([f"set {i}", "random", *names]) for i, names in enumerate(sets)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_cells(path: Path, shape: tuple[int, int]) -> None:
    """A label image as large as he.jpg of a map (rows, columns), written in bands."""
    pitch, radius = round(PITCH_UM / utils.PIXEL_SIZE_UM), CELL_UM / utils.PIXEL_SIZE_UM / 2
    rows, columns = (utils.TOKEN_PX * n for n in shape)
    across = -(-columns // pitch)
    x = np.arange(columns)

    def bands() -> Iterator[np.ndarray]:
        for top in range(0, rows, utils.TOKEN_PX):
            y = np.arange(top, top + utils.TOKEN_PX)[:, None]
            inside = (y % pitch - pitch / 2) ** 2 + (x % pitch - pitch / 2) ** 2 < radius**2
            yield np.where(inside, 1 + y // pitch * across + x // pitch, 0).astype(np.uint32)

    tifffile.imwrite(
        path, bands(), shape=(rows, columns), dtype=np.uint32, rowsperstrip=utils.TOKEN_PX
    )


def commands(made: Path) -> list[tuple[str, ...]]:
    """What is measured, in an order in which each finds what it needs of those before it."""
    out = ("--output", str(made))
    return [
        ("segment.py", *out, "--method", "kmeans"),
        ("segment.py", *out, "--method", "leiden"),
        ("annotate.py", *out, "--markers", str(made / "made-up.csv")),
        ("patterns.py", *out),
        ("enrich.py", *out, "--tables", str(made), "--gene-sets", str(made / "made-up.gmt")),
        ("cells.py", *out, "--frame", "he", "--masks", str(made / "made-up.tif")),
        ("report.py", "--output", str(made / "report.html")),
        ("export.py", "--output", str(made / "section.h5ad"), "--format", "h5ad"),
        ("export.py", "--output", str(made / "section.zarr"), "--format", "spatialdata"),
        ("export.py", "--output", str(made / "section.ome.tif"), "--format", "ometiff"),
    ]


def main(args: argparse.Namespace) -> None:
    directory: Path = args.directory
    genes = (directory / utils.GENE_NAMES.name).read_text(encoding="utf-8").split()
    with tempfile.TemporaryDirectory() as folder:
        made, rng, rows = Path(folder), np.random.default_rng(0), []
        write_markers(made / "made-up.csv", genes, rng)
        write_sets(made / "made-up.gmt", genes, rng)
        grid = read_map(next(iter(map_files(directory).values()))).shape
        write_cells(made / "made-up.tif", grid)
        for script, *options in commands(made):
            command = script_command(f"analysis/{script}", directory, *options)
            facts = run_measured(command, made / "benchmark.log")
            name = f"{script} {options[-1] if options[-2] in ('--method', '--format') else ''}"
            figures = [f"{facts['seconds']:.1f}", f"{facts['cpu']:.1f}", f"{facts['gb']:.2f}"]
            rows.append([name.strip(), *figures])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{grid[0]} x {grid[1]} superpixels, {len(genes)} genes\n")
    heads = ["script", "seconds", "CPU seconds", "peak memory (GB)"]
    print("\n".join([*table(heads, rows), "", *origin(args.command)]))


def run(argv: list[str] | None = None) -> int:
    return run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
