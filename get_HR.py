"""Turn the measured spots into high-resolution (HR) points: every spot, and the midpoint between
every two neighbouring spots.

    python get_HR.py --directory data/section

Reads   locs.csv (spot id, x, y; px of he.jpg), cnts.csv (spot id x gene, raw counts), and
        gene-names.txt if you have a list of your own.
Writes  HRlocs.csv      x, y (px of he.jpg), measured (1 or 0), parent_1, parent_2 (spot ids). The
                        measured spots come first, in the order of locs.csv, as their own parent_1.
        HRcnts.npy      float32 (HR points, genes): counts of a spot, or the mean of two parents.
        gene-names.txt  unless there is one of yours.

The spots sit on a lattice: Visium's is hexagonal with 100 um pitch, that of legacy Spatial
Transcriptomics (ST) square with 200 um. The lattice is fitted to the coordinates, at any rotation
and with missing spots; two spots are neighbours if they are one step apart on it. Spots that lie on
no lattice become neighbours by a Delaunay triangulation, without its long edges.

Genes. A gene-names.txt of yours is used and never replaced, not even by --force; remove it to have
the genes selected. Selected are the genes whose raw counts vary most, as published: they are the
abundant ones, whose maps rise above the counting noise. They are listed in the order of cnts.csv.

Departures from the published method: it places spots by ``x // 200, y // 100, + 55``, which fits
one simulated layout, and interpolates bilinearly between nodes of which the empty ones count as 0,
which turns a constant 100 into 55 on Visium and 0 on ST. Here the lattice is fitted, measured spots
keep their place and counts, and a midpoint has two measured parents, so that a constant stays
constant up to the tissue edge. Counts and locations are joined by spot id, not by row.

Letters in shapes: N spots, E pairs of neighbours, P = N + E HR points, G genes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import utils
from reading import cli
from writing import disk

SCRIPT = utils.HIGH_RESOLUTION
N_GENES = 1000  # as published


def build_parser() -> argparse.ArgumentParser:
    parser = cli.stage_parser(__doc__)
    parser.add_argument(
        "--n-genes",
        type=cli.positive,
        default=N_GENES,
        help="Number of most variable genes to select if there is no gene-names.txt of yours.",
    )
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import Delaunay, cKDTree

from method.genes import most_variable
from method.grid import neighbour_distance
from reading import tables
from reading.genes import read_gene_names

KNOWN_PITCHES_UM = (utils.VISIUM_PITCH_UM, utils.LEGACY_PITCH_UM)
PITCH_TOLERANCE = 0.1  # further from a known pitch is worth a word: the pixel size may be wrong

# Steps to the neighbours, in units of the two axes. The opposite steps give the same pairs.
STEPS = {"hexagonal": ((1, 0), (0, 1), (-1, 1)), "square": ((1, 0), (0, 1))}
AXES_APART = {"hexagonal": 60.0, "square": 90.0}  # degrees, also the period of the rotation

MIN_SPOTS = 16  # with fewer, some lattice fits almost any arrangement, and no network learns
PATCH_SPOTS = 150  # the first guess looks at the densest patch: local, so that no error adds up
PATCH_NEIGHBOURS = 12  # first and second shell of a hexagonal, three shells of a square lattice
# Pitch over median nearest-neighbour distance: 1 on a perfect lattice, about 1.3 with jitter.
GUESS_PITCH = np.arange(0.9, 1.5, 0.02)
GUESS_DEGREES = 1.5  # a third-shell displacement then is less than 0.1 pitch off
FIRST_RADIUS = 3.0  # pitches around the densest place: about 30 spots for the first fit
GROWTH = 1.5  # of that radius per round; the fit is ever surer than the next round needs
STRAY = 0.3  # pitches from its node, more than the quarter pitch that counts as jitter
MAX_STRAY_SHARE = 0.05  # of random spots, two thirds are strays
MIN_STEP_SHARE = 0.1  # of the pairs along the commonest step; less, and nodes are empty by rule
MAX_STRETCH = 1.2  # longest over shortest step; scanners stretch and shear by a few per cent
MAX_ROW_WIDTH = 0.35  # rms width over spacing; two rows of a lattice have at least 0.43
MAX_EDGE = 1.4  # median Delaunay edges; just below the diagonal of a square
BLOCK_BYTES = 16_000_000  # of HR points computed at a time, however many genes they have


@dataclass(frozen=True)
class Lattice:
    """Node (i, j) lies at ``origin + i * axes[0] + j * axes[1]``, in px of he.jpg."""

    shape: str  # "hexagonal" or "square"
    origin: np.ndarray  # (2,)
    axes: np.ndarray  # (2, 2), an axis a row
    nodes: np.ndarray  # (N, 2) int, the node of every spot

    @property
    def steps(self) -> np.ndarray:
        return np.array(STEPS[self.shape])

    @property
    def pitch(self) -> float:
        return float(np.linalg.norm(self.steps @ self.axes, axis=1).mean())

    @property
    def degrees(self) -> float:
        """Smallest rotation from x towards y that gives the directions of the axes."""
        period = AXES_APART[self.shape]
        angle = np.degrees(np.arctan2(self.axes[0, 1], self.axes[0, 0]))
        return float((angle + period / 2) % period - period / 2)

    def residuals(self, xy: np.ndarray) -> np.ndarray:
        """Distance of every spot from its node, in pitches."""
        return np.linalg.norm(xy - self.origin - self.nodes @ self.axes, axis=1) / self.pitch


# --------------------------------------------------------------------------------------------------
# the lattice
# --------------------------------------------------------------------------------------------------
def densest_patch(xy: np.ndarray) -> np.ndarray:
    """Indices of the ``PATCH_SPOTS`` spots of the densest place, the middle of it first."""
    tree = cKDTree(xy)
    crowd = min(len(xy), PATCH_SPOTS // 4)
    reach = tree.query(xy, k=[crowd])[0][:, 0]
    return tree.query(xy[reach.argmin()], k=min(len(xy), PATCH_SPOTS))[1]


def guess_axes(xy: np.ndarray) -> tuple[str, np.ndarray]:
    """Shape and axes of the lattice that best explains the displacements between near spots.

    A displacement d between two nodes is a whole number of steps along each axis, so that the waves
    cos(k d) of the reciprocal vectors k are 1; their mean over all displacements is the score. It
    survives jitter (0.4 at a quarter pitch) and missing spots, and needs no correct neighbours.
    """
    distance, near = cKDTree(xy).query(xy, k=min(len(xy), PATCH_NEIGHBOURS + 1))
    displacements = (xy[near[:, 1:]] - xy[:, None]).reshape(-1, 2)
    best, shape, axes = -np.inf, "", np.zeros((2, 2))
    for candidate, apart in AXES_APART.items():
        angles = np.radians(np.arange(0.0, apart, GUESS_DEGREES))
        ends = [angles, angles + np.radians(apart)]
        units = np.stack([np.stack([np.cos(a), np.sin(a)], axis=-1) for a in ends], axis=1)
        waves = np.linalg.inv(units)  # (angles, 2, 2): columns are the reciprocal vectors
        if candidate == "hexagonal":  # six-fold, so three equal waves
            waves = np.concatenate([waves, waves.sum(axis=2, keepdims=True)], axis=2)
        # (angles, displacements, waves), at pitch 1; single precision is plenty and fast
        phases = (2 * np.pi * (displacements @ waves)).astype(np.float32)
        for pitch in GUESS_PITCH * np.median(distance[:, 1]):
            scores = np.cos(phases / pitch).mean(axis=(1, 2))
            if scores.max() > best:
                best, shape, axes = scores.max(), candidate, units[scores.argmax()] * pitch
    return shape, axes


def nearest_nodes(xy: np.ndarray, origin: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """The lattice node nearest to every place, (N, 2) int: one of the four around it."""
    place = (xy - origin) @ np.linalg.inv(axes)
    corners = np.floor(place)[:, None] + np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    nearest = np.linalg.norm((place[:, None] - corners) @ axes, axis=2).argmin(axis=1)
    return corners[np.arange(len(xy)), nearest].astype(np.int64)


def fit_lattice(xy: np.ndarray) -> Lattice | None:
    """The lattice on which the spots (N, 2) lie, or None if they lie on none.

    From the densest place outwards: number the nodes of the spots within a radius, fit origin and
    axes to them by least squares, widen the radius. Every spot is numbered by the fit as a whole,
    so that no error adds up from spot to spot, and gaps and holes do not matter. The axes are free,
    so that a stretched or sheared image does no harm.
    """
    if len(xy) < MIN_SPOTS:
        return None
    patch = densest_patch(xy)
    shape, axes = guess_axes(xy[patch])
    from_centre = np.linalg.norm(xy - xy[patch[0]], axis=1)
    radius = FIRST_RADIUS * np.linalg.norm(axes[0])
    # The mean of cyclic fractions: where the nodes lie between whole numbers of steps.
    place = (xy[from_centre <= radius] - xy[patch[0]]) @ np.linalg.inv(axes)
    origin = xy[patch[0]] + np.angle(np.exp(2j * np.pi * place).mean(axis=0)) / (2 * np.pi) @ axes
    while True:
        inside = xy[from_centre <= radius]
        for _ in range(2):  # the second time with nodes numbered by the better fit
            nodes = nearest_nodes(inside, origin, axes)
            design = np.column_stack([np.ones(len(nodes)), nodes])
            # Fitting what is left over, not the places themselves, leaves an axis as it is along
            # which there are no spots yet.
            change = np.linalg.lstsq(design, inside - origin - nodes @ axes, rcond=None)[0]
            origin, axes = origin + change[0], axes + change[1:]
        if len(inside) == len(xy):
            break
        radius *= GROWTH
    lattice = Lattice(shape, origin, axes, nearest_nodes(xy, origin, axes))
    return lattice if explains(lattice, xy) else None


def explains(lattice: Lattice, xy: np.ndarray) -> bool:
    """True if the lattice is hexagonal or square, give or take, and the spots fill its nodes."""
    equal = [lattice.steps @ lattice.axes]
    if lattice.shape == "square":  # equal sides make a rhombus, equal diagonals a square of it
        equal.append(np.array([[1, 1], [1, -1]]) @ lattice.axes)
    lengths = [np.linalg.norm(vectors, axis=1) for vectors in equal]
    if any(length.max() > MAX_STRETCH * length.min() for length in lengths):
        return False
    # An oblong lattice is every second row of a hexagonal one; then some steps lead nowhere.
    taken = [len(pairs) for pairs in pairs_by_step(lattice)]
    if min(taken) < MIN_STEP_SHARE * max(taken):
        return False
    residuals = lattice.residuals(xy)
    # A stray on another's node says that the lattice is wrong; two spots close to one node say that
    # the table is, see check_collisions.
    usurped = (residuals[shared_nodes(lattice.nodes)] > STRAY).any()
    return not usurped and (residuals > STRAY).mean() <= MAX_STRAY_SHARE


def shared_nodes(nodes: np.ndarray) -> np.ndarray:
    """Pairs of spots that lie on the same node, (M, 2) indices."""
    order = np.lexsort(nodes.T)
    same = (nodes[order[1:]] == nodes[order[:-1]]).all(axis=1)
    return np.column_stack([order[:-1][same], order[1:][same]])


def pairs_by_step(lattice: Lattice) -> list[np.ndarray]:
    """For each of the lattice's steps the pairs of spots that it joins, (E, 2) indices."""
    i, j = (lattice.nodes - lattice.nodes.min(axis=0)).T
    width = j.max() + 3  # room on both sides, so that no step reaches into the next row
    number = i * width + j + 1
    order = np.argsort(number)
    pairs = []
    for di, dj in lattice.steps:
        wanted = number + di * width + dj
        found = np.searchsorted(number[order], wanted).clip(max=len(order) - 1)
        there = number[order[found]] == wanted
        pairs.append(np.column_stack([np.flatnonzero(there), order[found[there]]]))
    return pairs


