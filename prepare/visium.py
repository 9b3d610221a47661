"""Turn the outs folder of Space Ranger (10x Visium) and its full-resolution image into a sample.

    python prepare/visium.py --outs OUTS --image FULLRES --directory DIR

Reads   OUTS/filtered_feature_bc_matrix.h5, or the folder of that name (matrix.mtx and its tables)
        OUTS/spatial/tissue_positions*.csv or .parquet, of Space Ranger 1 to 4
        OUTS/spatial/scalefactors_json.json, tissue_hires_image.png   to recognise the image
        FULLRES   the microscope image that Space Ranger was given: all coordinates refer to it
Writes  the files of a sample, see sample.py; look at check.png before you go on.

The pixel size is fitted to the array: neighbours are 100 um apart, rows 86.6 um. Space Ranger's
spot_diameter_fullres is not used: it stands for 65 um, while the printed spots measure 55 um.

Positions. Space Ranger 1 writes no header, later versions do; the content decides, not the name.
Its columns are barcode, in_tissue, array_row, array_col, pxl_row (y), pxl_col (x): row first.

CytAssist. The slide is imaged twice. Coordinates refer to the microscope image (--image of Space
Ranger), not to spatial/cytassist_image.tiff, unless that was the only one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import common, images, sample, tenx

MATRIX = "filtered_feature_bc_matrix"
POSITIONS = (  # the newest layout first
    "tissue_positions.csv", "tissue_positions.csv.gz", "tissue_positions.parquet",
    "tissue_positions_list.csv", "tissue_positions_list.csv.gz", "tissue_positions_list.txt",
)  # fmt: skip
COLUMNS = (
    "barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres",
)  # fmt: skip
HIRES_IMAGE, SCALE_FACTORS = "tissue_hires_image.png", "scalefactors_json.json"
CYTASSIST_IMAGE = "cytassist_image.tiff"
SCALES, MICRONS = ("tissue_hires_scalef", "tissue_lowres_scalef"), "microns_per_pixel"

COLUMN_UM = common.VISIUM_PITCH_UM / 2  # array_col counts half pitches: neighbours are 2 apart
ROW_UM = common.VISIUM_PITCH_UM * np.sqrt(3) / 2
MAX_SKEW = 0.05  # of a fitted array: relative difference of its scales, cosine of its angle
MAX_RESIDUAL_UM = 20.0  # of a position from the fitted array, root mean square
MAX_STRANGERS = 0.05  # share of the filtered barcodes without tissue: else from another section
SIZE_TOLERANCE_PX = 1.5  # of the hires image, whose sides Space Ranger rounds
SAME_SHAPE = 0.003  # relative difference of the sides' ratio, of a copy at another scale
SPACE_RANGER = "Give --outs the outs folder that Space Ranger wrote (with its folder spatial)."


# -------------------------------------------------------------------------------------------------
# the outs folder
# -------------------------------------------------------------------------------------------------
@dataclass
class Spatial:
    """The folder spatial: what says how positions and image fit together."""

    folder: Path
    scales: dict[str, float]  # tissue_hires_scalef, ...: px of the copy per px of full resolution
    hires_size: tuple[int, int] | None  # width, height of tissue_hires_image.png
    microns_per_pixel: float | None = None  # of full resolution; Visium HD only

    def files(self) -> list[Path]:
        return [
            self.folder / n for n in (SCALE_FACTORS, HIRES_IMAGE) if (self.folder / n).is_file()
        ]

    @property
    def full_size(self) -> tuple[float, float] | None:
        """Width and height of the image that Space Ranger was given, by its hires copy."""
        scale = self.scales.get("tissue_hires_scalef")
        if self.hires_size is None or not scale:
            return None
        return self.hires_size[0] / scale, self.hires_size[1] / scale


def find_outs(path: Path) -> Path:
    """The outs folder itself, or the one within the folder of a run."""
    for folder in (path, path / "outs"):
        if (folder / "spatial").is_dir():
            return folder
        if (folder / "binned_outputs").is_dir():
            raise utils.StageError(
                f"{folder} holds binned_outputs: it is of Visium HD.",
                f"Run: python prepare/visium_hd.py --outs {folder} --image FULLRES --directory DIR",
            )
    found = "has no folder spatial" if path.is_dir() else "is no folder"
    raise utils.StageError(
        f"{path} {found}.", f"{SPACE_RANGER} Downloads hold it as spatial.tar.gz: unpack it there."
    )


def find_matrix(outs: Path) -> Path:
    """The filtered matrix, .h5 or folder; downloads have the sample's name in front of it."""
    found = sorted(
        [*outs.glob(f"*{MATRIX}.h5"), *(f for f in outs.glob(f"*{MATRIX}") if f.is_dir())]
    )
    if not found:
        raise utils.StageError(f"{outs} has no {MATRIX}.h5 and no folder {MATRIX}.", SPACE_RANGER)
    plain = [path for path in found if path.suffix == ".h5"] or found
    if len(plain) > 1:
        raise utils.StageError(
            f"{outs} has {len(plain)} matrices: {utils.some([p.name for p in plain])}.",
            "Leave the one of this section there.",
        )
    return plain[0]


