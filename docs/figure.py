"""Draw the first picture of README.md: a good, a median and a bad gene of a section with truth.

    python docs/figure.py --directory data/dev_kidney

Of all genes of the truth, those are drawn whose r at 8 um lies nearest to the 90th, 50th and 10th
percentile. r is that of the whole section; the picture shows the square in which the expression of
all genes varies most. In a row, spots, map and truth share one scale: counts per superpixel, a
spot's count being divided by the superpixels under its disc. The truth is smoothed a little, for
single counts at 8 um are hard to see; r is that of the counts as they are.

Reads   he.jpg, locs.csv, radius.txt, cnts.csv, cnts-super/, truth.npz
Writes  --output, a JPEG; one that is there is replaced
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli

SCRIPT = "docs/figure.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, required=True, help="Folder of the sample.")
    option("--output", type=Path, default=Path("docs/kidney.jpg"), metavar="FILE.jpg",
           help="Picture to write.")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from analysis import inputs, scores
from analysis.regions import bare
from demo.figure import COLOURS, PALE, Extent, choose_detail, scale_bar, show_section
from reading import images
from writing import disk

PERCENTILES = {90: "a good gene", 50: "a median gene", 10: "a bad gene"}  # of r at 8 um
SIDE_UM, SCALE_BAR_UM = 1120, 250
SMOOTHED_UM = 8.0  # sigma of the Gaussian over the truth
SATURATED = 99.0  # percentile of the map at which the colour scale ends
WIDTH_INCHES, DPI, QUALITY = 11.0, 110, 82  # of the picture; quality of the JPEG


def choose_genes(r: pd.Series) -> dict[str, str]:
    """Gene -> in words how good it is, by the r (genes,) of all genes."""
    known = r.dropna()
    at = {text: np.percentile(known, percent) for percent, text in PERCENTILES.items()}
    return {str((known - value).abs().idxmin()): text for text, value in at.items()}


def score(directory: Path, truth: inputs.Truth) -> pd.DataFrame:
    """r (genes, sizes) of the maps with the truth; sizes are those of ``scores.BINS``."""
    maps = inputs.read_maps(directory, truth.genes, truth.tissue.shape)
    grids = scores.make_blocks(truth.tissue)
    rows = {}
    for gene, image in maps.items():
        true = truth.counts[..., truth.genes.index(gene)].astype(np.float32)
        rows[gene] = {
            grid.size: scores.pearson(grid.mean(image)[grid.scored], grid.mean(true)[grid.scored])
            for grid in grids
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_spots(
    ax: Axes, centres: np.ndarray, density: np.ndarray, radius: float, norm: mpl.colors.Normalize
) -> None:
    """Discs at centres (N, 2), row and column, of a radius in superpixels; density (N,)."""
    step = utils.SUPERPIXEL_UM
    discs = EllipseCollection(
        2 * radius * step, 2 * radius * step, 0, units="xy", norm=norm, cmap=COLOURS,
        offsets=centres[:, ::-1] * step, offset_transform=ax.transData, array=density,
    )  # fmt: skip
    ax.add_collection(discs, autolim=False)


def read_he(directory: Path, window: tuple[slice, slice]) -> np.ndarray:
    """The H&E of a window of superpixels, at 2 um per pixel, uint8 (rows, columns, 3)."""
    stage, px = inputs.open_sample(directory), utils.TOKEN_PX
    rows, columns = (slice(px * part.start, px * part.stop) for part in window)
    with images.ImageRows(stage, inputs.path_of(stage, utils.HE)) as image:
        he = image[rows][:, columns]
    height, width = (side // 4 for side in he.shape[:2])
    return he.reshape(height, 4, width, 4, 3).mean((1, 3)).astype(np.uint8)


def draw(directory: Path) -> Figure:
    """Every panel is drawn in um, with the origin at the upper left of the section."""
    truth, step = inputs.read_truth(directory), utils.SUPERPIXEL_UM
    table, shape = score(directory, truth), truth.tissue.shape
    genes = choose_genes(table[1])
    side = min(int(SIDE_UM / step), *shape)
    corner = choose_detail(truth.tissue, truth.counts.astype(np.float32), side)
    top, left = (min(start, n - side) for start, n in zip(corner, shape, strict=True))
    window = slice(top, top + side), slice(left, left + side)
    extent: Extent = (left * step, (left + side) * step, (top + side) * step, top * step)
    he = read_he(directory, window)
    figure = Figure((WIDTH_INCHES, 2.72 * len(genes)), layout="constrained", dpi=DPI)
    axes = figure.subplots(len(genes), 4, squeeze=False)
    maps = inputs.read_maps(directory, list(genes), shape)
    centres, counts = inputs.read_spots(directory, list(genes))
    radius = inputs.read_radius(directory)
    palette = mpl.colormaps[COLOURS].with_extremes(bad="white")
    for i, (gene, text) in enumerate(genes.items()):
        section, spots, *others = axes[i]
        true = truth.counts[..., truth.genes.index(gene)].astype(np.float32) * truth.capture
        true = np.where(truth.tissue, gaussian_filter(true, SMOOTHED_UM / step), np.nan)
        norm = mpl.colors.Normalize(0, float(np.nanpercentile(maps[gene], SATURATED)))
        show_section(section, he, extent)
        fine, coarse = table.loc[[gene], [1, 4]].to_numpy()[0]
        r = f"r = {fine:.2f} at 8 µm, {coarse:.2f} at 32 µm"
        section.set_ylabel(f"{gene}, {text}\n{r}", fontsize=10)
        show_section(spots, (255 - PALE * (255.0 - he)).astype(np.uint8), extent)
        draw_spots(spots, centres, counts[:, i] / (np.pi * radius**2), radius, norm)
        for ax, values in zip(others, (maps[gene], true), strict=True):
            ax.imshow(values[window], extent=extent, cmap=palette, norm=norm, interpolation="none")
            bare(ax)
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(norm, palette), ax=axes[i], extend="max", pad=0.01, aspect=22
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("counts per superpixel", fontsize=8)
    titles = ("H&E", "spots of 55 µm, as measured", "HISTEX, 8 µm", "truth, 8 µm, smoothed")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=11)
    scale_bar(axes[0, 0], SCALE_BAR_UM, side * step, (extent[0], extent[3]))
    return figure


def main(args: argparse.Namespace) -> None:
    figure = draw(args.directory)
    with disk.atomic(args.output) as partial:
        figure.savefig(partial, format="jpeg", pil_kwargs={"quality": QUALITY, "optimize": True})
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return cli.exit_code(lambda: main(args), args.directory, "nothing was written")


if __name__ == "__main__":
    sys.exit(run())
