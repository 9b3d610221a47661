"""Turn an .h5ad file, a SpatialData .zarr or plain tables of Visium spots into a sample.

    python prepare/scverse.py --h5ad FILE --image FULLRES --directory DIR
    python prepare/scverse.py --spatialdata FILE.zarr [--image FULLRES] --directory DIR
    python prepare/scverse.py --tables FOLDER_OR_PREFIX --directory DIR

Reads   .h5ad   counts; obsm["spatial"] = x, y in px of the full-resolution image, as scanpy and
                squidpy have them; in_tissue, array_row, array_col of obs if they are there
        .zarr   table and shapes (circles) of SpatialData; the image of the store, or --image;
                --h5ad takes the .zarr folder of AnnData, too
        tables  cnts.csv or .tsv, locs-raw.csv or .tsv, he-raw.*, pixel-size-raw.txt, and
                radius-raw.txt if it is there, in a folder or after a prefix (data/P1- reads
                data/P1-cnts.tsv), as the tools of this family have them
Writes  he-raw.*, pixel-size-raw.txt, locs-raw.csv, cnts.csv.gz, radius-raw.txt; and
        check.png: look at it before you go on.

Raw counts are taken from X, else from a layer, else from raw: from the first that holds nothing but
whole numbers. Normalised or log-transformed values are refused: counts cannot be got back.

One section is taken. Of several you are asked for one: by a column of obs (--library), or by the
--table, --shapes, --image-element and --coordinate-system of a store. Whether there are several,
the spots themselves tell: those of one section lie on one lattice, each at its own place.

The images in uns["spatial"] are the hires and lowres copies, too coarse for the cells: the
full-resolution image is needed. Pixel size: from array_row and array_col, where Visium's
neighbours are 100 um apart; without them from the distances between nearest spots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import options
from reading import cli, plain

SCRIPT = "prepare/scverse.py"


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--h5ad", type=Path, help="AnnData with obsm['spatial'].")
    source.add_argument("--spatialdata", type=Path, metavar="ZARR", help="SpatialData store.")
    source.add_argument(
        "--tables", type=Path, metavar="PREFIX", help="Folder of plain tables, or a prefix."
    )
    parser.add_argument(
        "--image", type=Path, help="The full-resolution image (default: that of the source)."
    )
    for option, what in (
        ("--layer", "Layer of AnnData that holds the raw counts (default: what holds counts)"),
        (
            "--library",
            "Section of the .h5ad, a name in a column of obs, or COLUMN=NAME; all: every "
            "spot lies on the one image (default: the only one)",
        ),
        ("--table", "Table of the SpatialData store (default: the only one)"),
        ("--shapes", "Shapes of the store (default: the only ones)"),
        ("--image-element", "Image of the store (default: the only one)"),
        (
            "--coordinate-system",
            "Coordinate system in which the spots lie on the image (default: "
            "whichever both have, if all place them alike)",
        ),
    ):
        parser.add_argument(option, metavar="NAME", help=f"{what}.")
    options.add_pixel_size(parser, "from the spots' pitch")
    parser.add_argument(
        "--pitch-um", type=cli.above_0, default=utils.VISIUM_PITCH_UM, metavar="UM",
        help=f"Distance between neighbouring spots; {utils.LEGACY_PITCH_UM:g} for legacy ST",
    )  # fmt: skip
    parser.add_argument(
        "--radius-um", type=cli.above_0, metavar="UM",
        help=f"Radius of a spot; {utils.LEGACY_RADIUS_UM:g} for legacy ST (default: that of the "
             f"source, else {utils.VISIUM_RADIUS_UM:g} for Visium).",
    )  # fmt: skip
    options.add_image_options(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
from scipy import sparse

from method.grid import lattice_pitch
from prepare import images, lattice, readable, sample, section, stores, tenx
from prepare.annotated import (
    Annotated,
    describe,
    keys_of,
    open_anndata,
    read_array,
    shape_of,
    whole_counts,
)
from prepare.libraries import ARRAY, SourceSpots, choose_library, read_places, spots_of

LOCS_NAMES = ("locs-raw.csv", "locs-raw.tsv", "locs-raw.csv.gz", "locs-raw.tsv.gz")
OTHER_IMAGE = (
    "Give the full-resolution image that Space Ranger was given. If you know that the coordinates "
    "refer to your image, add its --pixel-size."
)


# -------------------------------------------------------------------------------------------------
# AnnData
# -------------------------------------------------------------------------------------------------
def read_h5ad(args: argparse.Namespace) -> SourceSpots:
    with open_anndata(args.h5ad) as data:
        xy = read_places(data)
        rows, library, notes = choose_library(data, args.library, xy)
        spots = spots_of(data, rows, xy[rows], args.layer)
        spots.notes += notes
        spots.files = [args.h5ad]
        spots.copies = read_copies(data, library)
    return spots


def read_copies(data: Annotated, library: str | None) -> tenx.SmallerCopies:
    """What uns["spatial"] says of the hires and lowres copies of the image, as far as it does."""
    scales, size = {}, None
    factors, copies = (f"uns/spatial/{library}/{name}" for name in ("scalefactors", "images"))
    for name in set(tenx.SCALES) & set(keys_of(data.root, factors)):
        scales[name] = float(read_array(data.root[f"{factors}/{name}"]))
    if "hires" in keys_of(data.root, copies):
        size = shape_of(data.root[f"{copies}/hires"])[1::-1]
    sound = all(np.isfinite(scale) and scale > 0 for scale in scales.values())
    if not sound or (size is not None and (len(size) != 2 or min(size) < 1)):
        raise utils.StageError(
            f"{data.path} says of the copies of the image: scales {scales}, hires of {size} px.",
            "Mend or delete uns['spatial'], then run the same command.",
        )
    return tenx.SmallerCopies(scales, size)


# -------------------------------------------------------------------------------------------------
# plain tables
# -------------------------------------------------------------------------------------------------
def find_plain(prefix: str, names: tuple[str, ...], what: str) -> Path | None:
    """The one file of these names after a prefix, or in the folder; None if there is none."""
    start = f"{prefix}/" if Path(prefix).is_dir() else prefix
    there = [Path(start + name) for name in names if Path(start + name).is_file()]
    if len(there) > 1:
        raise utils.StageError(
            f"There are {utils.some(there)}: which is the {what}?", "Move the others away."
        )
    return there[0] if there else None


def need_plain(prefix: str, names: tuple[str, ...], what: str) -> Path:
    path = find_plain(prefix, names, what)
    if path is None:
        start = f"{prefix}/" if Path(prefix).is_dir() else prefix
        raise utils.StageError(
            f"There is no {start}{names[0]} ({what}), nor {', '.join(names[1:]) or 'another'}.",
            "Give --tables the folder, or what stands before the names (data/P1-).",
        )
    return path


def read_one_number(path: Path) -> float:
    with readable.readable(path, "text", "Save it as plain text, then run the same command."):
        content = plain.read_text(path).strip()
    if not plain.is_number(content) or not 0 < float(content) < np.inf:
        raise utils.StageError(
            f"{path} holds {content[:40]!r}; expected one number above zero.",
            "Write that number alone into it, with a point, then run the same command.",
        )
    return float(content)


def read_tables(args: argparse.Namespace) -> SourceSpots:
    prefix = str(args.tables)
    counts_path = need_plain(prefix, utils.CNTS.names, "counts")
    locs_path = need_plain(prefix, LOCS_NAMES, "places of the spots")
    image = args.image or need_plain(prefix, utils.HE_RAW.names, "image")
    counts = section.read_spot_table(counts_path)
    locs = section.read_spot_table(locs_path, ["x", "y"])
    if not whole_counts(counts.to_numpy()):
        raise utils.StageError(
            f"{counts_path} holds fractions or negative numbers; expected raw counts. "
            + "".join(describe(counts.to_numpy(), "It")),
            "Give the counts before they were normalised.",
        )
    shared = section.shared_spots(counts, counts_path, locs, locs_path)
    size_path = find_plain(prefix, utils.PIXEL_SIZE_RAW.names, "pixel size")
    radius_path = find_plain(prefix, utils.RADIUS_RAW.names, "radius")
    size = args.pixel_size or (read_one_number(size_path) if size_path else None)
    notes = section.repeated_note(counts_path)
    if alone := len(counts) + len(locs) - 2 * len(shared):
        notes.append(f"{alone} spots are in one table only and are left out")
    spots = SourceSpots(
        sparse.csr_array(counts.loc[shared].to_numpy()), shared, list(counts.columns),
        locs.loc[shared], np.ones(len(shared), bool), notes, pixel_size_um=size, image=image,
        files=[path for path in (counts_path, locs_path, size_path, radius_path) if path],
    )  # fmt: skip
    if radius_path and size:
        spots.radius_um = read_one_number(radius_path) * size
    return spots


# -------------------------------------------------------------------------------------------------
# the section
# -------------------------------------------------------------------------------------------------
def fit_array(
    args: argparse.Namespace, spots: SourceSpots, path: Path
) -> tuple[lattice.FittedArray | None, list[str]]:
    """Visium's array, where array_row and array_col are known, and notes. It must fit, unless the
    pixel size is known without it."""
    if not set(ARRAY) <= set(spots.places) or args.pitch_um != utils.VISIUM_PITCH_UM:
        return None, []
    known = spots.places.dropna()
    notes = []
    if unknown := len(spots.places) - len(known):
        notes.append(f"{unknown} spots have no {' or '.join(ARRAY)}; the others tell the array")
    try:
        fitted = tenx.fit_visium_array(known, path) if len(known) else None
    except utils.StageError as error:
        problem = str(error).splitlines()[0]
        if args.pixel_size or spots.pixel_size_um:
            return None, [*notes, f"the pixel size is taken as given, but {problem}"]
        raise utils.StageError(
            problem,
            f"Mend {' and '.join(ARRAY)} in obs, or drop both: then the distances between spots "
            f"tell the pixel size. Or give it by --pixel-size.",
        ) from error
    return fitted, notes if fitted is None else [*notes, *lattice.mirror_notes(fitted, None)]


def pixel_size(
    args: argparse.Namespace, spots: SourceSpots, fitted: lattice.FittedArray | None
) -> float:
    """um per px of the image: as given, by the array, or by the distances of nearest spots."""
    if known := args.pixel_size or spots.pixel_size_um:
        return float(known)
    if fitted is not None:
        return fitted.pixel_size_um
    return float(args.pitch_um / lattice_pitch(spots.places[["x", "y"]].to_numpy()))


def check_options(args: argparse.Namespace) -> None:
    """Stop at options of another source than the one given: they would do nothing."""
    own: dict[str, tuple[str, ...]] = {
        "h5ad": ("layer", "library"),
        "spatialdata": ("layer", "table", "shapes", "image_element", "coordinate_system"),
        "tables": (),
    }
    source = next(name for name in own if getattr(args, name) is not None)
    for name in {name for names in own.values() for name in names} - set(own[source]):
        if getattr(args, name) is not None:
            raise utils.StageError(
                f"--{name.replace('_', '-')} says nothing of --{source}.", "Leave it out."
            )


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    check_options(args)
    source = args.h5ad or args.spatialdata or args.tables
    read = read_h5ad if args.h5ad else stores.read_spatialdata if args.spatialdata else read_tables
    spots = read(args)
    given = args.image or spots.image
    if given is None:
        raise utils.StageError(
            f"{source} comes without the full-resolution image, only smaller copies.",
            stores.WHOLE_IMAGE,
        )
    if not spots.in_tissue.any():
        raise utils.StageError(f"{source} has no spot in tissue.", "See its column in_tissue.")
    fitted, notes = fit_array(args, spots, source)
    size = pixel_size(args, spots, fitted)
    places = spots.places[["x", "y"]]
    inside = places[spots.in_tissue]
    if isinstance(given, Path):
        trusted = "--pixel-size is given" if args.pixel_size else None
        notes += spots.copies.check_size(given, trusted, OTHER_IMAGE)
        notes += images.check_metadata(given, size, bool(trusted), f"--pixel-size {size:.4g}")
        image, locs, size = images.place_image(given, inside, size, args.crop_um, args.downsample)
    else:
        image = images.place_slide(given, inside, size, args.crop_um, args.downsample)
        locs, size = images.move(inside, image), size * image.downsample
    rows, columns = images.image_shape(image)
    if not isinstance(image, Path) and rows * columns > utils.MAX_MEGAPIXELS * 1e6:
        raise utils.StageError(
            f"The image would be {columns:,} x {rows:,} px; expected at most "
            f"{utils.MAX_MEGAPIXELS:,} megapixels.",
            "Cut it to the spots by --crop-um 500, or shrink it by --downsample FACTOR.",
        )
    return section.PreparedSection(
        image=image,
        pixel_size_um=size,
        locs=locs,
        off_tissue=images.move(places[~spots.in_tissue], image),
        array=images.move(places, image),
        counts=spots.counts,
        spots=spots.ids,
        genes=spots.genes,
        gene_names=section.genes_of_option(args.genes, spots.genes),
        radius_um=args.radius_um or spots.radius_um or utils.VISIUM_RADIUS_UM,
        pitch_um=args.pitch_um,
        scales=spots.copies.scales,
        notes=spots.notes + notes,
        sources=[*spots.files, given if isinstance(given, Path) else given.path],
        facts={
            "source": str(source),
            "array_mirrored": None if fitted is None else fitted.mirrored,
        },
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
