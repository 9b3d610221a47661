"""How the maps, the image and the colours are stored in the page of analysis/report.py.

A map is one byte a superpixel: 0 where it has no value, else a step between its lowest and its
highest value; sums take the mean of the map in each step. The bytes are replaced by their
difference to the mean of their left and their upper neighbour, which deflate packs better, and
stand in the page as base64.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import cv2
import numpy as np
import pyvips

import utils
from analysis import inputs
from analysis.page import PageContent, SpotCounts, script_json
from analysis.scores import rounded
from analysis.spots import on_tissue, score_totals, sum_discs

LEVELS = 255  # values that a byte holds beside 0, which is no tissue
FEWER_LEVELS = (127, 63, 31, 15, 7)  # in the page, of maps that are large and noisy
GENE_BYTES = 155_000  # of a gene in the page: 50 of them and the image are 12 MB at most
FAST, SMALL = 1, 6  # zlib's levels: of the many files beside the page, and of the page
SATURATED = 99.5  # percentile at which the colours end, as in cnts-super-plots/
JPEG_QUALITIES = (80, 70, 60)  # the first at which the image is small enough
IMAGE_BYTES, IMAGE_PX = 2_900_000, 4000  # of an image with sides of that many pixels
BLANK = 220  # a superpixel is taken for bare slide if its colours are brighter
COLOUR_MAPS = {
    "viridis": cv2.COLORMAP_VIRIDIS, "cividis": cv2.COLORMAP_CIVIDIS,
    "magma": cv2.COLORMAP_MAGMA, "inferno": cv2.COLORMAP_INFERNO,
}  # fmt: skip
PRINTED = "ink"  # the palette for paper: from white to dark blue
INK_LIGHTNESS, INK_COLOUR = (97.0, 22.0), (8.0, -38.0)  # CIE L* at both ends; a* and b* in between


# --------------------------------------------------------------------------------------------------
# maps
# --------------------------------------------------------------------------------------------------
def quantise(image: np.ndarray, levels: int = LEVELS) -> tuple[np.ndarray, float, float]:
    """A map (rows, columns) as uint8, 0 where it has no value; its lowest and highest value."""
    there = np.isfinite(image)
    codes = np.zeros(image.shape, np.uint8)
    if not there.any():
        return codes, 0.0, 0.0
    values = image[there].astype(np.float64)
    low, high = float(values.min()), float(values.max())
    codes[there] = 1 + np.rint((values - low) / (high - low or 1) * (levels - 1))
    return codes, low, high


def differences(codes: np.ndarray) -> np.ndarray:
    """Each byte (rows, columns) minus the mean of its left and upper neighbour, modulo 256."""
    wide = np.pad(codes, ((1, 0), (1, 0))).astype(np.uint16)
    return (codes - (wide[1:, :-1] + wide[:-1, 1:]) // 2).astype(np.uint8)


def encode(values: np.ndarray, effort: int = SMALL) -> str:
    """Bytes of an array, deflated, as text."""
    return base64.b64encode(zlib.compress(values.tobytes(), effort)).decode()


def pack(image: np.ndarray, effort: int = SMALL, most_bytes: float = math.inf) -> dict[str, Any]:
    """A map as the page's script unpacks it; in fewer steps if else it has more than most_bytes."""
    for levels in (LEVELS, *FEWER_LEVELS):
        codes, low, high = quantise(image, levels)
        text = encode(differences(codes), effort)
        if len(text) <= most_bytes:
            break
    shown, steps = image[np.isfinite(image)], codes[codes > 0]
    top = float(np.percentile(shown, SATURATED)) if len(shown) else 0.0
    ends = {"low": low, "high": high, "top": top if top > 0 else 1.0}
    n = np.bincount(steps, minlength=levels + 1)[1:]
    means = np.bincount(steps, shown, levels + 1)[1:] / np.maximum(n, 1)
    exact = [float(f"{mean:.6g}") for mean in means]
    return {"codes": text, "levels": levels, "means": exact, **ends}


def describe_gene(content: PageContent, gene: str, effort: int = SMALL) -> dict[str, Any]:
    """What the page needs to show a gene, in all steps that a byte holds."""
    image = read_map(content, content.files, gene)
    facts = {"name": gene} | pack(image, effort)
    if gene in content.spreads:
        facts["sd"] = pack(read_map(content, content.spreads, gene), effort)
    if content.spots is not None and gene in content.spots.column:
        facts["spots"] = compare_spots(content.spots, gene, image)
    return facts


