"""Draw demo.png: the H&E, and for a few genes the spots, the super-resolved map and the truth.

    python demo/figure.py --directory demo/section

The genes are chosen by rule, not by success: of the cell-type markers, the genes of a region and
the genes along a gradient, the one with the most molecules each; and, of the programs not yet
shown, the gene whose r comes nearest to the median of all genes.

Within a row all three pictures share one scale, counts per superpixel as the spots catch
them: a spot's count is divided by the superpixels under its disc, the truth is multiplied by the
capture efficiency.

Reads   he.jpg, locs.csv, radius.txt, cnts.csv, cnts-super/, truth.npz, evaluation.csv
        (by analysis/evaluate.py).
Writes  demo.png, and figure.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "demo/figure.py"
PICTURE = utils.Artifact(("demo.png",), SCRIPT, "spots, maps and truth of some genes", True)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    help_directory = "Folder of the sample."
    parser.add_argument(
        "--directory", type=cli.sample_directory, required=True, help=help_directory
    )
    cli.add_shared(parser)
    parser.set_defaults(allow_stale=False)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from scipy.ndimage import uniform_filter

from analysis import inputs
from analysis.regions import bare
from reading import images

SHOWN_KINDS = {"marker": "cell-type marker", "region": "region gene", "gradient": "gradient gene"}
COLOURS = "magma"  # perceptually uniform, safe for colour-blind readers
SCALE_BAR_UM = 250
ZOOM_UM = 280  # side of the H&E detail
SATURATED = 97.0  # percentile of the truth at which the colour scale ends
PALE = 0.25  # strength of the H&E under the spots
Extent = tuple[float, float, float, float]  # left, right, bottom, top in um


def choose_genes(truth: inputs.Truth, table: pd.DataFrame) -> dict[str, str]:
    """Gene -> why it is shown: the most abundant of each kind, and the one of median r at 4x."""
    total = pd.Series(truth.counts.sum((0, 1)), index=truth.genes)
    if truth.kinds is None:
        return dict.fromkeys(map(str, total.nlargest(4).index), "abundant gene")
    kind = pd.Series(truth.kinds, index=truth.genes)
    chosen = {
        str(total[kind == k].idxmax()): text for k, text in SHOWN_KINDS.items() if (kind == k).any()
    }
    program = pd.Series(truth.genes, index=truth.genes).str.rstrip("0123456789")
    rest = table["histex_4x"][~program.isin(program[list(chosen)])].dropna()
    chosen[str((rest - table["histex_4x"].median()).abs().idxmin())] = "gene of median r"
    return chosen


def choose_detail(tissue: np.ndarray, counts: np.ndarray, side: int) -> tuple[int, int]:
    """Upper left superpixel (row, column) of the tissue square with the most varied expression."""
    spread = np.zeros(tissue.shape)
    for gene in np.moveaxis(counts, 2, 0):
        scaled = gene / max(gene.mean(), 1e-9)
        spread = spread + uniform_filter(scaled**2, side) - uniform_filter(scaled, side) ** 2
    inside = uniform_filter(tissue.astype(float), side) > 0.98
    row, col = np.unravel_index(np.where(inside, spread, -1).argmax(), tissue.shape)
    return max(int(row) - side // 2, 0), max(int(col) - side // 2, 0)


def show_section(ax: Axes, image: np.ndarray, extent: Extent) -> None:
    ax.imshow(image, extent=extent, interpolation="antialiased")
    bare(ax)


def scale_bar(
    ax: Axes, length_um: float, side_um: float, corner: tuple[float, float] = (0, 0)
) -> None:
    """A bar with its length in the lower left corner of a square panel of ``side_um``."""
    x, y = corner[0] + 0.03 * side_um, corner[1] + 0.955 * side_um
    back = Rectangle((x - 0.015 * side_um, y - 0.065 * side_um), length_um + 0.03 * side_um,
                     0.085 * side_um, fc="white", ec="none", alpha=0.85, zorder=2)  # fmt: skip
    ax.add_patch(back)
    ax.plot([x, x + length_um], [y, y], color="black", lw=3, solid_capstyle="butt", zorder=3)
    label = (x + length_um / 2, y - 0.013 * side_um)
    ax.text(*label, f"{length_um} um", ha="center", va="bottom", fontsize=10, zorder=3)


def draw(stage: utils.Stage) -> Figure:
    """The whole picture; every panel is drawn in um, with the origin at the upper left."""
    directory, step, px = stage.directory, utils.SUPERPIXEL_UM, utils.TOKEN_PX
    truth = inputs.read_truth(directory)
    table = pd.read_csv(directory / files.EVALUATION.name, index_col=0)
    genes = choose_genes(inputs.select_genes(truth, list(table.index)), table)
    truth = inputs.select_genes(truth, list(genes))
    rows, columns = truth.tissue.shape
    with images.ImageRows(stage, stage.path(utils.HE)) as image:
        he = image[: rows * px][:, : columns * px]
    true_mean = (truth.counts if truth.mean is None else truth.mean) * truth.capture

    figure = Figure(figsize=(17.5, 3.3 * len(genes)), layout="constrained", dpi=110)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.6])[0]
    whole, detail = left.subplots(2, 1)
    half = he.reshape(rows * px // 2, 2, columns * px // 2, 2, 3).mean((1, 3)).astype(np.uint8)
    extent = (0, columns * step, rows * step, 0)
    show_section(whole, half, extent)
    whole.set_title("H&E (simulated)" if truth.kinds else "H&E", fontsize=12)
    scale_bar(whole, SCALE_BAR_UM, extent[1])
    side = int(ZOOM_UM / step)
    row, col = choose_detail(truth.tissue, true_mean, side)
    corner, zoom = (col * step, row * step), side * step
    window = (corner[0], corner[0] + zoom, corner[1] + zoom, corner[1])
    show_section(detail, he[row * px : (row + side) * px, col * px : (col + side) * px], window)
    detail.set_title("detail (box)", fontsize=12)
    scale_bar(detail, 50, zoom, corner)

    axes = right.subplots(len(genes), 3, squeeze=False)
    pale = (255 - PALE * (255 - half.astype(float))).astype(np.uint8)
    for own in axes[:, 0]:
        show_section(own, pale, extent)
    draw_genes(right, axes, directory, genes, truth.tissue, true_mean, table)
    for own in axes[:, 2]:
        title = "truth: counts" if truth.mean is None else "truth: expected counts"
        own.set_title(title, fontsize=11)
    for ax, colour in [(whole, "black"), *((ax, "0.6") for ax in axes.flat)]:
        ax.add_patch(Rectangle(corner, zoom, zoom, fill=False, ec=colour, lw=1.1))
    return figure


def draw_genes(
    figure: SubFigure,
    axes: np.ndarray,
    directory: Path,
    genes: dict[str, str],
    tissue: np.ndarray,
    true_mean: np.ndarray,
    table: pd.DataFrame,
) -> None:
    """A row per gene: spots, map and truth; ``true_mean`` is (rows, columns, genes)."""
    step, palette = utils.SUPERPIXEL_UM, mpl.colormaps[COLOURS].with_extremes(bad="white")
    maps = inputs.read_maps(directory, list(genes), tissue.shape)
    centres, counts = inputs.read_spots(directory, list(genes))
    radius = inputs.read_radius(directory)
    extent = (0, tissue.shape[1] * step, tissue.shape[0] * step, 0)
    for i, (gene, why) in enumerate(genes.items()):
        true = np.where(tissue, true_mean[:, :, i], np.nan)
        norm = mpl.colors.Normalize(0, max(float(np.nanpercentile(true, SATURATED)), 1e-6))
        spots, predicted, known = axes[i]
        discs = EllipseCollection(
            2 * radius * step, 2 * radius * step, 0, units="xy", norm=norm, cmap=palette,
            offsets=centres[:, ::-1] * step, offset_transform=spots.transData,
            array=counts[:, i] / (np.pi * radius**2),
        )  # fmt: skip
        spots.add_collection(discs)
        spots.set_ylabel(f"{gene}\n{why}", fontsize=12)
        printed = abs(radius * step - utils.VISIUM_RADIUS_UM) < 0.5
        spots.set_title("spots, 55 um" if printed else "spots", fontsize=11)
        for ax, values in ((predicted, maps[gene]), (known, true)):
            shown = ax.imshow(values, extent=extent, cmap=palette, norm=norm, interpolation="none")
            bare(ax)
        r, simple, best = table.loc[gene, ["histex_4x", "linear_4x", "ceiling_4x"]]
        title = f"HISTEX: r = {r:.2f} at 32 um\n(interpolation {simple:.2f}, at most {best:.2f})"
        predicted.set_title(title, fontsize=10)
        bar = figure.colorbar(shown, ax=axes[i], extend="max", pad=0.01, aspect=25)
        bar.outline.set_visible(False)
        bar.set_label("counts per superpixel", fontsize=9)


def main(stage: utils.Stage) -> None:
    stage.guard(PICTURE)
    for artifact in (utils.HE, files.EVALUATION):
        inputs.path_of(stage, artifact)
    inputs.note_inputs(
        stage, utils.HE, utils.LOCS, utils.RADIUS, utils.CNTS, utils.MAPS, files.EVALUATION
    )
    inputs.note_truth(stage)
    figure = draw(stage)
    with stage.writing(PICTURE) as partial:
        figure.savefig(partial)
    stage.finish()


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
