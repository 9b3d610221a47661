"""Export the maps for other tools: AnnData, SpatialData, OME-TIFF, iStar's layout, tables.

    python analysis/export.py --directory data/section --format h5ad
    python analysis/export.py --directory data/section --format ometiff --genes KRT8,CD3E

    h5ad         AnnData for scanpy and squidpy: a row per superpixel in which the maps have a
                 value. obsm["spatial"] is its centre, x and y in pixels of he-raw;
                 obsm["X_histex"] the latent maps, if they are there; uns["histex"] the records of
                 the five scripts, as JSON; uns["spatial"] a reduced H&E.
    spatialdata  SpatialData .zarr (zarr 3): the images "expression" (a channel per gene, NaN
                 outside the tissue) and "he", the labels "tissue" and "regions" (of segments.npy),
                 the circles "spots" and the table "counts" with what they measured. All lead into
                 the coordinate system "global", which is pixels of he-raw.
    ometiff      tiled pyramid for QuPath and napari: a channel per gene, 8 um per pixel, 0 outside
                 the tissue. A pixel of a smaller level is the mean of those of the four below it
                 that lie in the tissue.
    istar        folder for the scripts of iStar: cnts-super/, mask-small.png,
                 embeddings-gene.pickle, he.jpg, gene-names.txt, and what the spots measured
                 (cnts.tsv, locs.tsv, radius.txt) where their discs lie on the image as a whole. Its
                 numpy is of 2023: the arrays are pickled in a form that it reads, too.
    csv          a gzipped table: a row per superpixel with its row, column, x_fullres and
                 y_fullres (pixels of he-raw), then a column per gene.
    spots        back to spots: the sums of the maps over the discs of the spots that lie on the
                 tissue, laid out as cnts.csv.

Values are expected counts per superpixel of 8 um. The maps are read one at a time, or in blocks of
genes, so that memory hardly grows with their number. Each format is a module of analysis/formats/.

Reads   cnts-super/ and image_calibration.json; by format he.jpg, locs.csv, radius.txt, cnts.csv,
        embeddings-gene.pickle; where they are there, mask.png, held-out-r.csv, segments.npy,
        annotation.npy, and the column "name" of the tables beside those two.
Writes  the export, and beside it export.json, the record of all exports in that folder: it tells an
        export of this script from a file of yours.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli
from reading import genes as gene_lists

SCRIPT = "analysis/export.py"


@dataclass(frozen=True)
class Format:
    """A row of the table of formats; analysis/formats/NAME.py writes it."""

    output: str  # name of the export, whose ending any --output must have
    inputs: tuple[utils.Artifact, ...] = ()  # beyond the maps
    is_folder: bool = False


SPOT_FILES = (utils.LOCS, utils.RADIUS)
FORMATS = {
    "h5ad": Format("histex.h5ad", (utils.HE,)),
    "spatialdata": Format("histex.zarr", (utils.HE, *SPOT_FILES, utils.CNTS), is_folder=True),
    "ometiff": Format("histex.ome.tif"),
    "istar": Format(
        "histex-istar", (utils.HE, utils.EMBEDDINGS, *SPOT_FILES, utils.CNTS), is_folder=True
    ),
    "csv": Format("histex.csv.gz"),
    "spots": Format("histex-spots.csv", SPOT_FILES),
}


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    parser.add_argument("--format", choices=list(FORMATS), required=True, help="What to write.")
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--genes",
        type=cli.names_or_file,
        metavar="FILE|A,B,C",
        help=f"Genes to export, in this order: {gene_lists.HELP} (default: all).",
    )
    some.add_argument(
        "--n-genes",
        type=cli.positive,
        metavar="N",
        help="Export the N genes with the highest held-out r (default: all).",
    )
    names = ", ".join(row.output for row in FORMATS.values())
    parser.add_argument(
        "--output",
        type=Path,
        help=f"File or folder to write (default: by format {names} in the folder of the sample).",
    )
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from typing import Protocol, cast

import numpy as np

from analysis import files  # noqa: F401  (names the files of the other scripts)
from analysis.formats.mapset import MapSet
from analysis.inputs import (
    choose_genes,
    map_files,
    read_first_map,
    read_held_out,
    read_sizes,
    scores_of,
)


class Writer(Protocol):
    """A module of analysis/formats/."""

    def bytes_needed(self, source: MapSet) -> int:
        """Of the disk, at most."""

    def write(self, source: MapSet, target: Path) -> None:
        """Write a file, or make a folder, of the name ``target``."""


def load_writer(kind: str) -> Writer:
    """Before any work, not after it: a format may need a package that is not there."""
    try:
        return cast(Writer, importlib.import_module(f"analysis.formats.{kind}"))
    except ImportError as error:
        raise utils.StageError(
            f"--format {kind} needs a package that is not installed: {error}",
            "Run: pip install -r analysis/requirements.txt",
        ) from error


def output_of(args: argparse.Namespace) -> Path:
    default = FORMATS[args.format].output
    path = args.output or args.directory / default
    ending = "".join(Path(default).suffixes)
    if not path.name.lower().endswith(ending):
        raise utils.StageError(
            f"--output {path} does not end in {ending}, as files of --format {args.format} do.",
            f"Name it {path.name}{ending}, or leave --output out for {default} in the sample.",
        )
    return path


def guard_export(stage: utils.Stage, path: Path) -> utils.Artifact:
    """Refuse to replace what this script did not write, unless --force; other folders even so."""
    if path.name in utils.ARTIFACTS and utils.maker(path.name) != SCRIPT:
        raise utils.StageError(
            f"{path.name} is the name of another file of a sample.", "Name another --output."
        )
    artifact = utils.Artifact((path.name,), SCRIPT, f"export as {stage.args.format}", True)
    if path.is_dir() and not (stage.is_mine(artifact) or may_be_replaced(path, stage.args.format)):
        raise utils.StageError(
            f"{path} is a folder of other things than --format {stage.args.format} writes.",
            "Name another --output.",
        )
    stage.guard(artifact)
    return artifact


def may_be_replaced(folder: Path, kind: str) -> bool:
    """Whether a folder is empty or looks like an export, and not like a sample or anything else."""
    if not FORMATS[kind].is_folder:
        return False
    if not any(folder.iterdir()):
        return True
    if kind == "spatialdata":
        about = folder / "zarr.json"
        return about.is_file() and "histex" in about.read_text(encoding="utf-8")
    sample_files = (utils.record_name(utils.HISTEX), *utils.HE_RAW.names)
    is_sample = any((folder / name).exists() for name in sample_files)
    return (folder / "mask-small.png").is_file() and not is_sample


def read_maps(stage: utils.Stage) -> MapSet:
    args, directory = stage.args, stage.directory
    stage.require(*FORMATS[args.format].inputs, utils.MAPS)
    known = map_files(directory)
    if args.n_genes:
        stage.require(scores_of(stage))
    held_out = read_held_out(stage) if args.n_genes else None
    genes = choose_genes(list(known), held_out, args.genes, args.n_genes or len(known))
    chosen = {gene: known[gene] for gene in genes}
    tissue = np.isfinite(read_first_map(stage, chosen)[0])
    raw, scaled = read_sizes(stage, "raw_size", "scaled_size")
    return MapSet(stage, chosen, tissue, raw, scaled)


def main(stage: utils.Stage) -> None:
    kind, target = stage.args.format, output_of(stage.args)
    stage.keeps_others = True  # the other exports of this folder
    writer, artifact = load_writer(kind), guard_export(stage, target)
    source = read_maps(stage)
    need = writer.bytes_needed(source)
    rows, columns = source.tissue.shape
    print(
        f"{len(source.files)} genes, {rows} x {columns} superpixels, {source.n_superpixels} of "
        f"them with values: at most about {utils.size(need)} in {target}"
    )
    stage.folder.mkdir(parents=True, exist_ok=True)
    utils.check_disk(stage.folder, need, f"--format {kind}")
    with stage.writing(artifact) as partial:
        writer.write(source, partial)
    stage.finish(genes=len(source.files), superpixels=source.n_superpixels)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