def read_matrix(path: Path) -> tuple[sparse.csr_array, list[str], pd.DataFrame]:
    return tenx.read_10x_mtx(path) if path.is_dir() else tenx.read_10x_h5(path)


def find_positions(folder: Path) -> Path:
    for name in POSITIONS:
        if (folder / name).is_file():
            return folder / name
    raise utils.StageError(f"{folder} has none of {', '.join(POSITIONS)}.", SPACE_RANGER)


def read_positions(path: Path) -> pd.DataFrame:
    """Index barcode; in_tissue (bool), array_row, array_col, x, y (px of full resolution)."""
    try:
        table = read_table(path)
        numbers = table[list(COLUMNS[1:])].apply(pd.to_numeric).astype(float)
    except KeyError as error:
        raise common.broken(
            path, f"has the columns {utils.some(table.columns)}; expected {', '.join(COLUMNS)}."
        ) from error
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise common.broken(path, f"is no whole table of positions: {error}") from error
    if not np.isfinite(numbers.to_numpy()).all() or table.empty:
        raise common.broken(path, "holds empty cells or no spot at all.")
    if repeated := utils.duplicates(table["barcode"]):
        raise common.broken(path, f"lists the barcodes {utils.some(repeated)} more than once.")
    positions = numbers.set_axis(pd.Index(table["barcode"].astype(str), name=None))
    positions = positions.rename(columns={COLUMNS[4]: "y", COLUMNS[5]: "x"})
    return positions.assign(in_tissue=positions["in_tissue"] > 0)


def read_table(path: Path) -> pd.DataFrame:
    """A table of positions; whether it has a header, and whether it is Parquet, its bytes tell."""
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return pd.read_parquet(path)
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    first = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].str.strip()
    if "in_tissue" in first.tolist():
        table = pd.read_csv(path, **options)
        return table.rename(columns=str.strip)
    if len(first) != len(COLUMNS) or not first.iloc[1:].map(utils.is_number).all():
        raise ValueError(
            f"its first line is {','.join(first)[:80]!r}; expected {','.join(COLUMNS)}"
        )
    return pd.read_csv(path, header=None, names=list(COLUMNS), **options)


def read_spatial(folder: Path) -> Spatial:
    path = folder / SCALE_FACTORS
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
        said = {name: float(factors[name]) for name in (*SCALES, MICRONS) if name in factors}
    except FileNotFoundError:
        said = {}
    except (ValueError, OSError, TypeError) as error:
        raise common.broken(path, f"holds no scale factors: {error}") from error
    hires = folder / HIRES_IMAGE
    size = picture_size(hires) if hires.is_file() else None
    return Spatial(folder, {n: said[n] for n in SCALES if n in said}, size, said.get(MICRONS))


def picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise common.broken(path, f"is no image: {error}") from error


# -------------------------------------------------------------------------------------------------
# pixel size and image
# -------------------------------------------------------------------------------------------------
def fit_pixel_size(positions: pd.DataFrame, path: Path) -> tuple[float, float, bool]:
    """(um per px, degrees by which the array is turned, whether it is mirrored), from all
    positions of the array."""
    lattice = positions[["array_col", "array_row"]].to_numpy() * (COLUMN_UM, ROW_UM)
    xy = positions[["x", "y"]].to_numpy()
    origin, axes = common.fit_affine(lattice, xy)
    along_um = np.linalg.norm(axes, axis=1)  # px per um, along a row and along a column
    pixel_size = common.pixel_size_of(axes)
    residual = (origin + lattice @ axes - xy) * pixel_size
    rms = float(np.sqrt((residual**2).sum(1).mean()))
    skew = abs(axes[0] @ axes[1]) / along_um.prod()
    if abs(along_um[0] / along_um[1] - 1) > MAX_SKEW or skew > MAX_SKEW or rms > MAX_RESIDUAL_UM:
        pitches = along_um * common.VISIUM_PITCH_UM
        raise utils.StageError(
            f"{path} does not hold Visium's array: 100 um are {pitches[0]:.2f} px along its rows "
            f"and {pitches[1]:.2f} px across (expected the same), at "
            f"{np.degrees(np.arccos(skew)):.1f} degrees (expected 90), and positions are off by "
            f"{rms:.1f} um.",
            "See that its columns are " + ", ".join(COLUMNS) + " (row before column), and that it "
            "is of Visium with 100 um pitch.",
        )
    degrees = float(np.degrees(np.arctan2(axes[0, 1], axes[0, 0])))
    return pixel_size, degrees, bool(np.linalg.det(axes) < 0)


