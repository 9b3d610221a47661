"""What a reference learns from: sections whose superpixels are known, or whose spots are.

Letters in shapes: B patches, T superpixels of a patch, F token features, G genes, N spots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils
from analysis import inputs, scores, spots
from method import registration
from method.devices import to_device
from method.reference import HALO, MOST_RATE, Encoder, check_genes, tissue_features
from method.section import Section, read_section, token_statistics
from reading import arrays, images, tables

BLOCK = 32  # superpixels, 256 um: what is left out is left out in blocks, for neighbours are alike
LEFT_OUT = 6  # one block in so many
SIDE = 8  # superpixels of a patch with truth
DISC_RADIUS, DISC_PITCH = 2.0, 5  # superpixels, of the discs that tell where the image lies
PATCHES, SPOTS = 4, 16  # of a training step
SCORED_BYTES = 200_000_000  # of the maps that are scored at a time
SIZES = {"8 um": 1, "32 um": 4}  # name -> superpixels per side, at which a map is scored


@dataclass
class Lesson:
    """One section: its tokens, and what is known of its expression."""

    stage: utils.Stage  # which reads only; its inputs are all that was read
    tokens: np.ndarray  # (h, w, F) float16, memory-mapped
    tissue: np.ndarray  # (h, w) bool
    left_out: np.ndarray  # (h, w) bool, blocks with truth that train nothing
    genes: list[str]
    mean: np.ndarray  # (G,) counts per superpixel, on the scale of what spots catch
    truth: inputs.Truth | None
    spots: Section | None  # of a section without truth
    beside: dict[str, Any] | None  # where the image lay (method/registration.py)

    def __post_init__(self) -> None:
        self.directory = self.stage.directory
        self.statistics = token_statistics(self.tokens, self.tissue)

    def standardised(self, row: np.ndarray, col: np.ndarray, device: torch.device) -> Tensor:
        """Tokens (B, rows, columns, F) of rows (B, rows) and columns (B, columns); those of the
        border go on beyond it."""
        h, w = self.tissue.shape
        taken = self.tokens[row.clip(0, h - 1)[:, :, None], col.clip(0, w - 1)[:, None, :]]
        mean, std = (to_device(values, device) for values in self.statistics)
        return (to_device(taken, device).float() - mean).div_(std)


# ------------------------------------------------------------------------------------------------
# reading
# ------------------------------------------------------------------------------------------------
def read_lesson(stage: utils.Stage, seed: int, scratch: Path) -> Lesson:
    """The section in a sample directory, after the first four scripts, checked as HISTEX.py does.

    With a truth, from truth.npz, it is learned from superpixels; else from the sums of spots. An
    image that clearly lies beside them is moved back; moved tokens lie in the folder ``scratch``.
    """
    path = stage.directory / inputs.TRUTH
    stage.use(path)  # also that there is none
    if not path.is_file():
        return of_spots(stage, scratch)
    stage.require(utils.HE, utils.FEATURES, utils.MASK)
    shape = images.grid_shape(stage)
    tokens = arrays.read_array(stage, utils.FEATURES, np.float16, (*shape, None))
    truth = inputs.read_truth(stage.directory)
    with np.load(path) as saved:
        if "genes" not in saved:
            stage.require(utils.GENE_NAMES)  # which then tells them
    if any(there > here for there, here in zip(truth.tissue.shape, shape, strict=True)):
        raise stage.error(
            path,
            f"has {truth.tissue.shape} superpixels, more than the {shape} of {utils.HE.name}.",
            "It is of another section or grid. Make it anew: a superpixel is 8 um wide, and "
            f"the first one lies in the upper left corner of {utils.HE.name}.",
        )
    rows, columns = truth.tissue.shape
    truth.tissue &= images.read_mask(stage, shape)[:rows, :columns]
    tissue = np.zeros(shape, bool)
    tissue[:rows, :columns] = truth.tissue
    if not tissue.any():
        raise stage.error(
            path,
            f"and {utils.MASK.name} have no superpixel of tissue in common.",
            f"Look at {utils.MASK_OVERLAY.name}. If it is right, the truth is of another section.",
        )
    try:
        check_genes(truth.genes)
    except ValueError as error:
        raise stage.error(path, f"names {error}.", "Make the file anew.") from error
    left_out = some_blocks(tissue, seed)
    if (tissue & ~left_out).sum() == 0:
        raise stage.error(
            path,
            f"lies in one block of {BLOCK * utils.SUPERPIXEL_UM:.0f} um; a second one is needed, "
            f"which is left out to choose the epoch by.",
            "Take a larger section.",
        )
    on_tissue = truth.tissue[..., None]
    mean = truth.counts.mean(axis=(0, 1), dtype=np.float64, where=on_tissue) * truth.capture
    if not 0 < (most := mean.max()) <= MOST_RATE:
        raise stage.error(
            path,
            f"tells {most:g} counts a superpixel for its richest gene, on the tissue and times its "
            f"capture; expected more than 0, and {MOST_RATE:g} at most.",
            "Make the file anew, or leave this section out of --sections.",
        )
    mean = mean.astype(np.float32)
    tokens, beside = put_in_place(stage, tokens, tissue, truth, scratch)
    return Lesson(stage, tokens, tissue, left_out, truth.genes, mean, truth, None, beside)


def put_in_place(
    stage: utils.Stage, tokens: np.ndarray, tissue: np.ndarray, truth: inputs.Truth, scratch: Path
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The tokens, moved back if the truth clearly shows the image beside it, and what it shows.

    What HISTEX.py asks the spots is asked of discs of the truth, small ones, to tell it exactly.
    """
    (h, w), name = truth.tissue.shape, stage.directory.name
    axes = np.meshgrid(np.arange(0, h, DISC_PITCH), np.arange(0, w, DISC_PITCH), indexing="ij")
    centres = np.stack(axes, axis=-1).reshape(-1, 2)
    centres = np.random.default_rng(0).permutation(centres[tissue[tuple(centres.T)]])
    centres = centres[: registration.MOST_SPOTS]
    if len(centres) < registration.FEWEST_SPOTS:
        print(f"{name}: too small to tell whether the image fits its {inputs.TRUTH}")
        return tokens, None
    numbers, nothing = np.arange(len(centres)), np.zeros((len(centres), 1), np.float32)
    places, parents = centres + 0.5, np.stack([numbers, numbers], axis=1)
    section = Section(
        tokens, tissue, places, nothing, places, nothing, parents, DISC_RADIUS, 1, by_area=True
    )
    row, col = section.patches(centres)
    there = zip(section.areas, row.clip(0, h - 1), col.clip(0, w - 1), strict=True)
    section.counts = np.stack([areas @ truth.counts[r, c] for areas, r, c in there])
    beside = registration.register(section, scratch, f"its {inputs.TRUTH}", name)
    return section.tokens, beside