def fit_into_page(content: PageContent, facts: dict[str, Any], beside: bool) -> dict[str, Any]:
    """A gene's facts as they stand in the page: what is too large, in fewer steps.

    If it may lie ``beside`` the page, too: a coarse map, and the names of what is only there.
    """
    if len(script_json(facts)) <= GENE_BYTES:
        return facts
    gene = facts["name"]
    small = pack(read_map(content, content.files, gene), SMALL, GENE_BYTES)
    if beside:
        coarse = ["finer steps"] if small["levels"] < LEVELS else []
        rest = [word for key, word in (("spots", "spots"), ("sd", "uncertainty")) if key in facts]
        return {"name": gene, "beside": coarse + rest} | small if coarse + rest else facts
    if "sd" in facts:
        small["sd"] = pack(read_map(content, content.spreads, gene), SMALL, GENE_BYTES)
    return facts | small


def read_map(content: PageContent, files: dict[str, Any], gene: str) -> np.ndarray:
    image = inputs.read_map(files[gene])
    if image.shape != content.shape:
        raise utils.StageError(
            f"{files[gene]} is {image.shape}; the image has {content.shape} superpixels.",
            f"Run the five scripts again, {utils.CALIBRATION} first.",
        )
    return image


def compare_spots(spots: SpotCounts, gene: str, image: np.ndarray) -> dict[str, Any]:
    """Counts of the spots beside sums of the map over their discs; None off the map's tissue."""
    measured = spots.counts[:, [spots.column[gene]]].toarray().ravel()
    summed, usable = sum_discs(spots.discs, image), on_tissue(spots.discs, image, spots.radius)
    r, ratio = score_totals(summed[usable], measured[usable])
    return {
        "measured": [float(f"{value:.6g}") for value in measured],
        "summed": [float(f"{s:.4g}") if u else None for s, u in zip(summed, usable, strict=True)],
        "r": rounded(r),
        "ratio": rounded(ratio),
    }


# --------------------------------------------------------------------------------------------------
# image and colours
# --------------------------------------------------------------------------------------------------
def shrink(stage: utils.Stage, longest_px: int) -> tuple[bytes, list[int]]:
    """he.jpg as a JPEG with sides of at most ``longest_px``; the mean colour of its tissue."""
    path = stage.path(utils.HE)
    try:
        # revalidate: he.jpg may have changed since this process read it last
        image = pyvips.Image.thumbnail(
            f"{path}[revalidate]",
            longest_px,
            height=longest_px,
            size="down",
            no_rotate=True,
            fail_on="error",
        ).copy_memory()
        small = image.resize(min(1, 200 / max(image.width, image.height))).numpy()
        most_bytes = IMAGE_BYTES * max(1, longest_px / IMAGE_PX) ** 2
        for quality in JPEG_QUALITIES:
            packed = image.jpegsave_buffer(Q=quality, keep="none", optimize_coding=True)
            if len(packed) <= most_bytes:
                break
    except pyvips.Error as error:
        raise stage.error(path, f"is not a whole image: {error}") from error
    pixels = small.reshape(small.shape[0] * small.shape[1], -1)[:, :3].astype(np.float64)
    tissue = pixels[pixels.mean(1) < BLANK]
    mean = (tissue if len(tissue) else pixels).mean(0)
    return packed, [int(value) for value in np.rint(np.broadcast_to(mean, 3))]


def palettes() -> dict[str, str]:
    """256 colours each, as hexadecimal text; the lightness of each runs evenly one way."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    found = {
        name: cv2.applyColorMap(ramp, code)[:, 0, ::-1].tobytes().hex()  # cv2 draws in BGR
        for name, code in COLOUR_MAPS.items()
    }
    return found | {PRINTED: ink().tobytes().hex()}


def ink() -> np.ndarray:
    """Colours uint8 (256, 3) from white to dark blue, L* in even steps: paper shows no other."""
    along = np.linspace(0, 1, 256, dtype=np.float32)
    lightness = INK_LIGHTNESS[0] + along * (INK_LIGHTNESS[1] - INK_LIGHTNESS[0])
    strength = np.sin(np.pi * along**0.8 * 0.75)  # grey at the light end, blue at the dark one
    lab = np.stack([lightness, *(c * strength for c in INK_COLOUR)], axis=1)[None]
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_Lab2RGB)[0]
    return np.rint(rgb.clip(0, 1) * 255).astype(np.uint8)
