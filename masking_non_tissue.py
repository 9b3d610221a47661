"""Separate tissue from bare slide: write a mask of the tissue, and a picture to check it.

    python masking_non_tissue.py --directory data/section

Reads   Histology_feature_map.npy, Histology_rgb.npy; he.jpg and, but for --no-spots, locs.csv for
        the picture
Writes  mask.png           8 bit (rows, columns), 255 tissue, 0 bare slide, a pixel per superpixel
        mask-overlay.png   the outline on the H&E, with the spots: look at it

The mask is yours to edit in any painting program: whatever is not black counts as tissue. HISTEX.py
uses the edit, and this script replaces neither an edited mask nor one that you brought, unless
--force is given.

Bare slide is pale and, above all, smooth, also where a stain haze or the printed dots of an array
tint it; tissue is textured, also where it is pale. Superpixels for which both signs agree are the
seeds; a linear discriminant on the tokens, fitted to the seeds of this very section, decides the
others. Specks of tissue and pinholes below a size limit are removed.

Departures from the published method: it clusters the tokens in two and takes the cluster with more
spots, trims 16 superpixels along the borders and drops pieces under 0.256 mm2. That cuts a section
that fills the image in half, and loses small pieces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import utils
from reading import cli

SCRIPT = utils.MASKING


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    parser.add_argument(
        "--seed",
        type=cli.not_negative,
        default=0,
        help="Random seed: another one may move the border of the tissue a little.",
    )
    cli.add_no_spots(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter
from skimage.morphology import remove_small_holes, remove_small_objects

from reading import arrays, images, tables

# Optical density is -log(colour / white), mean over R, G, B. Measured on three scans (legacy ST,
# Visium HD, rendered Xenium): bare slide 0.00-0.08, with texture (see below) under 0.008, also with
# a haze; tissue 0.15-1.1, with texture over 0.05, also where it is pale; fat, drawn, 0.014-0.10.
PALE_OD = 0.12
TEXTURE_WINDOW = 7  # superpixels (56 um): wider than a gap between nuclei, narrower than a vessel
SMOOTH_TEXTURE, ROUGH_TEXTURE = 0.01, 0.015
WHITE_PERCENTILE = 99.0  # of the superpixels, per channel
DARKEST_WHITE = 200  # a section without bare slide shows no white; no scanner's is darker
RIDGE = 1e-2  # per seed, on standardised tokens: neighbouring features are nearly collinear
MAX_SEEDS = 50_000  # a discriminant needs no more, and a slide has millions
ROW_BLOCK = 8  # rows of superpixels classified at a time, which bounds the memory
MIN_SPECK_MM2 = 0.02  # about 160 um across: ten cells wide, smaller than a core biopsy
MIN_HOLE_MM2 = 0.01  # lumina of vessels and ducts above this are left out
OVERLAY_PX = 1600  # longest side of the picture
IN_COLOUR, OUT_COLOUR, OUTLINE_COLOUR = (0, 158, 115), (213, 94, 0), (0, 114, 178)  # Okabe-Ito


def superpixels(area_mm2: float) -> int:
    return int(area_mm2 / (utils.SUPERPIXEL_UM / 1000) ** 2)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Mean optical density (rows, columns) of colours (rows, columns, 3), uint8."""
    white = np.percentile(rgb.reshape(-1, 3), WHITE_PERCENTILE, axis=0)
    white = np.maximum(white, DARKEST_WHITE).astype(np.float32)
    ratio = (rgb.astype(np.float32) + 1) / (white + 1)
    return -np.log(np.minimum(ratio, 1)).mean(axis=-1)


def local_texture(density: np.ndarray) -> np.ndarray:
    """Standard deviation of the optical density in a window around every superpixel."""
    mean = uniform_filter(density, TEXTURE_WINDOW)
    square = uniform_filter(density * density, TEXTURE_WINDOW)
    return np.sqrt(np.maximum(square - mean * mean, 0))


