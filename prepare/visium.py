"""Turn the outs folder of Space Ranger (10x Visium) and its full-resolution image into a sample.

    python prepare/visium.py --outs OUTS --image FULLRES --directory DIR

Reads   OUTS/filtered_feature_bc_matrix.h5, or the folder of that name (matrix.mtx and its tables)
        OUTS/spatial/tissue_positions*.csv or .parquet, of Space Ranger 1 to 4
        OUTS/spatial/scalefactors_json.json, tissue_hires_image.png   to recognise the image
        FULLRES   the microscope image that Space Ranger was given: all coordinates refer to it
Writes  he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt; and
        check.png: look at it before you go on.

The pixel size is fitted to the array: neighbours are 100 um apart, rows 86.6 um. Space Ranger's
spot_diameter_fullres is not used: it stands for 65 um, while the printed spots measure 55 um.

Positions. Space Ranger 1 writes no header, later versions do; the content decides, not the name.
Its columns are barcode, in_tissue, array_row, array_col, pxl_row (y), pxl_col (x): row first.

CytAssist. The slide is imaged twice. Coordinates refer to the microscope image (--image of Space
Ranger), not to spatial/cytassist_image.tiff, unless that was the only one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli
from writing import disk

SCRIPT = "prepare/visium.py"


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    options.add_space_ranger_options(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd

from prepare import lattice, sample, section, tenx
from reading import plain, tables

POSITIONS = (  # the newest layout first
    "tissue_positions.csv", "tissue_positions.csv.gz", "tissue_positions.parquet",
    "tissue_positions_list.csv", "tissue_positions_list.csv.gz", "tissue_positions_list.txt",
)  # fmt: skip
MAX_STRANGERS = 0.05  # share of the filtered barcodes without tissue: else from another section


# -------------------------------------------------------------------------------------------------
# the outs folder
# -------------------------------------------------------------------------------------------------
def find_outs(path: Path) -> Path:
    """The outs folder itself, or the one within the folder of a run."""
    for folder in (path, path / "outs"):
        tenx.refuse_other_outputs(folder)
        if (folder / "spatial").is_dir():
            return folder
    found = "has no folder spatial" if path.is_dir() else "is no folder"
    raise utils.StageError(
        f"{path} {found}.",
        f"{tenx.SPACE_RANGER} Downloads hold it as spatial.tar.gz: unpack it there.",
    )


def read_positions(path: Path) -> pd.DataFrame:
    """Index barcode; in_tissue (bool), array_row, array_col, x, y (px of full resolution)."""
    table = section.read_numbers(
        path, read_table, tenx.COLUMNS, text=["barcode"], flags=["in_tissue"]
    )
    if repeated := utils.duplicates(table["barcode"]):
        raise section.unfit(path, f"lists the barcodes {utils.some(repeated)} more than once.")
    table = table.set_index(pd.Index(table.pop("barcode").astype(str), name=None))
    table = table.rename(columns={tenx.COLUMNS[4]: "y", tenx.COLUMNS[5]: "x"})
    return table.assign(in_tissue=table["in_tissue"] > 0)


def read_table(path: Path) -> pd.DataFrame:
    """A table of positions; whether it has a header, and whether it is Parquet, its bytes tell."""
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return pd.read_parquet(path)
    first, *others = tables.read_rows(path)
    if "in_tissue" in first:
        return pd.DataFrame(others, columns=first, dtype=object)
    if len(first) != len(tenx.COLUMNS) or not all(map(plain.is_number, first[2:])):
        raise plain.Unfit(
            f"its first line is {','.join(first)[:80]!r}; expected {','.join(tenx.COLUMNS)}"
        )
    return pd.DataFrame([first, *others], columns=list(tenx.COLUMNS), dtype=object)


# -------------------------------------------------------------------------------------------------
# the section
# -------------------------------------------------------------------------------------------------
def join_tissue(
    positions: pd.DataFrame, barcodes: list[str], path: Path
) -> tuple[pd.Index, list[str]]:
    """Barcodes in tissue that have counts, and a note on those in tissue without."""
    in_tissue = positions.index[positions["in_tissue"]]
    strangers = pd.Index(barcodes).difference(in_tissue, sort=False)
    if len(strangers) > MAX_STRANGERS * len(barcodes):
        raise utils.StageError(
            f"{path} says that {len(strangers)} of the {len(barcodes)} barcodes of the matrix are "
            f"not in tissue ({utils.some(strangers)}).",
            "Matrix and positions are of two sections, or ids differ; give those of one run.",
        )
    spots = in_tissue[in_tissue.isin(barcodes)]
    missing = len(in_tissue) - len(spots)
    return spots, [f"{missing} spots in tissue have no counts and are left out"] if missing else []


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    outs = find_outs(args.outs)
    spatial = tenx.read_spatial(outs / "spatial")
    positions_path = section.first_of(spatial.folder, POSITIONS, tenx.SPACE_RANGER)
    matrix_path = tenx.find_matrix(outs)
    positions = read_positions(positions_path)
    fitted = tenx.fit_visium_array(positions, positions_path)
    places, in_tissue = positions[["x", "y"]], positions["in_tissue"]
    written, notes = tenx.choose_image(args, places[in_tissue], fitted.pixel_size_um, spatial)
    cytassist = (spatial.folder / tenx.CYTASSIST_IMAGE).is_file()
    if cytassist:
        notes.append("CytAssist run: coordinates refer to the microscope image, not to its own")
    notes += lattice.mirror_notes(fitted, from_the_back=cytassist)
    counts, barcodes, features = tenx.read_10x(matrix_path)
    spots, joined = join_tissue(positions, barcodes, positions_path)
    genes = tenx.gene_names(features)
    return section.PreparedSection(
        image=written.image,
        pixel_size_um=written.pixel_size_um,
        locs=written.move(places.loc[spots]),
        counts=counts,
        spots=barcodes,
        genes=genes,
        gene_names=section.genes_of_option(args.genes, genes),
        off_tissue=written.move(places[~in_tissue]),
        array=written.move(places),
        scales=spatial.scales,
        sources=[args.image, positions_path, *spatial.files(), *disk.files_in(matrix_path)],
        facts={
            "full_resolution_um_per_px": fitted.pixel_size_um,
            "array_turned_degrees": round(float(np.degrees(np.arctan2(*fitted.axes[0, ::-1]))), 3),
            "array_mirrored": fitted.mirrored,
        },
        notes=[*notes, *joined, *tenx.dropped_notes(features)],
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
