"""Turn a section of legacy Spatial Transcriptomics, such as those of her2st, into a sample.

    python prepare/legacy_st.py --counts ST-cnts/C2.tsv.gz --spots ST-spotfiles/C2_selection.tsv
        --image ST-imgs/C2.jpg --directory DIR [--labels ST-pat/lbl/C2_labeled_coordinates.tsv]

Reads   counts   spots x genes; the id of a spot is its place on the array, "10x13"
        spots    x, y (place on the array), new_x, new_y (the same, adjusted), pixel_x, pixel_y
                 (px of the image) and, if it is there, selected (1 in tissue)
        labels   a pathologist's: x, y (which are new_x, new_y), label
Writes  the files of a sample, see sample.py; labels.csv (spot id, label) if labels were given.
        Look at check.png before you go on.

The array is square: spots of 100 um, 200 um apart. Spots were placed by hand or by detection and
are off by some um, so that the nearest neighbours are nearer than the pitch; the pixel size is
fitted to the whole array.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import common, images, sample, slides

LABELS = "labels.csv"
SPOT_COLUMNS = ["x", "y", "pixel_x", "pixel_y"]
LABEL_COLUMNS = ["x", "y", "label"]
MAX_RESIDUAL_UM = 50.0  # of a spot from the fitted array, root mean square: half a spot
MAX_MISSING = 0.2  # share of the selected spots without counts: else of another section
MAX_SKEW = 0.1  # of the fitted array: relative difference of its scales, cosine of its angle
SAME_SPOT = 0.02  # array units; labels give their coordinates rounded
DAMAGED = (ValueError, OSError, EOFError, KeyError)  # what damaged tables raise


def read_tsv(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table with tabs between its columns, some of which must be numbers; .gz or not."""
    try:
        table = pd.read_csv(path, sep="\t", keep_default_na=False, encoding="utf-8-sig")
        missing = [name for name in columns if name not in table.columns]
        if missing:
            raise common.broken(
                path, f"has the columns {utils.some(table.columns)}; {missing[0]} is missing."
            )
        numbers = [name for name in columns if name != "label"]
        table[numbers] = table[numbers].apply(pd.to_numeric).astype(float)
    except utils.StageError:
        raise
    except DAMAGED as error:
        raise common.broken(path, f"is no whole table: {error}") from error
    if table.empty or not np.isfinite(table[numbers].to_numpy()).all():
        raise common.broken(path, "is empty or has empty cells.")
    return table


def read_spots(path: Path) -> pd.DataFrame:
    """Index: spot id "10x13"; column, row (on the array), x, y (px), new_x, new_y, selected."""
    table = read_tsv(path, SPOT_COLUMNS)
    place = table[["x", "y"]]
    if (place != place.round()).to_numpy().any():
        raise common.broken(path, "has fractions in x or y; expected whole places on the array.")
    ids = [f"{x:.0f}x{y:.0f}" for x, y in place.to_numpy()]
    if repeated := utils.duplicates(ids):
        raise common.broken(path, f"lists the spots {utils.some(repeated)} more than once.")
    spots = pd.DataFrame(
        {
            "column": place["x"].to_numpy(), "row": place["y"].to_numpy(),
            "x": table["pixel_x"].to_numpy(), "y": table["pixel_y"].to_numpy(),
        },
        index=ids,
    )  # fmt: skip
    for name, other in (("new_x", "x"), ("new_y", "y")):
        spots[name] = pd.to_numeric(table[name if name in table else other]).to_numpy(float)
    spots["selected"] = table["selected"].to_numpy() != 0 if "selected" in table else True
    return spots


def read_counts(path: Path) -> pd.DataFrame:
    """Counts (spots, genes), whole numbers; R's header may lack the column of the ids."""
    try:
        table = pd.read_csv(path, sep="\t", index_col=0, dtype={0: str}, encoding="utf-8-sig")
    except DAMAGED as error:
        raise common.broken(path, f"is no whole table of counts: {error}") from error
    if table.shape[1] == 0:
        raise common.broken(path, "has one column only; expected tabs between the columns.")
    try:
        values = table.to_numpy(float)
    except ValueError as error:
        raise common.broken(path, f"holds something else than numbers: {error}") from error
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.floor(values)).any():
        raise common.broken(
            path, "holds empty cells, negative numbers or fractions; expected raw counts."
        )
    names = [str(name).strip() for name in table.index]
    return pd.DataFrame(values, index=names, columns=[str(gene) for gene in table.columns])


