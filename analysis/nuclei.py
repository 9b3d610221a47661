"""Nuclei found in the H&E, for analysis/cells.py where there are no masks of cells.

* The haematoxylin of every pixel, by colour deconvolution (Ruifrok and Johnston 2001, as in
  skimage.color.rgb2hed), smoothed by a Gaussian of 1 um.
* A pixel is of a nucleus if it has more than the Gaussian mean of 8 um around it, more than half of
  the most within 3 um, and more than 0.6 times the threshold of Otsu's method over the tissue.
* The distance to the border of the dark area, smoothed by a Gaussian of 1 um: nuclei that touch
  have a maximum each, from which a watershed divides them.
* Pieces below 12 or above 400 um2 are no nuclei.

This is a simple method. Networks that were trained on nuclei, such as StarDist or Cellpose, find
faint and crowded ones better. The image is read in strips, and worked on in blocks that overlap: a
nucleus is of the block in which its centre lies, so that no border of a block cuts one.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes
from skimage.segmentation import watershed

import utils
from reading import images
from writing.progress import Bar

FOUND = "nucleus found in the H&E"  # class of each
BLOCK = 2048  # px of he.jpg; a multiple of a superpixel
SIGMA, AROUND = 1.0 / utils.PIXEL_SIZE_UM, 8.0 / utils.PIXEL_SIZE_UM  # px
HALO = 96  # px around a block: four of AROUND, by which OpenCV cuts off, and half a nucleus
FAINTEST = 0.6  # of the threshold, for a nucleus that is darker than its surroundings
APART = 4  # px between the centres of two nuclei, at least
NEAR = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13))  # within 3 um
UM2 = 1 / utils.PIXEL_SIZE_UM**2  # px in a um2
SMALLEST, LARGEST, HOLE = round(12 * UM2), round(400 * UM2), round(20 * UM2)  # px
LEVELS = np.linspace(0, 0.5, 513)  # of haematoxylin, for the histogram


def haematoxylin(rgb: np.ndarray) -> np.ndarray:
    """Amount float32 (rows, columns) of uint8 (rows, columns, 3), smoothed."""
    return cv2.GaussianBlur(rgb2hed(rgb)[..., 0].astype(np.float32), (0, 0), SIGMA)


def strips(image: images.ImageRows, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """First row, and pixels of strips of BLOCK rows with HALO rows above and below, in order.

    Rows that a strip shares with the one above are taken from there: the image is decoded once.
    """
    kept, first = np.empty((0, *image.shape[1:]), np.uint8), 0
    for top in Bar(range(0, len(image), BLOCK), what):
        start, end = max(0, top - HALO), min(len(image), top + BLOCK + HALO)
        kept = np.concatenate([kept[start - first :], image[first + len(kept) : end]])
        first = start
        yield top, kept


def within(tissue: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Tissue by pixel, of tissue (rows, columns) by superpixel; slices are whole superpixels."""
    token = utils.TOKEN_PX
    part = tissue[
        rows.start // token : rows.stop // token, columns.start // token : columns.stop // token
    ]
    return part.repeat(token, 0).repeat(token, 1)


def choose_threshold(image: images.ImageRows, tissue: np.ndarray) -> float:
    """By Otsu's method, over the tissue in every other block."""
    count = np.zeros(len(LEVELS) - 1)
    for top, strip in strips(image, "threshold of haematoxylin"):
        above = min(top, HALO)
        rows = slice(top, min(top + BLOCK, len(image)))
        for left in range(top % (2 * BLOCK), image.shape[1], 2 * BLOCK):
            columns = slice(left, min(left + BLOCK, image.shape[1]))
            inside = within(tissue, rows, columns)
            if inside.any():
                rgb = strip[above : above + rows.stop - rows.start, columns]
                found = haematoxylin(rgb)[inside]
                count += np.histogram(found.clip(0, LEVELS[-1]), LEVELS)[0]
    if np.count_nonzero(count) < 2:  # one colour
        return float(LEVELS[-1])
    return float(threshold_otsu(hist=(count, (LEVELS[1:] + LEVELS[:-1]) / 2)))


def divide(rgb: np.ndarray, tissue: np.ndarray, threshold: float) -> np.ndarray:
    """Labels int32 (rows, columns) of the nuclei in a block; 0 for none."""
    amount = haematoxylin(rgb)
    mean = cv2.GaussianBlur(amount, (0, 0), AROUND)
    least = np.maximum(mean, FAINTEST * threshold)
    dark = (amount > np.maximum(least, cv2.dilate(amount, NEAR) / 2)) & tissue
    dark = remove_small_holes(dark, max_size=HOLE)
    depth = cv2.distanceTransform(dark.astype(np.uint8), cv2.DIST_L2, 5)
    depth = cv2.GaussianBlur(depth, (0, 0), SIGMA)
    peaks = peak_local_max(depth, min_distance=APART, threshold_abs=1.0, exclude_border=False)
    markers = np.zeros(dark.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-depth, markers, mask=dark)
    size = np.bincount(labels.ravel(), minlength=1)
    labels[~((size >= SMALLEST) & (size <= LARGEST))[labels]] = 0
    return labels


def centred_in(labels: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The labels, of those alone whose centre lies there, numbered anew from 1."""
    row, column = np.nonzero(labels)
    label = labels[row, column]
    size = np.bincount(label)
    middle = [np.bincount(label, axis) / np.maximum(size, 1) for axis in (row, column)]
    inside = size > 0
    for place, core in zip(middle, (rows, columns), strict=True):
        inside &= (place >= core.start) & (place < core.stop)
    number = np.where(inside, np.cumsum(inside), 0).astype(np.int32)
    return number[labels] if len(number) else labels


def find(image: images.ImageRows, tissue: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """Bands of labels int32 (n, columns) of the whole image, from top to bottom."""
    width, total = image.shape[1], 0
    waiting, first = np.zeros((0, width), np.int32), 0  # rows in which nuclei may come yet
    for top, strip in strips(image, "nuclei in the H&E"):
        start, bottom = max(0, top - HALO), min(top + BLOCK, len(image))
        more = start + len(strip) - first - len(waiting)
        waiting = np.concatenate([waiting, np.zeros((more, width), np.int32)])
        rows = slice(start, start + len(strip))
        for left in range(0, width, BLOCK):
            columns = slice(max(0, left - HALO), min(left + BLOCK + HALO, width))
            inside = within(tissue, rows, columns)
            if not inside.any():
                continue
            labels = divide(strip[:, columns], inside, threshold)
            core = slice(left - columns.start, min(left + BLOCK, width) - columns.start)
            labels = centred_in(labels, slice(top - start, bottom - start), core)
            place = waiting[start - first :, columns]
            place[(place == 0) & (labels > 0)] = (labels + total)[(place == 0) & (labels > 0)]
            total += int(labels.max(initial=0))
        done = max(0, bottom - HALO - first) if bottom < len(image) else len(waiting)
        yield waiting[:done]
        waiting, first = waiting[done:], first + done
