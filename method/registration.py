"""Registration: how far the image lies beside the spots, as the spots tell, and its undoing.

The place of a spot on the image comes from fiducials, or from matching two images (CytAssist), and
is often some um off. Half a superpixel costs a map sharpness, a whole one its finest structures.
The spots themselves tell: the better tokens lie on the spots, the better their sums over the discs
predict the counts. So the discs are moved over the image by whole superpixels, every way up to
REACH. At every move a ridge regression predicts the expression of each spot from all the others,
and the likelihood of what was measured is highest where the image belongs; the top of a parabola
around the best move tells that place to a part of a superpixel. How exactly, tell the blocks of the
section, each left out in turn (jackknife).

Only what is clear is undone. Then the tokens are moved, not the spots: maps lie where the molecules
were counted, in the frame of locs.csv.

Letters in shapes: A moves along an axis, N spots, C components of the tokens, E of the expression,
J blocks, F token features.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import utils
from method import grid
from method.section import Section
from reading import arrays
from writing.progress import Bar

REACH = 6  # superpixels: 48 um, about half the pitch of Visium
FEWEST_SPOTS, MOST_SPOTS = 100, 2000  # fewer tell too little; of more, some are drawn
COMPONENTS, PROFILES = 64, 20  # principal components of tokens and of roots of counts, at most
PENALTIES = 10.0 ** np.arange(-5, 1.1, 0.5)  # of the ridge, in the variance of all components
SIDES = 4  # the section is cut into SIDES x SIDES blocks with as many spots each
CHANCE = 0.01  # that an image in place seems to lie as far beside; what is rarer is undone
LEAST_GAIN = 10.0  # of log likelihood, over the image in place
LEAST_TOLD = 50.0  # of log likelihood, over no image; shuffled counts gain up to 17
MOST_SD = 0.5  # superpixels; a place that is less sure may be one of several
SPOTS_AT_ONCE = 16
STRIP_BYTES = 2**26  # of tokens, moved at a time
TINY = 1e-9  # tokens that are all the same have no component
GLASS = 1e-3  # weight of a superpixel beside the tissue, where one on the tissue has 1


@dataclass(frozen=True)
class Offset:
    """Where the image lies beside the spots: what belongs to place p is seen at p + ``place``."""

    place: np.ndarray  # (2,) down and right, superpixels
    sd: np.ndarray  # (2,) standard deviation of it
    chance: float  # that it seems at least as far if it is in place
    gain: float  # of log likelihood, by the best whole move over the place where it is
    told: float  # of log likelihood, by the image there over none

    @property
    def within_reach(self) -> bool:
        return bool(np.abs(self.place).max() < REACH - 1)

    @property
    def sure(self) -> bool:
        return bool((self.sd < MOST_SD).all()) and self.told >= LEAST_TOLD

    @property
    def undone(self) -> bool:
        return self.clear and self.within_reach

    @property
    def clear(self) -> bool:
        return self.sure and self.gain >= LEAST_GAIN and self.chance < CHANCE


# ------------------------------------------------------------------------------------------------
# finding it
# ------------------------------------------------------------------------------------------------
def find_offset(section: Section) -> Offset | None:
    """Where the image lies beside the spots; None if there are too few spots to tell."""
    spots = section.drawn_spots(MOST_SPOTS)
    if len(spots) < FEWEST_SPOTS:
        return None
    profiles = components(np.sqrt(section.counts[spots]), min(PROFILES, len(spots) // 10))[0]
    in_place = disc_means(section, spots, None, 0)[0, 0]
    axes = components(in_place, min(COMPONENTS, len(spots) // 4))[1]
    moved = disc_means(section, spots, axes, REACH)  # (A, A, N, C)
    parts = np.linalg.svd(moved - moved.mean(axis=2, keepdims=True), full_matrices=False)
    of_penalties = (left_over(*parts[:2], profiles, penalty) for penalty in PENALTIES)
    left = min(of_penalties, key=lambda left: log_volume(product(left)).min())
    block = blocks(section.spots[spots])
    products = np.stack([product(left[:, :, block == j]) for j in range(SIDES**2)])
    total = products.sum(axis=0)
    volume = log_volume(total)
    without = np.array([lowest(log_volume(total - some)) for some in products])
    alone = log_volume(product((profiles - profiles.mean(axis=0)) / (1 - 1 / len(profiles))))
    gain, told = (len(spots) / 2 * float(x - volume.min()) for x in (volume[REACH, REACH], alone))
    return Offset(lowest(volume), *error_of(lowest(volume), without), gain, told)


def components(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components (N, n) of x (N, F), of variance 1, and their axes (F, n).

    Less than ``n`` if x has no more, but one at least.
    """
    u, size, v = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    n = max(1, min(n, int((size > size[0] * 1e-6).sum())))
    return u[:, :n] * math.sqrt(len(x)), v[:n].T


