"""How a run lies on an H&E image, and that image in the frame of the run; used by xenium.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import images, scans
from reading import tables

TILE_PX = 512  # of the warped image, made at a time
SHARP = 1.1  # source pixels per output pixel above which each is averaged from 2 x 2 samples
KEYPOINTS = "fixedx"  # the first column of a list of keypoints
INVERTED = "Inverted, the matrix fits: it must lead from pixels of the H&E to those of the run."


def read_alignment(path: Path) -> np.ndarray:
    """The 3 x 3 homography from pixels of the H&E to pixels of the run."""
    try:
        rows = tables.read_rows(path)
        if rows and any(KEYPOINTS in str(cell).lower() for cell in rows[0]):
            raise utils.StageError(
                f"{path} lists the keypoints from which Xenium Explorer made the alignment.",
                "Give the matrix that it exported with them, *_imagealignment.csv: three lines "
                "of three numbers.",
            )
        matrix = np.array([[float(cell) for cell in row] for row in rows])
    except utils.StageError:
        raise
    except (*tables.UNREADABLE, FileNotFoundError) as error:
        raise utils.StageError(
            f"{path} is no matrix of numbers: {error}", "Give the 3 x 3 matrix as .csv, no header."
        ) from error
    sound = matrix.shape == (3, 3) and np.isfinite(matrix).all()
    if not sound or abs(np.linalg.det(matrix)) < 1e-12:
        raise utils.StageError(
            f"{path} holds {matrix.shape} numbers; expected an invertible 3 x 3 matrix.",
            "Give the alignment of the H&E as Xenium Explorer exports it.",
        )
    return matrix


def project(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points (N, 2) under a homography; NaN beyond its horizon."""
    mapped = np.column_stack([xy, np.ones(len(xy))]) @ matrix.T
    depth = np.where(mapped[:, 2:] * np.sign(matrix[2, 2] or 1) > 0, mapped[:, 2:], np.nan)
    return mapped[:, :2] / depth


@dataclass
class Placing:
    """How the run lies on the H&E: homographies (3 x 3) from um of the run to px of the H&E."""

    to_slide: np.ndarray
    inverted: np.ndarray  # the same, had the alignment been given the other way round

    @staticmethod
    def pixel_size(um_to_slide: np.ndarray) -> float:
        """um per px of the H&E, by area."""
        return float(1 / np.sqrt(abs(np.linalg.det(um_to_slide[:2, :2] / um_to_slide[2, 2]))))


def read_placing(
    alignment: Path | None, run_um: float, slide: scans.Slide, given_um: float | None
) -> Placing:
    """By the alignment to a run of ``run_um`` per px; without one, the image lies in the frame of
    the run, corner on corner."""
    if alignment is not None:
        matrix = read_alignment(alignment)
        run_px = np.diag([1 / run_um, 1 / run_um, 1.0])
        return Placing(np.linalg.inv(matrix) @ run_px, matrix @ run_px)
    size = given_um or slide.pixel_size_um
    if size is None:
        raise utils.StageError(
            f"{slide.path} does not say its pixel size, and there is no --alignment.",
            "Give --pixel-size UM, um per pixel of the image.",
        )
    return Placing(np.diag([1 / size, 1 / size, 1.0]), np.diag([size, size, 1.0]))


def check_pixel_size(placing: Placing, slide: scans.Slide, given: float | None) -> None:
    """Stop if the alignment belongs to another copy of the image, larger or smaller."""
    size, said = placing.pixel_size(placing.to_slide), given or slide.pixel_size_um
    if said is None or abs(said / size - 1) <= images.MAX_PIXEL_SIZE_ERROR:
        return
    remedy = f"Give the image that was aligned; or --pixel-size {size:.4g}, if its metadata err."
    if abs(said / placing.pixel_size(placing.inverted) - 1) <= images.MAX_PIXEL_SIZE_ERROR:
        remedy = INVERTED
    raise utils.StageError(
        f"{slide.path} has {said:.4g} um per pixel, but by the alignment it has {size:.4g}: "
        f"the alignment is that of another copy of the image.",
        remedy,
    )


