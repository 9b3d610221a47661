"""Made-up sections of any size for benchmarks/scaling.py: a user's files, and what stages leave.

H&E with nuclei, fibres and noise, which costs a codec what a scan costs it; Poisson counts on
Visium's lattice; random tokens, with the record by which later stages accept them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import tifffile
from scipy.ndimage import gaussian_filter

import utils
from benchmarks.measure import script_command
from benchmarks.simulate_sections import lattice

GENES, FEATURES = 1_000, 1_024  # as many as HISTEX.py predicts by default, and as UNI has
RAW_PIXEL_UM = 0.25  # a scan at 40x
SCAN_TILE_PX, SCAN_QUALITY = 512, 90  # of a scanner's TIFF
TEXTURE_PX = 1024  # side of the texture that H&E is made of
EOSIN, HAEMATOXYLIN = (0.06, 0.55, 0.22), (0.65, 0.70, 0.29)  # optical density in R, G, B
GLASS = (243, 241, 244)
TISSUE_RADIUS = 0.47  # of the section's side, where glass surrounds it
TOKEN_POOL = 16_384  # different tokens of each kind


def textures(pixel_um: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tissue and bare glass, uint8 (TEXTURE_PX, TEXTURE_PX, 3), which repeat without a seam."""

    def field(scale_um: float) -> np.ndarray:
        noise = rng.standard_normal((TEXTURE_PX, TEXTURE_PX), np.float32)
        smooth = gaussian_filter(noise, scale_um / pixel_um, mode="wrap")
        return (smooth / smooth.std())[..., None]

    nuclei = 1 / (1 + np.exp(-8 * (field(2.2) - 1.1)))
    eosin = np.exp(0.35 * field(0.8) + 0.25 * field(12))
    density = eosin * EOSIN + nuclei * (1 + 0.2 * field(0.5)) * HAEMATOXYLIN
    grain = rng.normal(0, 1.5, (TEXTURE_PX, TEXTURE_PX, 3))
    tissue, glass = 245 * np.exp(-density) + 2 * grain, GLASS + grain
    return tissue.clip(0, 255).astype(np.uint8), glass.clip(0, 255).astype(np.uint8)


def in_tissue(row: np.ndarray, col: np.ndarray, side: float) -> np.ndarray:
    return np.hypot(row - side / 2, col - side / 2) < TISSUE_RADIUS * side


def scan_tiles(side: int, pixel_um: float, glass: bool) -> Iterator[np.ndarray]:
    """Pixels, uint8 (tile, tile, 3), of all tiles of a square H&E image, row by row."""
    rng = np.random.default_rng(0)
    tissue, bare = textures(pixel_um, rng)
    steps = np.arange(SCAN_TILE_PX)
    for top in range(0, side, SCAN_TILE_PX):
        for left in range(0, side, SCAN_TILE_PX):
            starts = rng.integers(TEXTURE_PX, size=2)
            shifted = np.ix_(*((steps + start) % TEXTURE_PX for start in starts))
            pixels = tissue[shifted]
            if glass:
                inside = in_tissue((top + steps)[:, None], left + steps, side)
                pixels = np.where(inside[..., None], pixels, bare[shifted])
            yield pixels


def spot_places(side_um: float) -> np.ndarray:
    """Places (N, 2), x and y in um, of Visium's spots on a square section, row by row."""
    pitch = utils.VISIUM_PITCH_UM
    xy = pitch / 2 + lattice(0, math.ceil(1.2 * side_um / pitch), pitch)
    return xy[(xy <= side_um - pitch / 2).all(1)]


def side_for(spots: int) -> int:
    """Superpixels, in whole tiles, of the side of a square section that has room for the spots."""
    side_um = math.sqrt(spots * utils.VISIUM_PITCH_UM**2 * math.sqrt(3) / 2)
    tiles = (side_um + 2 * utils.VISIUM_PITCH_UM) / utils.SUPERPIXEL_UM / utils.TOKENS_PER_TILE
    return math.ceil(tiles) * utils.TOKENS_PER_TILE