def of_spots(stage: utils.Stage, scratch: Path) -> Lesson:
    """A section without a truth."""
    needed = (
        utils.HE, utils.LOCS, utils.RADIUS, utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS,
        utils.FEATURES, utils.MASK,
    )  # fmt: skip
    stage.require(*needed)
    section, _, genes = read_section(stage, context=1, by_area=True)
    measured = section.counts[section.usable].sum(axis=0, dtype=np.float64)
    mean = measured / section.areas[section.usable].sum()
    nothing, mean = np.zeros_like(section.tissue), mean.astype(np.float32)
    beside = registration.register(section, scratch, name=stage.directory.name)
    told = (section.tokens, section.tissue, nothing, genes, mean)
    return Lesson(stage, *told, truth=None, spots=section, beside=beside)


def some_blocks(tissue: np.ndarray, seed: int) -> np.ndarray:
    """The tissue (h, w) bool of one block in LEFT_OUT by chance, but of one at least."""
    rows, columns = np.indices(tissue.shape) // BLOCK
    number = rows * (columns.max() + 1) + columns
    there = np.unique(number[tissue])
    chosen = np.random.default_rng(seed).permutation(there)[: max(1, len(there) // LEFT_OUT)]
    return tissue & np.isin(number, chosen)


# ------------------------------------------------------------------------------------------------
# training steps
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """Superpixels of one section, alone or summed over the discs of spots, with their counts."""

    lesson: Lesson
    row: np.ndarray  # (B, rows) with the halo
    col: np.ndarray  # (B, columns)
    spots: np.ndarray | None  # (B,) indices, of patches around spots
    counted: np.ndarray | None  # (B, SIDE, SIDE) bool, of patches with truth


def steps_of(lesson: Lesson, rng: np.random.Generator) -> list[Step]:
    """All of a section once: patches side by side, from another corner each time; or its spots."""
    if lesson.spots is None:
        return truth_steps(lesson, lesson.tissue & ~lesson.left_out, rng)
    section, steps = lesson.spots, []
    usable = rng.permutation(np.flatnonzero(section.usable))
    reach = np.arange(-section.half - HALO, section.half + HALO + 1)
    for some in np.array_split(usable, -(-len(usable) // SPOTS)):
        row, col = (axis[:, None] + reach for axis in np.floor(section.spots[some]).astype(int).T)
        steps.append(Step(lesson, row, col, some, None))
    return steps


def truth_steps(
    lesson: Lesson, wanted: np.ndarray, rng: np.random.Generator | None = None
) -> list[Step]:
    """The superpixels that are ``wanted`` (h, w), in patches; by chance, if there is an ``rng``."""
    offset = np.zeros(2, int) if rng is None else rng.integers(SIDE, size=2)
    padded = np.pad(wanted, [(offset[i], -(offset[i] + wanted.shape[i]) % SIDE) for i in (0, 1)])
    patches = padded.reshape(-1, SIDE, padded.shape[1] // SIDE, SIDE).swapaxes(1, 2)
    where = np.argwhere(patches.any(axis=(2, 3)))
    where = where if rng is None else rng.permutation(where)
    reach, steps = np.arange(-HALO, SIDE + HALO), []
    for some in np.array_split(where, max(1, -(-len(where) // PATCHES))):
        row, col = ((some[:, i] * SIDE - offset[i])[:, None] + reach for i in (0, 1))
        steps.append(Step(lesson, row, col, None, patches[tuple(some.T)]))
    return steps


def batches(steps: list[list[Step]], rng: np.random.Generator) -> Iterator[Step]:
    """The steps of all sections in turn, by chance."""
    every = [step for part in steps for step in part]
    return (every[i] for i in rng.permutation(len(every)))


def loss_of(
    encoder: Encoder, step: Step, columns: dict[Path, Tensor], device: torch.device
) -> Tensor:
    """Poisson's deviance but for a constant, mean over superpixels or spots, and genes.

    A gene counts by the square root of its mean: by its whole mean, a few genes would decide all;
    not at all, those of hardly any counts would. ``columns`` are each section's genes among those
    of the encoder.
    """
    lesson = step.lesson
    mean = to_device(lesson.mean, device).clamp(min=1e-9)
    genes = columns[lesson.directory]
    log_ratio = encoder(lesson.standardised(step.row, step.col, device), genes)
    if step.spots is not None and lesson.spots is not None:
        section = lesson.spots
        areas = to_device(section.areas[step.spots], device)
        counts = to_device(section.counts[step.spots], device)
        expected = torch.einsum("btg,bt->bg", (log_ratio.exp() * mean).flatten(1, 2), areas)
        mean = mean * areas.sum(dim=1, keepdim=True)
    elif step.counted is not None and lesson.truth is not None:
        counted, inside = to_device(step.counted, device), slice(HALO, HALO + SIDE)
        patch, row, col = np.nonzero(step.counted)
        places = (step.row[:, inside][patch, row], step.col[:, inside][patch, col])
        values = lesson.truth.counts[places].astype(np.float32) * np.float32(lesson.truth.capture)
        counts = to_device(values, device)
        expected = log_ratio[counted].exp() * mean
    return ((expected - counts * (expected / mean).log()) / mean.sqrt()).mean()


# ------------------------------------------------------------------------------------------------
# scores
# ------------------------------------------------------------------------------------------------
class Linear:
    """Linear interpolation of the section's own spots, of some genes at a time."""

    def __init__(self, lesson: Lesson, shape: tuple[int, int]) -> None:
        stage, self.shape = lesson.stage, shape
        locs = tables.read_locs(stage, stage.path(utils.LOCS))
        path = inputs.path_of(stage, utils.CNTS)
        self.counts, measured = tables.read_sparse_counts(stage, path, locs.index)
        self.number = {gene: i for i, gene in enumerate(measured)}
        places = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX
        points = spots.superpixel_centres(shape)
        self.weights = spots.interpolation_weights(places, points)[1]

    @staticmethod
    def of(lesson: Lesson) -> Linear | None:
        """None for a section without a truth, without spots, or with spots that cannot be read."""
        stage = lesson.stage
        there = stage.find(utils.CNTS) is not None and stage.find(utils.LOCS) is not None
        if lesson.truth is None or not there:
            return None
        try:
            return Linear(lesson, lesson.truth.tissue.shape)
        except utils.StageError as error:
            print(f"note: spots that are not compared with: {error}")
            return None

    def maps(self, genes: list[str]) -> np.ndarray:
        """(rows, columns, G), NaN for genes that the spots do not have."""
        maps = np.full((*self.shape, len(genes)), np.nan, np.float32)
        here = [i for i, gene in enumerate(genes) if gene in self.number]
        of_spots = self.counts[:, [self.number[genes[i]] for i in here]].toarray()
        maps[..., here] = (self.weights @ of_spots).reshape(*self.shape, -1)
        return maps


def correlations(
    encoder: Encoder, lesson: Lesson, genes: list[str], known: list[str], where: np.ndarray,
    device: torch.device, linear: Linear | None = None,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """Pearson's r (G,) of the ``known`` ones with the truth ``where`` (h, w), by map and size.

    The maps are the prediction of an encoder of ``genes`` and, if it is given, linear
    interpolation. NaN for a gene of which a map says nothing. A few genes at a time, for maps of
    all would fill the memory.
    """
    if lesson.truth is None:
        return {}
    rows, columns = shape = lesson.truth.tissue.shape
    part = replace(lesson.truth, tissue=lesson.truth.tissue & where[:rows, :columns], mean=None)
    features = torch.from_numpy(tissue_features(encoder, lesson.tokens, lesson.tissue, device))
    number = {gene: i for i, gene in enumerate(genes)}
    encoder.cpu().eval()

    def predicted(some: list[str]) -> np.ndarray:
        maps = np.full((*shape, len(some)), np.nan, np.float32)
        with torch.inference_mode():
            found = encoder.decode(features.float(), torch.tensor([number[gene] for gene in some]))
        maps[lesson.tissue[:rows, :columns]] = found.exp().numpy()  # no tissue lies beyond
        return maps

    sources: dict[str, Callable[[list[str]], np.ndarray]] = {"reference": predicted}
    if linear is not None:
        sources["linear"] = linear.maps
    step = max(1, SCORED_BYTES // (8 * rows * columns))
    found: dict[str, dict[str, list]] = {name: {size: [] for size in SIZES} for name in sources}
    for start in range(0, len(known), step):
        some = known[start : start + step]
        maps = {name: source(some) for name, source in sources.items()}
        table = scores.score(inputs.select_genes(part, some), maps, ("r",))
        for name, stack in maps.items():
            told = np.isfinite(stack[part.tissue]).any(axis=0)
            for size, n in SIZES.items():
                found[name][size] += [np.where(told, table[scores.column(name, "r", n)], np.nan)]
    return {n: {size: np.concatenate(r) for size, r in sizes.items()} for n, sizes in found.items()}