def check_collisions(stage: utils.Stage, lattice: Lattice, locs: pd.DataFrame) -> None:
    pairs = shared_nodes(lattice.nodes)
    if not len(pairs):
        return
    a, b = pairs[0]
    apart = np.linalg.norm(locs.to_numpy()[a] - locs.to_numpy()[b]) / lattice.pitch
    more = f", and so do {len(pairs) - 1} other pairs" if len(pairs) > 1 else ""
    raise stage.error(
        stage.path(utils.LOCS),
        f"puts the spots {locs.index[a]} and {locs.index[b]} on one node of the lattice, only "
        f"{apart:.2f} pitches apart{more}; expected one spot a node.",
        f"Correct or remove one of them in {utils.LOCS_RAW.name}, then run: "
        f"{stage.command(utils.CALIBRATION)}",
    )


# --------------------------------------------------------------------------------------------------
# neighbours: (E, 2) indices of spots, the smaller one first, in ascending order
# --------------------------------------------------------------------------------------------------
def lattice_pairs(lattice: Lattice) -> np.ndarray:
    """All pairs of spots one step apart on the lattice."""
    return in_order(np.concatenate(pairs_by_step(lattice)))


def delaunay_pairs(xy: np.ndarray) -> np.ndarray:
    """Delaunay edges, without those that bridge gaps. Spots in a row: each with the next one."""
    if len(xy) < 2:
        return np.empty((0, 2), int)
    _, lengths, directions = np.linalg.svd(xy - xy.mean(axis=0), full_matrices=False)
    if lengths[-1] / np.sqrt(len(xy)) < MAX_ROW_WIDTH * neighbour_distance(xy) or len(xy) == 2:
        row = np.argsort(xy @ directions[0], kind="stable")
        pairs = np.column_stack([row[:-1], row[1:]])
    else:
        pairs = Delaunay(xy).simplices[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    pairs = in_order(pairs)
    edges = np.linalg.norm(xy[pairs[:, 0]] - xy[pairs[:, 1]], axis=1)
    return pairs[edges <= MAX_EDGE * np.median(edges)]


def in_order(pairs: np.ndarray) -> np.ndarray:
    return np.unique(np.sort(pairs, axis=1), axis=0)


# --------------------------------------------------------------------------------------------------
# genes
# --------------------------------------------------------------------------------------------------
def listed_genes(stage: utils.Stage) -> list[str] | None:
    """The user's own gene list, or None if there is none and the genes are to be selected.

    A list is the user's unless the last run of this script wrote it as it is.
    """
    path = stage.find(utils.GENE_NAMES)
    if path is None or stage.is_mine(utils.GENE_NAMES):
        return None
    # Not Stage.require: a changed list is the reason for this rerun, it makes nothing stale here.
    stage.inputs[path.name] = disk.fingerprint(path)
    genes = read_gene_names(stage, path)
    print(f"{path.name}: your {len(genes):,} genes (remove the file to have them selected)")
    return genes


def choose_genes(
    stage: utils.Stage, counts: sparse.csr_array, genes: list[str], listed: list[str] | None
) -> np.ndarray:
    """The columns of the listed genes, in that order, or else of the most variable ones."""
    table, columns = stage.path(utils.CNTS), pd.Index(genes)
    if listed is not None:
        unknown = [gene for gene in listed if gene not in columns]
        if unknown:
            raise stage.error(
                stage.path(utils.GENE_NAMES),
                f"names {len(unknown)} of {len(listed)} genes that {table.name} does not have: "
                f"{', '.join(unknown[:5])}; it has genes like {', '.join(genes[:5])}.",
            )
        return columns.get_indexer(pd.Index(listed))
    n_genes = stage.args.n_genes
    chosen = most_variable(counts, genes, n_genes)
    if not len(chosen):
        raise stage.error(
            table,
            f"has no gene that varies between the {counts.shape[0]} spots; expected some to select "
            f"the {n_genes} most variable from.",
            f"Add spots, or list your genes in {utils.GENE_NAMES.name}, then run: "
            f"{stage.command(SCRIPT)}",
        )
    short = f"; only these vary, --n-genes asks for {n_genes:,}" if len(chosen) < n_genes else ""
    print(f"genes: the {len(chosen):,} most variable of {len(genes):,}{short}")
    return chosen


# --------------------------------------------------------------------------------------------------
# HR points
# --------------------------------------------------------------------------------------------------
def hr_parents(n_spots: int, pairs: np.ndarray) -> np.ndarray:
    """Parents of every HR point, (P, 2) indices of spots. A measured spot is both of its own."""
    return np.concatenate([np.arange(n_spots)[:, None].repeat(2, axis=1), pairs])


def hr_locations(locs: pd.DataFrame, parents: np.ndarray) -> pd.DataFrame:
    """The table HRlocs.csv: a point lies half way between its parents."""
    xy = locs.to_numpy()[parents].mean(axis=1)
    first, second = (locs.index.to_numpy(dtype=object)[parent] for parent in parents.T)
    measured = parents[:, 0] == parents[:, 1]
    return pd.DataFrame(
        {
            "x": xy[:, 0],
            "y": xy[:, 1],
            "measured": measured.astype(int),
            "parent_1": first,
            "parent_2": np.where(measured, "", second),
        }
    )


def write_hr_counts(counts: np.ndarray, parents: np.ndarray, path: Path) -> None:
    """Write the mean counts of the parents, float32 (P, G), without holding them all in memory."""
    shape = (len(parents), counts.shape[1])
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        block = max(1, BLOCK_BYTES // counts[:1].nbytes)
        for start in range(0, len(parents), block):
            first, second = parents[start : start + block].T
            file.write(((counts[first] + counts[second]) / 2).astype("<f4"))


def describe(lattice: Lattice | None, xy: np.ndarray) -> dict[str, object]:
    """Print what was found; return the numbers for the record."""
    if len(xy) < MIN_SPOTS:
        print(f"note: only {len(xy)} spots; do not trust maps of fewer than {MIN_SPOTS}")
    if lattice is None:
        reason = "too few spots" if len(xy) < MIN_SPOTS else "the spots lie on none"
        print(f"lattice: none, {reason}; neighbours are Delaunay edges up to {MAX_EDGE} x median")
        return {"lattice": "none", "spots": len(xy)}
    pitch = lattice.pitch * utils.PIXEL_SIZE_UM
    residuals = lattice.residuals(xy)
    rms, largest = float(np.sqrt((residuals**2).mean())), float(residuals.max())
    print(
        f"lattice: {lattice.shape}, pitch {pitch:.1f} um, turned by "
        f"{lattice.degrees:z.1f} degrees\n"
        f"residual: {rms * pitch:.1f} um rms ({rms:.1%} of the pitch), "
        f"largest {largest * pitch:.1f} um ({largest:.1%})"
    )
    if not any(abs(pitch / known - 1) < PITCH_TOLERANCE for known in KNOWN_PITCHES_UM):
        print(
            f"note: this pitch is neither Visium's {utils.VISIUM_PITCH_UM:g} um nor the "
            f"{utils.LEGACY_PITCH_UM:g} um of ST; if it should be, "
            f"{utils.PIXEL_SIZE_RAW.name} is wrong"
        )
    return {
        "lattice": lattice.shape,
        "pitch_um": round(pitch, 3),
        "angle_degrees": round(lattice.degrees, 3),
        "residual_um": round(rms * pitch, 3),
        "largest_residual_um": round(largest * pitch, 3),
        "spots": len(xy),
    }


# --------------------------------------------------------------------------------------------------
# the stage
# --------------------------------------------------------------------------------------------------
def main(stage: utils.Stage) -> None:
    stage.require(utils.LOCS, utils.CNTS)
    stage.guard(utils.HR_LOCS, utils.HR_CNTS)
    listed = listed_genes(stage)
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    xy = locs.to_numpy()
    lattice = fit_lattice(xy)
    if lattice is not None:
        check_collisions(stage, lattice, locs)
    pairs = delaunay_pairs(xy) if lattice is None else lattice_pairs(lattice)
    facts = describe(lattice, xy)
    parents = hr_parents(len(xy), pairs)

    counts, genes = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    chosen = choose_genes(stage, counts, genes, listed)
    counts = counts[:, chosen].toarray()
    print(f"HR points: {len(xy):,} spots and {len(pairs):,} midpoints, {counts.shape[1]:,} genes")
    utils.check_disk(stage.directory, 4 * len(parents) * counts.shape[1], utils.HR_CNTS.name)
    with stage.writing(utils.HR_LOCS) as partial:
        hr_locations(locs, parents).to_csv(partial, encoding="utf-8", lineterminator="\n")
    with stage.writing(utils.HR_CNTS) as partial:
        write_hr_counts(counts, parents, partial)
    if listed is None:
        with stage.writing(utils.GENE_NAMES) as partial:
            lines = "".join(f"{genes[column]}\n" for column in chosen)
            partial.write_text(lines, encoding="utf-8", newline="\n")
        # Also an input, so that a later edit of it makes HRcnts.npy, whose columns it names, stale.
        # Getting its real name changes neither size nor time, so the fingerprint stays true.
        stage.inputs[utils.GENE_NAMES.name] = disk.fingerprint(partial)
    stage.finish(**facts, hr_points=len(parents), genes=counts.shape[1], selected=listed is None)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
