"""Turn a section of legacy Spatial Transcriptomics, such as those of her2st, into a sample.

    python prepare/legacy_st.py --counts ST-cnts/C2.tsv.gz --spots ST-spotfiles/C2_selection.tsv
        --image ST-imgs/C2.jpg --directory DIR [--labels ST-pat/lbl/C2_labeled_coordinates.tsv]

Reads   counts   spots x genes; the id of a spot is its place on the array, "10x13"
        spots    x, y (place on the array), new_x, new_y (the same, adjusted), pixel_x, pixel_y
                 (px of the image) and, if it is there, selected (1 in tissue)
        labels   a pathologist's: x, y (which are new_x, new_y), label
Writes  he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt; check.png;
        labels.csv (spot id, label) if labels were given.
        Look at check.png before you go on.

The array is square: spots of 100 um, 200 um apart. Spots were placed by hand or by detection and
are off by some um, so that the nearest neighbours are nearer than the pitch; the pixel size is
fitted to the whole array.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli

SCRIPT = "prepare/legacy_st.py"


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    parser.add_argument("--counts", type=Path, required=True, help="Table of counts, .tsv(.gz).")
    parser.add_argument("--spots", type=Path, required=True, help="Spot selection, .tsv.")
    parser.add_argument("--image", type=Path, required=True, help="H&E that pixel_x, _y refer to.")
    parser.add_argument(
        "--labels", type=Path, help="A pathologist's labels, .tsv (default: no labels.csv)."
    )
    options.add_pixel_size(parser, "fitted to the array's pitch of 200 um")
    options.add_image_options(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

from prepare import images, lattice, sample, section

LABELS = utils.Artifact(("labels.csv",), None, "spot id, a pathologist's label")
SPOT_COLUMNS = ["x", "y", "pixel_x", "pixel_y"]
LABEL_COLUMNS = ["x", "y", "label"]
MAX_RESIDUAL_UM = 50.0  # of a spot from the fitted array, root mean square: half a spot
MAX_MISSING = 0.2  # share of the selected spots without counts: else of another section
MAX_SKEW = 0.1  # of the fitted array, see FittedArray
SAME_SPOT = 0.02  # array units; labels give their coordinates rounded


def read_selection(path: Path) -> pd.DataFrame:
    """Index: spot id "10x13"; column, row (on the array), x, y (px), new_x, new_y, selected."""
    table = section.read_numbers(
        path,
        columns=SPOT_COLUMNS,
        optional=["new_x", "new_y", "selected"],
        flags=["selected"],
    )
    place = table[["x", "y"]]
    if (place != place.round()).to_numpy().any():
        raise section.unfit(path, "has fractions in x or y; expected whole places on the array.")
    ids = [f"{x:.0f}x{y:.0f}" for x, y in place.to_numpy()]
    if repeated := utils.duplicates(ids):
        raise section.unfit(path, f"lists the spots {utils.some(repeated)} more than once.")
    names = {"x": "column", "y": "row", "pixel_x": "x", "pixel_y": "y"}
    table = table.assign(**{n: table[n[4:]] for n in ("new_x", "new_y") if n not in table})
    table["selected"] = table["selected"] != 0 if "selected" in table else True
    return table.rename(columns=names).set_index(pd.Index(ids))


def read_count_table(path: Path) -> pd.DataFrame:
    """Counts (spots, genes), whole numbers; R's header may lack the column of the ids."""
    table = section.read_spot_table(path)
    values = table.to_numpy()
    if (values < 0).any() or (values != np.floor(values)).any():
        raise section.unfit(path, "holds negative numbers or fractions; expected raw counts.")
    return table