def disc_means(
    section: Section, spots: np.ndarray, axes: np.ndarray | None, reach: int
) -> np.ndarray:
    """Means of standardised tokens over the discs of spots (N,), float32 (A, A, N, F or C).

    The discs are moved by -reach..reach superpixels down and right. Beside the tissue, a token
    counts as the mean of all; with ``axes`` (F, C), tokens are projected on these.
    """
    mean, std = section.token_statistics
    centres = np.floor(section.spots[spots]).astype(int)
    areas = grid.disc_areas(section.spots[spots], *section.patches(centres), section.radius)
    side = math.isqrt(areas.shape[1])
    areas = (areas / areas.sum(axis=1, keepdims=True)).reshape(-1, side, side)
    means = []
    for start in Bar(range(0, len(spots), SPOTS_AT_ONCE), "registration"):
        part = slice(start, start + SPOTS_AT_ONCE)
        squares = section.squares(centres[part], reach)
        on_tissue = section.on_tissue(*section.patches(centres[part], reach))
        x = (squares - mean) / std * on_tissue.reshape(*squares.shape[:3], 1)
        if axes is not None:
            x = x @ axes
        discs = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
        means.append(np.einsum("badfij,bij->adbf", discs, areas[part], optimize=True))
    return np.concatenate(means, axis=2)