def check_full_resolution(
    path: Path, size: tuple[int, int], spatial: Spatial, trusted: bool = False
) -> list[str]:
    """Stop unless the image has the size that Space Ranger's hires copy says; notes otherwise.

    A ``trusted`` image only gets a note.
    """
    expected = spatial.full_size
    if expected is None:
        return [f"no {HIRES_IMAGE} or scale factor: the image's size could not be compared"]
    scale = spatial.scales["tissue_hires_scalef"]
    hires = np.array(spatial.hires_size)
    if np.abs(np.array(size) * scale - hires).max() <= SIZE_TOLERANCE_PX:
        return []
    sides = (
        f"{path} is {size[0]} x {size[1]} px, but Space Ranger was given an image of about "
        f"{expected[0]:.0f} x {expected[1]:.0f} px: its hires copy has {hires[0]} x {hires[1]} px "
        f"at tissue_hires_scalef {scale:.6g} ({hires[0]} / {scale:.6g} = {expected[0]:.0f})"
    )
    if trusted:
        return [f"{sides}; it is taken all the same, since --image-is says fullres"]
    raise utils.StageError(
        f"{sides}. {which_image(size, spatial)}",
        f"{full_resolution_advice(spatial)}. If you know that the coordinates refer to your image, "
        f"add --image-is fullres.",
    )


def which_image(size: tuple[int, int], spatial: Spatial) -> str:
    """What the wrong image probably is, from its size."""
    cytassist = spatial.folder / CYTASSIST_IMAGE
    if cytassist.is_file() and images.image_size(cytassist) == tuple(size):
        return f"It is as large as {CYTASSIST_IMAGE}, to which the coordinates do not refer."
    for name, scale in spatial.scales.items():
        if max(abs(n * scale - m) for n, m in zip(spatial.full_size, size, strict=True)) <= 2:
            return f"It is the copy of {name} = {scale:.6g}."
    ratios = np.array(size) / spatial.full_size
    if abs(ratios[0] / ratios[1] - 1) < SAME_SHAPE:
        return f"It is the same shape, scaled by {ratios[0]:.4g}: a smaller or larger export."
    turned = np.array(size)[::-1] / spatial.full_size
    if abs(turned[0] / turned[1] - 1) < SAME_SHAPE:
        return f"Turned by 90 degrees it has the same shape, scaled by {turned[0]:.4g}."
    return "It has another shape: a cropped or another image."


def full_resolution_advice(spatial: Spatial) -> str:
    return (
        "Give by --image the very file that Space Ranger had as --image (web_summary.html and "
        "_cmdline name it). If it is lost, take the coarse copy: --image "
        f"{spatial.folder / HIRES_IMAGE} --image-is hires"
    )


@dataclass
class Placed:
    """The image as it is written, and how px of the full resolution become px of it."""

    image: Path | np.ndarray | images.Region
    pixel_size_um: float
    scale: float = 1.0
    left_top: tuple[int, int] = (0, 0)

    def move(self, xy: np.ndarray | pd.DataFrame) -> np.ndarray | pd.DataFrame:
        return (xy - np.array(self.left_top)) * self.scale


def place(
    args: argparse.Namespace, spots: pd.DataFrame, pixel_size: float, spatial: Spatial
) -> tuple[Placed, list[str]]:
    """The image of --image, after every check that its size allows, and notes."""
    if args.image is None:
        raise utils.StageError(missing_image(spatial, pixel_size), full_resolution_advice(spatial))
    size = images.image_size(args.image)
    if args.image_is == "hires":
        if args.crop_um is not None or args.downsample:
            raise utils.StageError(
                "--crop-um and --downsample cannot go with --image-is hires.", "Leave them out."
            )
        return place_hires(args.image, pixel_size, spatial)
    notes = check_full_resolution(args.image, size, spatial, args.image_is == "fullres")
    trusted = spatial.full_size is not None or args.image_is == "fullres"  # else never compared
    notes += images.check_metadata(args.image, pixel_size, trusted, "--image-is fullres")
    image, _, written_um = images.place_image(
        args.image, spots, pixel_size, args.crop_um, args.downsample
    )
    if isinstance(image, Path):
        return Placed(image, written_um), notes
    return Placed(image, written_um, 1 / image.downsample, (image.x, image.y)), notes