def check_alignment(xy: np.ndarray, slide: scans.Slide, placing: Placing) -> None:
    """Stop if the tissue (N, 2), in um, does not lie on the H&E; say what would have fitted."""
    share = share_on(slide, placing.to_slide, xy)
    if share >= images.MIN_INSIDE:
        return
    remedy = (
        "Give the alignment that belongs to this very image, at its full resolution. If the image "
        "shows a part of the section only, name it: --region-um X Y WIDTH HEIGHT."
    )
    if share_on(slide, placing.inverted, xy) >= images.MIN_INSIDE:
        remedy = INVERTED
    raise utils.StageError(
        f"Only {share:.1%} of the tissue falls on {slide.path} ({slide.size[0]} x {slide.size[1]} "
        f"px), expected {images.MIN_INSIDE:.0%}: image and alignment do not belong together.",
        remedy,
    )


def share_on(slide: scans.Slide, um_to_slide: np.ndarray, xy: np.ndarray) -> float:
    return images.share_inside(project(um_to_slide, xy), slide.size[::-1])


@dataclass
class Aligned(images.Region):
    """A part of a slide as seen from another frame, warped tile by tile.

    See images.Region, whose sides are in px of the image written here; ``to_slide`` maps those px
    (continuous) to px of the slide.
    """

    to_slide: np.ndarray = field(default_factory=lambda: np.eye(3))

    def read(self, top: int, bottom: int, shrink: int = 1) -> np.ndarray:
        rows, columns = (bottom - top) // shrink, self.shape[1] // shrink
        result = np.empty((rows, columns, 3), np.uint8)
        for row in range(0, rows, TILE_PX):
            for column in range(0, columns, TILE_PX):
                height, width = min(TILE_PX, rows - row), min(TILE_PX, columns - column)
                corner = (column * shrink, top + row * shrink)
                tile = self.warp(corner, (height, width), shrink)
                result[row : row + height, column : column + width] = tile
        return result

    def warp(self, corner: tuple[int, int], shape: tuple[int, int], shrink: int) -> np.ndarray:
        """One tile (rows, columns) whose corner is (x, y) px of the image written."""
        height, width = shape
        scale = np.array([[shrink, 0, corner[0]], [0, shrink, corner[1]], [0, 0, 1.0]])
        to_slide = self.to_slide @ scale  # from px of the tile
        corners = project(to_slide, np.array([[0, 0], [width, 0], [width, height], [0, height]]))
        if np.isnan(corners).any():
            return np.full((height, width, 3), scans.WHITE, np.uint8)
        pixels = np.sqrt(polygon_area(corners) / (width * height))  # of the slide per px
        step = max(1, int(pixels + 0.05))
        times = 2 if pixels / step > SHARP else 1
        low = np.floor(corners.min(0) / step).astype(int) - 2
        high = np.ceil(corners.max(0) / step).astype(int) + 2
        low = np.clip(low, -4, np.array(self.slide.size) // step)  # nothing to read off the slide
        high = np.clip(high, low + 1, np.array(self.slide.size) // step + 4)
        x, y, wide, tall = (np.concatenate([low, high - low]) * step).tolist()
        source = self.slide.read_region(x, y, wide, tall, step)
        into_source = np.array([[1 / step, 0, -low[0]], [0, 1 / step, -low[1]], [0, 0, 1.0]])
        finer = np.diag([1 / times, 1 / times, 1.0])
        mapping = into_source @ to_slide @ finer
        # OpenCV's coordinates are those of pixel centres
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
        tile = cv2.warpPerspective(
            source, np.linalg.inv(half) @ mapping @ half, (width * times, height * times),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT,
            borderValue=(scans.WHITE,) * 3,
        )  # fmt: skip
        if times > 1:
            tile = cv2.resize(tile, (width, height), interpolation=cv2.INTER_AREA)
        return tile


def polygon_area(xy: np.ndarray) -> float:
    x, y = xy.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