def left_over(u: np.ndarray, size: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """What ridge regressions leave of y (N, E), each row predicted by the others: (..., N, E).

    ``u`` (..., N, C) and ``size`` (..., C) are of the singular value decompositions of what they
    regress on, its columns less their means. No row has to be left out: its residual is divided by
    one less its leverage.
    """
    all_sizes = (size**2).sum(axis=-1, keepdims=True)
    kept = size**2 / np.maximum(size**2 + penalty * all_sizes, TINY)
    kept_u = u * kept[..., None, :]
    leverage = (kept_u * u).sum(axis=-1, keepdims=True) + 1 / len(y)
    return (y - y.mean(axis=0) - kept_u @ (np.swapaxes(u, -1, -2) @ y)) / (1 - leverage)


def product(left: np.ndarray) -> np.ndarray:
    """Sums of squares and products (..., E, E) of what is left over (..., N, E)."""
    return np.swapaxes(left, -1, -2) @ left


def log_volume(products: np.ndarray) -> np.ndarray:
    """Logarithm of the determinant: but for constants, minus a normal log likelihood."""
    return np.linalg.slogdet(products)[1]


def lowest(values: np.ndarray) -> np.ndarray:
    """Place (2,) of the lowest value on a grid (A, A), from its middle, between its points.

    It is that of the parabola through the 3 x 3 values around the lowest one.
    """
    inner = np.array(np.unravel_index(values.argmin(), values.shape)).clip(1, len(values) - 2)
    y, x = (steps.ravel() for steps in np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"))
    terms = np.column_stack([np.ones(9), y, x, y * y / 2, x * x / 2, x * y])
    near = values[inner[0] - 1 : inner[0] + 2, inner[1] - 1 : inner[1] + 2].ravel()
    _, down, right, bend_down, bend_right, mixed = np.linalg.lstsq(terms, near, rcond=None)[0]
    bend = np.array([[bend_down, mixed], [mixed, bend_right]])
    step = np.array([y, x])[:, near.argmin()]
    if np.linalg.eigvalsh(bend)[0] > 0:  # a pit, not a saddle or a slope
        step = np.linalg.solve(bend, [-down, -right]).clip(-1, 1)
    return inner + step - len(values) // 2


def blocks(places: np.ndarray) -> np.ndarray:
    """Number (N,) of the block of every place: SIDES strips of rows, each cut into SIDES."""
    strip = rank(places[:, 0])
    block = np.empty(len(places), int)
    for i in range(SIDES):
        block[strip == i] = SIDES * i + rank(places[strip == i, 1])
    return block


def rank(values: np.ndarray) -> np.ndarray:
    """0..SIDES - 1, as many of each: in which part of the sorted values one lies."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable") * SIDES // len(values)


def error_of(place: np.ndarray, without: np.ndarray) -> tuple[np.ndarray, float]:
    """Standard deviation (2,) of a place, and the chance that it is so far from 0, 0.

    Both are from the places (J, 2) that are found without a block each.
    """
    n = len(without)
    away = without - without.mean(axis=0)
    covariance = (n - 1) / n * away.T @ away + 1e-6 * np.eye(2)
    far = place @ np.linalg.solve(covariance, place)  # Hotelling's T squared
    chance = stats.f.sf(far * (n - 2) / (2 * (n - 1)), 2, n - 2)
    return np.sqrt(np.diag(covariance)), float(chance)


# ------------------------------------------------------------------------------------------------
# undoing it
# ------------------------------------------------------------------------------------------------
def move(
    tokens: np.ndarray, tissue: np.ndarray, place: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """Fill ``moved`` (h, w, F) with the tokens at p + ``place``, between superpixels in proportion.

    Glass beside the tissue is not mixed in, and beyond the border tokens are those of the border.
    """
    h, w = tissue.shape
    moves = grid.four_moves(place)
    step = max(1, STRIP_BYTES // (4 * tokens[0].size))
    for top in range(0, h, step):
        rows = np.arange(top, min(top + step, h))
        needed = [(rows + down).clip(0, h - 1) for (down, _), _ in moves]
        first = int(needed[0][0])
        strip = arrays.some_rows(tokens, first, int(needed[-1][-1]) + 1)
        total = np.zeros((len(rows), w, tokens.shape[-1]), np.float32)
        weight = np.zeros((len(rows), w, 1), np.float32)
        for row, ((_, right), share) in zip(needed, moves, strict=True):
            col = (np.arange(w) + right).clip(0, w - 1)
            there = np.where(tissue[np.ix_(row, col)], share, GLASS * share)[..., None]
            there = there.astype(np.float32)
            total += there * strip[np.ix_(row - first, col)]
            weight += there
        moved[top : top + len(rows)] = total / weight
    return moved


def register(
    section: Section, scratch: Path, what: str = "the spots", name: str = ""
) -> dict[str, Any] | None:
    """Undo what is clear of the image's offset. Returns what the record tells of it.

    The moved tokens are in a file of the folder ``scratch``; it has no name and is gone when the
    process ends. ``what`` has the counts, and ``name`` begins the line that is printed.
    """
    offset, begin = find_offset(section), name and f"{name}: "
    if offset is None:
        print(f"{begin}image and spots: fewer than {FEWEST_SPOTS} cannot tell whether they fit")
        return None
    place = np.round(offset.place * utils.TOKEN_PX) / utils.TOKEN_PX  # whole pixels of he.jpg
    down, right = place * utils.SUPERPIXEL_UM
    sd_down, sd_right = offset.sd * utils.SUPERPIXEL_UM
    where = (
        f"{begin}the image lies {abs(down):.1f} um {'below' if down > 0 else 'above'} and "
        f"{abs(right):.1f} um {'right' if right > 0 else 'left'} of {what} "
        f"(sd {sd_down:.1f} and {sd_right:.1f} um)"
    )
    if offset.undone:
        print(f"{where}: its tokens are moved back")
        tokens = section.tokens
        utils.check_disk(scratch, tokens.nbytes, "the moved tokens")
        with tempfile.TemporaryFile(dir=scratch) as file:
            moved = np.memmap(file, np.float16, "w+", shape=tokens.shape)
        section.tokens = move(tokens, section.tissue, place, moved)
        vars(section).pop("token_statistics", None)  # they were those of the tokens before
    elif offset.clear:
        print(f"warning: {where}, or farther: too far to be moved back")
    elif not offset.sure:
        print(f"{begin}{what} cannot tell how well the image fits")
    else:
        sd = max(sd_down, sd_right)
        print(f"{begin}the image fits {what}, as far as can be told (sd {sd:.1f} um)")
    return {
        "down_um": round(float(down), 2), "right_um": round(float(right), 2),
        "sd_down_um": round(float(sd_down), 2), "sd_right_um": round(float(sd_right), 2),
        "chance": offset.chance, "gain": round(offset.gain, 1), "undone": offset.undone,
    }  # fmt: skip