def place_hires(path: Path, pixel_size: float, spatial: Spatial) -> tuple[Placed, list[str]]:
    """Space Ranger's hires copy; enlarged by a whole factor where it is beyond 2.5 um."""
    scale = spatial.scales.get("tissue_hires_scalef")
    if not scale:
        raise utils.StageError(
            f"{spatial.folder / SCALE_FACTORS} has no tissue_hires_scalef, which --image-is hires "
            f"needs.",
            full_resolution_advice(spatial),
        )
    size = picture_size(path)
    if spatial.hires_size is not None and size != spatial.hires_size:
        raise utils.StageError(
            f"{path} is {size[0]} x {size[1]} px; --image-is hires expects Space Ranger's "
            f"{HIRES_IMAGE} of {spatial.hires_size[0]} x {spatial.hires_size[1]} px.",
            "Give that file, or the full-resolution image without --image-is.",
        )
    coarse = pixel_size / scale
    notes = [
        f"the hires copy is used: {pixel_size:.4g} / {scale:.6g} = {coarse:.4g} um per pixel, far "
        f"from the {utils.PIXEL_SIZE_UM} um of the method; its maps cannot show cells"
    ]
    factor = int(np.ceil(coarse / utils.MAX_PIXEL_SIZE_UM))
    if factor == 1:
        return Placed(path, coarse, scale), notes
    notes.append(
        f"enlarged {factor} times to {coarse / factor:.4g} um per pixel, since "
        f"{utils.CALIBRATION} takes up to {utils.MAX_PIXEL_SIZE_UM}; that adds no detail"
    )
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        large = rgb.resize((size[0] * factor, size[1] * factor), Image.Resampling.BICUBIC)
    return Placed(np.asarray(large), coarse / factor, scale * factor), notes


def missing_image(spatial: Spatial, pixel_size: float) -> str:
    known = spatial.full_size
    size = "" if known is None else f" of about {known[0]:.0f} x {known[1]:.0f} px"
    return (
        f"--image is missing: the coordinates refer to the full-resolution image{size} "
        f"({pixel_size:.4g} um per pixel) that Space Ranger was given; outs does not hold it."
    )


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


def prepare(args: argparse.Namespace) -> common.Section:
    outs = find_outs(args.outs)
    spatial = read_spatial(outs / "spatial")
    positions_path, matrix_path = find_positions(spatial.folder), find_matrix(outs)
    positions = read_positions(positions_path)
    pixel_size, degrees, mirrored = fit_pixel_size(positions, positions_path)
    places, in_tissue = positions[["x", "y"]], positions["in_tissue"]
    placed, notes = place(args, places[in_tissue], pixel_size, spatial)
    if (spatial.folder / CYTASSIST_IMAGE).is_file():
        notes.append("CytAssist run: coordinates refer to the microscope image, not to its own")
    elif mirrored:  # with CytAssist it is the rule
        notes.append(
            "the array is mirrored in the image: if the image was not, x and y of the positions "
            "are exchanged"
        )
    counts, barcodes, features = read_matrix(matrix_path)
    spots, joined = join_tissue(positions, barcodes, positions_path)
    genes = common.unique_symbols(features["name"].tolist(), features["id"].tolist())
    return common.Section(
        image=placed.image,
        pixel_size_um=placed.pixel_size_um,
        locs=placed.move(places.loc[spots]),
        counts=counts,
        spots=barcodes,
        genes=genes,
        gene_names=common.read_gene_list(args.genes, genes),
        radius_px=common.VISIUM_RADIUS_UM / placed.pixel_size_um,
        pitch_um=common.VISIUM_PITCH_UM,
        off_tissue=placed.move(places[~in_tissue]),
        array=placed.move(places),
        scales=spatial.scales,
        sources=[args.image, positions_path, *spatial.files(), *utils.files_in(matrix_path)],
        facts={
            "full_resolution_um_per_px": pixel_size,
            "array_turned_degrees": round(degrees, 3),
            "array_mirrored": mirrored,
        },
        notes=[*notes, *joined, *tenx.dropped_notes(features)],
    )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", type=Path, help="The full-resolution image that Space Ranger was given."
    )
    parser.add_argument(
        "--image-is",
        choices=("fullres", "hires"),
        help="hires: --image is Space Ranger's tissue_hires_image.png, much coarser. fullres: take "
        "the image even if its size is not that of the hires copy. Default: the sizes decide.",
    )
    images.add_image_options(parser)


def build_parser() -> argparse.ArgumentParser:
    parser = sample.build_parser(__doc__)
    parser.add_argument("--outs", type=Path, required=True, help="Folder outs of Space Ranger.")
    add_image_arguments(parser)
    return parser


def run(argv: list[str] | None = None) -> int:
    return sample.run(prepare, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