def write_section(
    folder: Path,
    side: int,
    pixel_um: float = utils.PIXEL_SIZE_UM,
    genes: int = GENES,
    spots: int | None = None,
    glass: bool = False,
) -> None:
    """All that a user brings, of a square section of ``side`` px; at most so many spots.

    All of it is tissue, or, with ``glass``, a disc that glass surrounds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        folder / "he-raw.tif", scan_tiles(side, pixel_um, glass), shape=(side, side, 3),
        dtype=np.uint8, tile=(SCAN_TILE_PX, SCAN_TILE_PX), photometric="rgb", compression="jpeg",
        compressionargs={"level": SCAN_QUALITY},
    )  # fmt: skip
    (folder / utils.PIXEL_SIZE_RAW.name).write_text(f"{pixel_um}\n")
    (folder / utils.RADIUS_RAW.name).write_text(f"{utils.VISIUM_RADIUS_UM / pixel_um}\n")
    xy = spot_places(side * pixel_um) / pixel_um
    xy = xy[in_tissue(xy[:, 1], xy[:, 0], side)] if glass else xy[:spots]
    names = [f"spot{i:05d}" for i in range(len(xy))]
    pd.DataFrame(xy, names, ["x", "y"]).to_csv(folder / utils.LOCS_RAW.name)
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(1.0, 3.0, genes), (len(xy), genes))
    pd.DataFrame(counts, names, [f"GENE{i}" for i in range(genes)]).to_csv(folder / "cnts.csv")


def write_whole_section(folder: Path, mm: float) -> None:
    write_section(folder, round(mm * 1000 / RAW_PIXEL_UM), RAW_PIXEL_UM, glass=True)


def run_stage(script: str, folder: Path) -> None:
    subprocess.run(script_command(script, folder), check=True, stdout=subprocess.DEVNULL)


def write_extracted(folder: Path, side: int, tissue: np.ndarray) -> None:
    """What Histology_Extractor.py leaves; tokens and colours tell ``tissue`` (side, side) apart."""
    rng = np.random.default_rng(2)
    pool = rng.standard_normal((2 * TOKEN_POOL, FEATURES), np.float32)
    pool[TOKEN_POOL:] += rng.standard_normal(FEATURES, np.float32)  # those of tissue
    pool = pool.astype(np.float16)
    args = argparse.Namespace(directory=folder, force=False, allow_stale=False)
    with contextlib.redirect_stdout(io.StringIO()):
        stage = utils.Stage(utils.EXTRACTOR, args)
        stage.require(utils.HE)
        with stage.writing(utils.FEATURES) as path:
            tokens = np.lib.format.open_memmap(path, "w+", np.float16, (side, side, FEATURES))
            for row, inside in enumerate(tissue):
                tokens[row] = pool[rng.integers(TOKEN_POOL, size=side) + TOKEN_POOL * inside]
            tokens.flush()
        with stage.writing(utils.RGB) as path:
            noise = rng.standard_normal((side, side, 3), np.float32)
            colours = np.where(tissue[..., None], (205, 140, 180) + 14 * noise, GLASS + noise)
            np.save(path, colours.clip(0, 255).astype(np.uint8))
        stage.finish()


# --------------------------------------------------------------------------------------------------
# the inputs of each stage
# --------------------------------------------------------------------------------------------------
def make_scan(folder: Path, side: int) -> None:
    write_section(folder, side, RAW_PIXEL_UM, genes=1)


def make_spots(folder: Path, spots: int) -> None:
    write_section(folder, side_for(spots) * utils.TOKEN_PX, spots=spots)
    run_stage(utils.CALIBRATION, folder)


def make_image(folder: Path, side: int) -> None:
    write_section(folder, side, genes=1)
    run_stage(utils.CALIBRATION, folder)


def make_features(folder: Path, side: int) -> None:
    write_section(folder, side * utils.TOKEN_PX, genes=1, glass=True)
    run_stage(utils.CALIBRATION, folder)
    steps = np.arange(side)
    write_extracted(folder, side, in_tissue(steps[:, None], steps, side))


def make_map(folder: Path, side: int, spots: int | None = None) -> None:
    """All inputs of HISTEX.py, everything tissue."""
    write_section(folder, side * utils.TOKEN_PX, spots=spots)
    run_stage(utils.CALIBRATION, folder)
    write_extracted(folder, side, np.ones((side, side), bool))
    cv2.imwrite(str(folder / utils.MASK.name), np.full((side, side), 255, np.uint8))
    run_stage(utils.HIGH_RESOLUTION, folder)


def make_training(folder: Path, spots: int) -> None:
    make_map(folder, side_for(spots), spots)
