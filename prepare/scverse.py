"""Turn an .h5ad file, a SpatialData .zarr or plain tables of Visium spots into a sample.

    python prepare/scverse.py --h5ad FILE --image FULLRES --directory DIR
    python prepare/scverse.py --spatialdata FILE.zarr [--image FULLRES] --directory DIR
    python prepare/scverse.py --tables FOLDER_OR_PREFIX --directory DIR

Reads   .h5ad   counts; obsm["spatial"] = x, y in px of the full-resolution image, as scanpy and
                squidpy have them; in_tissue, array_row, array_col of obs if they are there
        .zarr   table and shapes (circles) of SpatialData; the image of the store, or --image
        tables  cnts.csv or .tsv, locs-raw.csv or .tsv, he-raw.*, pixel-size-raw.txt, and
                radius-raw.txt if it is there, in a folder or after a prefix (data/P1- reads
                data/P1-cnts.tsv), as the tools of this family have them
Writes  the files of a sample, see sample.py; look at check.png before you go on.

Raw counts are taken from X, else from a layer, else from raw: from the first that holds nothing but
whole numbers. Normalised or log-transformed values are refused: counts cannot be got back.

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
from reading import cli

SCRIPT = "prepare/scverse.py"


def build_parser() -> cli.Parser:
    parser = options.prepare_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--h5ad", type=Path, help="AnnData with obsm['spatial'].")
    source.add_argument("--spatialdata", type=Path, metavar="ZARR", help="SpatialData store.")
    source.add_argument("--tables", metavar="PREFIX", help="Folder of plain tables, or a prefix.")
    parser.add_argument(
        "--image", type=Path, help="The full-resolution image (default: that of the source)."
    )
    for option, what in (
        ("--layer", "Layer of AnnData that holds the raw counts (default: what holds counts)"),
        ("--library", "Section of the .h5ad (default: the only one)"),
        ("--table", "Table of the SpatialData store (default: the only one)"),
        ("--shapes", "Shapes of the store (default: the only ones)"),
        ("--image-element", "Image of the store (default: the only one)"),
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

import struct
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import sparse

from method.grid import lattice_pitch
from prepare import images, sample, scans, section, tenx
from prepare.annotated import (
    Annotated,
    describe,
    find_counts,
    gene_names,
    import_zarr,
    keys_of,
    open_anndata,
    read_array,
    whole_counts,
)  # fmt: skip

LIBRARIES = ("library_id", "library", "sample_id", "sample", "batch", "region")  # in obs
ARRAY = ("array_row", "array_col")  # in obs: the place of a spot on Visium's array
TRUE = {"1", "1.0", "True", "true"}
LOCS_NAMES = ("locs-raw.csv", "locs-raw.tsv", "locs-raw.csv.gz", "locs-raw.tsv.gz")
WHOLE_IMAGE = "Give the full-resolution image by --image."
OTHER_IMAGE = (
    "Give the full-resolution image that Space Ranger was given. If you know that the coordinates "
    "refer to your image, add its --pixel-size."
)
POINT = 1  # type of a geometry in WKB


@dataclass
class SourceSpots:
    """What every source gives: counts (N, G) and the places of the spots, px of the image."""

    counts: sparse.csr_array
    ids: list[str]
    genes: list[str]
    places: pd.DataFrame  # index: ids; x, y; array_row, array_col if known
    in_tissue: np.ndarray  # bool (N,)
    notes: list[str] = field(default_factory=list)
    copies: tenx.SmallerCopies = field(default_factory=lambda: tenx.SmallerCopies({}, None))
    pixel_size_um: float | None = None
    radius_um: float | None = None
    image: Path | ZarrSlide | None = None  # of the source itself
    files: list[Path] = field(default_factory=list)  # read, beside the image; for the record


# -------------------------------------------------------------------------------------------------
# AnnData
# -------------------------------------------------------------------------------------------------
def choose_library(data: Annotated, library: str | None) -> tuple[np.ndarray, str | None]:
    """Rows of one section, where an object holds several; and its name in uns["spatial"]."""
    rows = np.arange(len(data.ids))
    libraries = keys_of(data.root, "uns/spatial")
    if library is None and len(libraries) > 1:
        raise utils.StageError(
            f"{data.path} holds the sections {utils.some(libraries)}.",
            "Choose one: run the same command with --library NAME.",
        )
    if library is None:
        return rows, libraries[0] if libraries else None
    obs = data.columns("obs", LIBRARIES)
    for column in obs:
        if (chosen := (obs[column] == library).to_numpy()).any():
            return rows[chosen], library
    if libraries == [library]:
        return rows, library
    known = {column: sorted(obs[column].unique()) for column in obs}
    raise utils.StageError(
        f"{data.path} has no section {library!r}, but {known or utils.some(libraries) or 'one'}.",
        f"Give one that a column of obs ({', '.join(LIBRARIES)}) names.",
    )


def spots_of(data: Annotated, rows: np.ndarray, xy: np.ndarray, layer: str | None) -> SourceSpots:
    """Spots from rows (N,) of AnnData and their places (N, 2), x and y."""
    matrix, var, place = find_counts(data, layer)
    genes, columns, notes = gene_names(data, var)
    obs = data.columns("obs", ("in_tissue", *ARRAY)).iloc[rows]
    ids = obs.index.tolist()
    places = pd.DataFrame(xy, index=ids, columns=["x", "y"])
    if set(ARRAY) <= set(obs):
        places[list(ARRAY)] = obs[list(ARRAY)].apply(pd.to_numeric).to_numpy(float)
    in_tissue = np.ones(len(ids), bool)
    if "in_tissue" in obs:
        in_tissue = obs["in_tissue"].isin(TRUE).to_numpy()
    notes = [f"the counts are those of {place}", *notes]
    return SourceSpots(matrix[rows][:, columns], ids, genes, places, in_tissue, notes)


def read_h5ad(args: argparse.Namespace) -> SourceSpots:
    with open_anndata(args.h5ad) as data:
        rows, library = choose_library(data, args.library)
        known = keys_of(data.root, "obsm")
        if "spatial" not in known:
            raise utils.StageError(
                f"{data.path} has no obsm['spatial'], only {utils.some(known) or 'nothing'}.",
                "Keep the spots' x and y (px of the full-resolution image) in obsm['spatial'].",
            )
        xy = read_array(data.root["obsm/spatial"])[rows]
        if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy[:, :2].astype(float)).all():
            raise utils.StageError(
                f"{data.path}: obsm['spatial'] {xy.shape} holds what is no number, or not x and y.",
                "Mend it, then run the same command.",
            )
        spots = spots_of(data, rows, xy[:, :2].astype(float), args.layer)
        spots.files = [args.h5ad]
        factors = f"uns/spatial/{library}/scalefactors"
        there = keys_of(data.root, factors)
        for name in (name for name in tenx.SCALES if name in there):
            spots.copies.scales[name] = float(read_array(data.root[f"{factors}/{name}"]))
        copies = f"uns/spatial/{library}/images"
        if "hires" in keys_of(data.root, copies):
            spots.copies.hires_size = data.root[f"{copies}/hires"].shape[1::-1]
    return spots


# -------------------------------------------------------------------------------------------------
# SpatialData
# -------------------------------------------------------------------------------------------------
class ZarrSlide(scans.Slide):
    """A multiscale raster (c, y, x) of a SpatialData store."""

    def __init__(self, path: Path) -> None:
        zarr = import_zarr()
        group = zarr.open_group(path, mode="r")
        self.attributes = image_attributes(group.attrs.asdict(), path)
        names = [d["path"] for d in self.attributes["datasets"]]
        axes = "".join(axis["name"] for axis in self.attributes["axes"])
        self.arrays = [group[name] for name in names]
        first = self.arrays[0]
        if axes != "cyx" or first.shape[0] not in (3, 4) or first.dtype != np.uint8:
            raise utils.StageError(
                f"{path} holds {first.dtype} {first.shape} ({axes}); expected an H&E image, uint8, "
                f"3 channels (cyx).",
                WHOLE_IMAGE,
            )
        super().__init__(path, [array.shape[:0:-1] for array in self.arrays], None)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        part = self.arrays[level][:, y : y + height, x : x + width]
        return scans.opaque_rgb(np.ascontiguousarray(np.moveaxis(np.asarray(part), 0, 2)))


def image_attributes(attributes: dict, path: Path) -> dict:
    """The first multiscale of an image group, of either version of the format."""
    try:
        return attributes.get("ome", attributes)["multiscales"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise utils.broken(path, "is no multiscale image.") from error


def matrix_of(transform: dict, path: Path) -> np.ndarray:
    """3 x 3 in x, y of one of the format's transforms, whose own axes may be in any order."""
    kind = transform.get("type")
    source, target = ([a["name"] for a in transform[k]["axes"]] for k in ("input", "output"))
    matrix = np.eye(3)
    if kind == "identity":
        return matrix
    if kind == "sequence":
        for step in transform["transformations"]:
            matrix = (
                matrix_of({**{k: transform[k] for k in ("input", "output")}, **step}, path) @ matrix
            )
        return matrix
    if kind in ("scale", "translation"):
        for i, axis in enumerate("xy"):
            value = transform[kind][source.index(axis)]
            matrix[(i, i) if kind == "scale" else (i, 2)] = value
        return matrix
    if kind == "affine":
        affine = np.array(transform["affine"], float)
        columns = [source.index("x"), source.index("y"), -1]
        matrix[:2] = affine[[target.index("x"), target.index("y")]][:, columns]
        return matrix
    raise utils.StageError(
        f"{path} has a transform of type {kind!r}; understood are scale, translation, affine, "
        f"sequence.",
        "Transform the elements to the full-resolution pixels with spatialdata, write them again.",
    )