def fit_array(spots: pd.DataFrame, path: Path) -> tuple[float, pd.DataFrame]:
    """(um per pixel, the ideal place of each spot in px) from the array's pitch of 200 um."""
    lattice = spots[["column", "row"]].to_numpy() * common.LEGACY_PITCH_UM
    xy = spots[["x", "y"]].to_numpy()
    origin, axes = common.fit_affine(lattice, xy)
    if abs(np.linalg.det(axes)) < 1e-12:
        raise common.broken(path, "puts all spots on one line.")
    size = common.pixel_size_of(axes)
    ideal = origin + lattice @ axes
    residual = float(np.sqrt(((ideal - xy) ** 2).sum(axis=1).mean())) * size
    length = np.linalg.norm(axes, axis=1)
    skew = max(abs(length[0] / length[1] - 1), abs(axes[0] @ axes[1]) / length.prod())
    if residual > MAX_RESIDUAL_UM or skew > MAX_SKEW:
        raise common.broken(
            path,
            f"does not put the spots on a square array: they are {residual:.0f} um off it, and it "
            f"is skewed by {skew:.0%}. Are pixel_x and pixel_y those of this section?",
        )
    return size, pd.DataFrame(ideal, index=spots.index, columns=["x", "y"])


def join_labels(path: Path, spots: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(label by spot id, notes). Labels have no id; their x, y are the spots' new_x, new_y."""
    table = read_tsv(path, LABEL_COLUMNS)
    tree = cKDTree(spots[["new_x", "new_y"]].to_numpy())
    distance, nearest = tree.query(table[["x", "y"]].to_numpy())
    found = distance <= SAME_SPOT * np.sqrt(2)
    if found.mean() < 0.5:
        raise common.broken(
            path, f"fits only {found.sum()} of its {len(found)} places to spots: another section's?"
        )
    labels = pd.DataFrame(
        {"label": table["label"].astype(str).str.strip()[found].to_numpy()},
        index=spots.index[nearest[found]],
    )
    if repeated := utils.duplicates(labels.index):
        raise common.broken(path, f"labels the spots {utils.some(repeated)} more than once.")
    labels = labels.reindex(spots.index.intersection(labels.index, sort=False))
    notes = [f"{len(labels)} of {len(spots)} spots have a label"]
    if (~found).any():
        notes.append(f"{(~found).sum()} labels fit no spot and are left out")
    return labels, notes


def prepare(args: argparse.Namespace) -> common.Section:
    spots, counts = read_spots(args.spots), read_counts(args.counts)
    fitted, ideal = fit_array(spots, args.spots)
    size = args.pixel_size or fitted
    selected = spots[spots["selected"]]
    chosen = [spot for spot in counts.index if spot in selected.index]
    if not chosen:
        raise utils.StageError(
            f"{args.counts} and {args.spots} have no spot in common: {utils.some(counts.index)}; "
            f"{utils.some(selected.index)}.",
            "Give the counts and the spots of one and the same section.",
        )
    missing = len(selected) - len(chosen)
    if missing > MAX_MISSING * len(selected):
        raise utils.StageError(
            f"{args.counts} has no counts for {missing} of the {len(selected)} spots that "
            f"{args.spots} selects: they are of two sections.",
            "Give the counts and the spots of one and the same section.",
        )
    image, locs, out_size = images.place_image(
        args.image, selected.loc[chosen], size, args.crop_um, args.downsample
    )
    notes = images.check_metadata(
        args.image, size, args.pixel_size is not None, f"--pixel-size {size:.4g}"
    )
    notes += common.repeated_note(args.counts, "\t")
    if missing:
        notes.append(f"{missing} selected spots without counts are left out")
    others = spots.drop(chosen)[["x", "y"]]
    tables = {}
    if args.labels:
        labels, joined = join_labels(args.labels, spots)
        tables[LABELS] = labels.loc[[spot for spot in chosen if spot in labels.index]]
        notes += [*joined, f"{LABELS} holds {len(tables[LABELS])} of the {len(chosen)} spots"]
    return common.Section(
        image=image,
        pixel_size_um=out_size,
        locs=locs[["x", "y"]],
        off_tissue=images.move(others, image),
        array=images.move(ideal, image),
        counts=counts,
        genes=list(counts.columns),
        radius_px=common.LEGACY_RADIUS_UM / out_size,
        pitch_um=common.LEGACY_PITCH_UM,
        gene_names=common.read_gene_list(args.genes, list(counts.columns)),
        notes=notes,
        tables=tables,
        sources=[p for p in (args.counts, args.spots, args.image, args.labels) if p],
    )


def build_parser() -> argparse.ArgumentParser:
    parser = sample.build_parser(__doc__)
    parser.add_argument("--counts", type=Path, required=True, help="Table of counts, .tsv(.gz).")
    parser.add_argument("--spots", type=Path, required=True, help="Spot selection, .tsv.")
    parser.add_argument("--image", type=Path, required=True, help="H&E that pixel_x, _y refer to.")
    parser.add_argument("--labels", type=Path, help="A pathologist's labels, .tsv.")
    parser.add_argument(
        "--pixel-size",
        type=slides.pixel_size,
        metavar="UM",
        help="um per pixel of the image; default: fitted to the array's pitch of 200 um.",
    )
    images.add_image_options(parser)
    return parser


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