def find_seeds(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the superpixels that are surely tissue and surely bare slide."""
    density = optical_density(rgb)
    texture = local_texture(density)
    bare = (density < PALE_OD) & (texture < SMOOTH_TEXTURE)
    bare = remove_small_objects(bare, max_size=superpixels(MIN_HOLE_MM2))  # fat cells are smaller
    # Bare slide beside tissue has texture from its neighbour, but is smooth on the other side;
    # loose stroma is as pale, but rough all around.
    rough_around = minimum_filter(texture, TEXTURE_WINDOW) > ROUGH_TEXTURE
    tissue = ((texture > ROUGH_TEXTURE) & (density > PALE_OD)) | rough_around
    # The window takes half its width off every bare area; give back what is pale there.
    beside = maximum_filter(bare, TEXTURE_WINDOW) & (density < PALE_OD) & ~rough_around
    return tissue, bare | beside


def fit_discriminant(tokens: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (F,) and threshold of a linear discriminant, both classes weighted equally.

    tokens (S, F), tissue (S,) bool; a token is tissue if tokens @ weights > threshold.
    """
    scale = tokens.std(axis=0) + 1e-6
    means = np.stack([tokens[~tissue].mean(axis=0), tokens[tissue].mean(axis=0)])
    scatter = np.zeros((len(scale), len(scale)), np.float32)
    for of_class, mean in ((tissue, means[1]), (~tissue, means[0])):
        centred = tokens[of_class]
        centred -= mean
        centred /= scale
        scatter += centred.T @ centred / len(centred)
    scatter[np.diag_indices_from(scatter)] += RIDGE
    weights = np.linalg.solve(scatter, (means[1] - means[0]) / scale) / scale
    return weights, float(means.mean(axis=0) @ weights)


def blocks_of_rows(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The map in parts, each with the number of its first row: it may be larger than the memory."""
    for start in range(0, len(tokens), ROW_BLOCK):
        yield start, arrays.some_rows(tokens, start, start + ROW_BLOCK)


def classify(tokens: np.ndarray, rgb: np.ndarray, seed: int) -> np.ndarray:
    """Tissue (rows, columns) bool before cleaning, from tokens (rows, columns, F) and colours."""
    tissue, bare = find_seeds(rgb)
    if not tissue.any() or not bare.any():
        return ~bare  # nothing to compare with: all that is not surely bare slide
    rng = np.random.default_rng(seed)
    drawn = np.zeros((2, *tissue.shape), bool)
    for sure, chosen in zip((tissue, bare), drawn, strict=True):
        places = np.flatnonzero(sure)
        chosen.flat[rng.permutation(places)[: MAX_SEEDS // 2]] = True
    examples, labels = [], []
    for start, block in blocks_of_rows(tokens):
        for of_class, chosen in zip(
            (True, False), drawn[:, start : start + len(block)], strict=True
        ):
            examples.append(block[chosen].astype(np.float32))
            labels.append(np.full(len(examples[-1]), of_class))
    weights, threshold = fit_discriminant(np.concatenate(examples), np.concatenate(labels))
    found = np.empty(tissue.shape, bool)
    for start, block in blocks_of_rows(tokens):
        found[start : start + len(block)] = block.astype(np.float32) @ weights > threshold
    return (found | tissue) & ~bare


def clean(mask: np.ndarray) -> np.ndarray:
    """Fill pinholes and remove specks; if all pieces are specks, keep the largest."""
    filled = remove_small_holes(mask, max_size=superpixels(MIN_HOLE_MM2))
    kept = remove_small_objects(filled, max_size=superpixels(MIN_SPECK_MM2))
    if kept.any() or not filled.any():
        return kept
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(filled.astype(np.uint8), connectivity=4)
    return pieces == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def spots_inside(mask: np.ndarray, locs: pd.DataFrame) -> np.ndarray:
    """Whether the superpixel under every spot centre is tissue, (N,) bool."""
    cells = np.floor(locs[["y", "x"]].to_numpy() / utils.TOKEN_PX).astype(int)
    on_map = ((cells >= 0) & (cells < mask.shape)).all(axis=1)
    inside = np.zeros(len(locs), bool)
    inside[on_map] = mask[tuple(cells[on_map].T)]
    return inside


def draw_overlay(picture: np.ndarray, mask: np.ndarray, locs: pd.DataFrame) -> np.ndarray:
    """The H&E (any size, 3) with the outline of the mask; spots are green in it, else orange."""
    picture = picture.copy()
    size = (picture.shape[1], picture.shape[0])
    scale = np.array(size) / (np.array(mask.shape[::-1]) * utils.TOKEN_PX)  # of x and y
    large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    picture[large == 0] = picture[large == 0] // 2 + 100  # veil what is left out
    outlines, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(picture, outlines, -1, OUTLINE_COLOUR, 2)
    for (x, y), inside in zip(
        locs[["x", "y"]].to_numpy() * scale, spots_inside(mask, locs), strict=True
    ):
        cv2.circle(picture, (round(x), round(y)), 3, IN_COLOUR if inside else OUT_COLOUR, -1)
    return picture


def find_tissue(stage: utils.Stage) -> np.ndarray:
    """The mask (h, w) bool, from tokens and colours."""
    stage.require(utils.FEATURES, utils.RGB)
    grid = images.grid_shape(stage)
    tokens = arrays.read_array(stage, utils.FEATURES, np.float16, (*grid, None))
    rgb = arrays.read_array(stage, utils.RGB, np.uint8, (*grid, 3))
    mask = clean(classify(tokens, np.asarray(rgb), stage.args.seed))
    if not mask.any():
        raise stage.error(
            stage.path(utils.HE),
            "shows no tissue: it is pale and smooth all over.",
            f"Look at it. If there is tissue, paint {utils.MASK.name} yourself: {mask.shape[1]} x "
            f"{mask.shape[0]} px, the tissue white on black, then go on with HISTEX.py.",
        )
    return mask


def main(stage: utils.Stage) -> None:
    stage.guard(utils.MASK, utils.MASK_OVERLAY)
    stage.require(utils.HE)
    locs = pd.DataFrame({"x": [], "y": []}, dtype=float)
    if not stage.args.no_spots:
        stage.require(utils.LOCS)
        locs = tables.read_locs(stage, stage.path(utils.LOCS))
    picture = images.thumbnail(stage, stage.path(utils.HE), OVERLAY_PX)
    if stage.kept_by_user(utils.MASK):
        stage.use(stage.path(utils.MASK))
        mask = images.read_mask(stage, images.grid_shape(stage))
    else:
        mask = find_tissue(stage)
    covered = float(spots_inside(mask, locs).mean()) if len(locs) else None
    under = "" if covered is None else f", under {covered:.1%} of {len(locs)} spots"
    print(f"tissue: {mask.mean():.1%} of the image{under}")
    if covered is not None and covered < 0.5:
        print(f"Fewer than half of the spots are on tissue: look at {utils.MASK_OVERLAY.name}.")
    elif mask.all():
        print("The whole image is tissue; if it has bare slide, edit the mask.")

    if not stage.kept_by_user(utils.MASK):
        with stage.writing(utils.MASK) as partial:
            Image.fromarray(mask.astype(np.uint8) * 255).save(partial)
    with stage.writing(utils.MASK_OVERLAY) as partial:
        Image.fromarray(draw_overlay(picture, mask, locs)).save(partial)
    stage.finish(
        tissue_share=round(float(mask.mean()), 4),
        spots_on_tissue=None if covered is None else round(covered, 4),
    )


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