def transforms(listed: list[dict], path: Path) -> dict[str, np.ndarray]:
    """Coordinate system -> 3 x 3 that leads into it, in x, y."""
    try:
        return {t["output"]["name"]: matrix_of(t, path) for t in listed}
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise utils.broken(path, f"has transforms that cannot be read: {error!r}") from error


def elements(store: Path, kind: str) -> list[str]:
    folder = store / kind
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def choose_element(store: Path, kind: str, name: str | None, option: str) -> Path:
    """The element of that name, or the only one of its kind."""
    there = elements(store, kind)
    if name is None and len(there) == 1:
        return store / kind / there[0]
    if name in there:
        return store / kind / name
    found = f"has no {kind}" if not there else f"has the {kind} {utils.some(there)}"
    raise utils.StageError(
        f"{store} {found}; wanted {'one' if name is None else repr(name)}.",
        f"Choose by {option} NAME." if there else "Give the store of a Visium section.",
    )


def read_circles(path: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Centres (index: instance; x, y) of a shapes element, and its transforms."""
    zarr = import_zarr()
    try:
        attributes = zarr.open_group(path, mode="r").attrs.asdict()
        table = pd.read_parquet(path / "shapes.parquet")
        centres = [read_point(shape) for shape in table["geometry"]]
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise utils.broken(
            path, f"holds no circles (points with a radius) that can be read: {error}"
        ) from error
    frame = pd.DataFrame(centres, index=table.index.astype(str), columns=["x", "y"])
    return frame, transforms(attributes.get("coordinateTransformations", []), path)


def read_point(geometry: bytes) -> tuple[float, float]:
    """x, y of a point in well-known binary."""
    order = "<" if geometry[0] == 1 else ">"
    (kind,) = struct.unpack(f"{order}I", geometry[1:5])
    if kind % 1000 != POINT:
        raise ValueError(f"a shape of type {kind}, not a point")
    return struct.unpack(f"{order}dd", geometry[5:21])


def read_spatialdata(args: argparse.Namespace) -> SourceSpots:
    """Spots in px of the image of the store, or of that of --image."""
    store = args.spatialdata
    if not store.is_dir():
        raise utils.StageError(f"{store} is no folder.", "Give the .zarr folder of SpatialData.")
    table_path = choose_element(store, "tables", args.table, "--table")
    with open_anndata(table_path) as data:
        return read_store(args, data)


def read_store(args: argparse.Namespace, data: Annotated) -> SourceSpots:
    store, table_path = args.spatialdata, data.path
    try:
        link = data.root["uns/spatialdata_attrs"]
        keys = [str(read_array(link[name])) for name in ("region_key", "instance_key")]
        obs = data.columns("obs", tuple(keys))
        regions, instances = (obs[key] for key in keys)
    except KeyError as error:
        raise utils.broken(
            table_path, f"does not say which shapes it is of: no {error}."
        ) from error
    chosen = args.shapes
    if chosen is None:
        there = [r for r in elements(store, "shapes") if r in set(regions)]
        if len(there) != 1:
            raise utils.StageError(
                f"{table_path} is of the shapes {utils.some(regions.unique())}.",
                "Choose one by --shapes NAME.",
            )
        chosen = there[0]
    path = choose_element(store, "shapes", chosen, "--shapes")
    circles, into = read_circles(path)
    rows = np.flatnonzero(regions == path.name)
    wanted = instances.iloc[rows]
    missing = [i for i in wanted if i not in circles.index]
    if missing or not len(wanted):
        raise utils.broken(
            path,
            f"lacks {len(missing)} of {len(wanted)} spots of the table: {utils.some(missing)}.",
        )
    xy = circles.loc[wanted].to_numpy(float)
    slide = None
    if args.image is None:
        slide = ZarrSlide(choose_element(store, "images", args.image_element, "--image-element"))
        xy = move_to_image(xy, into, slide)
    spots = spots_of(data, rows, xy, args.layer)
    spots.image, spots.files = slide, [table_path, path]
    return spots


def move_to_image(xy: np.ndarray, into: dict[str, np.ndarray], slide: ZarrSlide) -> np.ndarray:
    """Points (N, 2) of shapes in px of an image, by way of a coordinate system of both."""
    out = transforms(slide.attributes.get("coordinateTransformations", []), slide.path)
    both = [name for name in ("global", *out) if name in out and name in into]
    if not both:
        raise utils.StageError(
            f"{slide.path} is in {utils.some(out)}, the spots are in {utils.some(into)}: no "
            f"coordinate system in common.",
            WHOLE_IMAGE,
        )
    matrix = np.linalg.inv(out[both[0]]) @ into[both[0]]
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


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
    content = path.read_text(encoding="utf-8-sig").strip()
    if not utils.is_number(content) or not float(content) > 0:
        raise utils.broken(path, f"holds {content[:40]!r}; expected one number above zero.")
    return float(content)


def read_tables(args: argparse.Namespace) -> SourceSpots:
    prefix = args.tables
    counts_path = need_plain(prefix, utils.CNTS.names, "counts")
    locs_path = need_plain(prefix, LOCS_NAMES, "places of the spots")
    image = args.image or need_plain(prefix, utils.HE_RAW.names, "image")
    counts = section.read_spot_table(counts_path)
    locs = section.read_spot_table(locs_path, ["x", "y"])
    if not whole_counts(counts.to_numpy()):
        raise utils.StageError(
            f"{counts_path} holds fractions or negative numbers"
            f"{describe(counts.to_numpy(), 'it')}; expected raw counts.",
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
def pixel_size(args: argparse.Namespace, spots: SourceSpots, path: Path) -> float:
    """um per px of the image: as given, by the array, or by the distances of nearest spots."""
    known = args.pixel_size or spots.pixel_size_um
    if known is not None:
        return known
    if "array_row" in spots.places and args.pitch_um == utils.VISIUM_PITCH_UM:
        return tenx.fit_visium_array(spots.places, path).pixel_size_um
    return args.pitch_um / lattice_pitch(spots.places[["x", "y"]].to_numpy())


def prepare(args: argparse.Namespace) -> section.PreparedSection:
    source = args.h5ad or args.spatialdata or Path(args.tables)
    read = read_h5ad if args.h5ad else read_spatialdata if args.spatialdata else read_tables
    spots = read(args)
    given = args.image or spots.image
    if given is None:
        raise utils.StageError(
            f"{source} comes without the full-resolution image, only smaller copies.", WHOLE_IMAGE
        )
    if not spots.in_tissue.any():
        raise utils.StageError(f"{source} has no spot in tissue.", "See its column in_tissue.")
    size = pixel_size(args, spots, source)
    places = spots.places[["x", "y"]]
    inside = places[spots.in_tissue]
    notes = []
    if isinstance(given, Path):
        trusted = "--pixel-size is given" if args.pixel_size else None
        notes = spots.copies.check_size(given, trusted, OTHER_IMAGE)
        notes += images.check_metadata(given, size, bool(trusted), f"--pixel-size {size:.4g}")
        image, locs, size = images.place_image(given, inside, size, args.crop_um, args.downsample)
    else:
        image = images.place_slide(given, inside, size, args.crop_um, args.downsample)
        locs, size = images.move(inside, image), size * image.downsample
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
        facts={"source": str(source)},
    )


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