def fit_square_array(spots: pd.DataFrame, path: Path) -> tuple[lattice.FittedArray, pd.DataFrame]:
    """(the array with a pitch of 200 um, the ideal place of each spot in px)."""
    lattice_um = spots[["column", "row"]].to_numpy() * utils.LEGACY_PITCH_UM
    fitted = lattice.fit_array(lattice_um, spots[["x", "y"]].to_numpy(), path)
    if fitted.residual_um > MAX_RESIDUAL_UM or fitted.skew > MAX_SKEW:
        raise section.unfit(
            path,
            f"does not put the spots on a square array: they are {fitted.residual_um:.0f} um off "
            f"it, and it is skewed by {fitted.skew:.0%}. Are pixel_x and pixel_y those of this "
            f"section?",
        )
    ideal = pd.DataFrame(fitted.place(lattice_um), index=spots.index, columns=["x", "y"])
    return fitted, ideal


def join_labels(path: Path, spots: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(label by spot id, notes). Labels have no id; their x, y are the spots' new_x, new_y."""
    table = section.read_numbers(path, columns=LABEL_COLUMNS, text=["label"])
    tree = cKDTree(spots[["new_x", "new_y"]].to_numpy())
    distance, nearest = tree.query(table[["x", "y"]].to_numpy())
    found = distance <= SAME_SPOT * np.sqrt(2)
    if found.mean() < 0.5:
        raise section.unfit(
            path, f"fits only {found.sum()} of its {len(found)} places to spots: another section's?"
        )
    labels = pd.DataFrame(
        {"label": table["label"][found].to_numpy()},
        index=spots.index[nearest[found]],
    )
    if repeated := utils.duplicates(labels.index):
        raise section.unfit(path, f"labels the spots {utils.some(repeated)} more than once.")
    labels = labels.reindex(spots.index.intersection(labels.index, sort=False))
    notes = [f"{len(labels)} of {len(spots)} spots have a label"]
    if (~found).any():
        notes.append(f"{(~found).sum()} labels fit no spot and are left out")
    return labels, notes


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    spots, counts = read_selection(args.spots), read_count_table(args.counts)
    fitted, ideal = fit_square_array(spots, args.spots)
    size = args.pixel_size or fitted.pixel_size_um
    selected = spots[spots["selected"]]
    chosen = section.shared_spots(counts, args.counts, selected, args.spots)
    missing = len(selected) - len(chosen)
    if missing > MAX_MISSING * len(selected):
        raise utils.StageError(
            f"{args.counts} has no counts for {missing} of the {len(selected)} spots that "
            f"{args.spots} selects: they are of two sections.",
            section.ONE_SECTION,
        )
    image, locs, out_size = images.place_image(
        args.image, selected.loc[chosen], size, args.crop_um, args.downsample
    )
    notes = images.check_metadata(
        args.image, size, args.pixel_size is not None, f"--pixel-size {size:.4g}"
    )
    notes += [*lattice.mirror_notes(fitted), *section.repeated_note(args.counts)]
    if missing:
        notes.append(f"{missing} selected spots without counts are left out")
    others = spots.drop(chosen)[["x", "y"]]
    tables: dict[utils.Artifact, pd.DataFrame] = {}
    if args.labels:
        labels, joined = join_labels(args.labels, spots)
        tables[LABELS] = labels.loc[[spot for spot in chosen if spot in labels.index]]
        notes += [*joined, f"{LABELS.name} holds {len(tables[LABELS])} of the {len(chosen)} spots"]
    return section.PreparedSection(
        image=image,
        pixel_size_um=out_size,
        locs=locs[["x", "y"]],
        off_tissue=images.move(others, image),
        array=images.move(ideal, image),
        counts=sparse.csr_array(counts.to_numpy()),
        spots=list(counts.index),
        genes=list(counts.columns),
        radius_um=utils.LEGACY_RADIUS_UM,
        pitch_um=utils.LEGACY_PITCH_UM,
        gene_names=section.genes_of_option(args.genes, list(counts.columns)),
        notes=notes,
        tables=tables,
        sources=[p for p in (args.counts, args.spots, args.image, args.labels) if p],
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
