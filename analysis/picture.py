"""The pictures of analysis/evaluate.py: scores of all genes, and the maps of three."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import utils
from analysis.inputs import Truth, map_files, read_map, read_radius, read_spots, select_genes
from analysis.regions import bare
from analysis.scores import BINS, METHODS, Blocks
from analysis.spots import interpolate_spots

COLOURS = {"histex": "#b5306b", "linear": "#4c78a8", "nearest": "#999999", "ceiling": "#333333"}
SHOWN = {"well predicted": 0.9, "median": 0.5, "badly predicted": 0.1}  # quantiles of r
SATURATED = 99.0  # percentile at which the colours end
SHOWN_BIN = 2  # superpixels: in single ones, truth is mostly counting noise


def draw_scores(axes: Sequence[Axes], table: pd.DataFrame, key: str, where: str) -> None:
    """Three panels of r per gene: against interpolation, against the ceiling, by abundance."""
    versus_linear, versus_ceiling, by_count = axes
    for ax, name in ((versus_linear, "linear"), (versus_ceiling, "ceiling")):
        x, y = table[f"{name}_{key}"], table[f"histex_{key}"]
        low = min(0.0, np.nanmin([x.min(), y.min(), 0])) - 0.02
        ax.plot([low, 1], [low, 1], color="0.7", lw=1, zorder=0)
        ax.scatter(x, y, s=14, color=COLOURS["histex"], alpha=0.65, linewidths=0)
        ax.set(xlim=(low, 1), ylim=(low, 1), aspect="equal", xlabel=METHODS[name])
        ax.set_ylabel(f"HISTEX, {where}")
        if x.notna().any():
            better = (y > x).sum() / x.notna().sum()
            text = f"median {y.median():.2f} against {x.median():.2f}; {better:.0%} above the line"
            ax.set_title(text, fontsize=10)
    for name in ("ceiling", "linear", "histex"):
        by_count.scatter(
            table["mean_count"], table[f"{name}_{key}"], s=10, color=COLOURS[name], alpha=0.6,
            linewidths=0, label=METHODS[name],
        )  # fmt: skip
    by_count.set(ylabel="Pearson r", xlabel="mean count")
    drawn = table[[f"{name}_{key}" for name in ("ceiling", "linear", "histex")]].notna().any(axis=1)
    if (table["mean_count"][drawn] > 0).any():
        by_count.set_xscale("log")
    by_count.set_title(f"{len(table)} genes, a dot each", fontsize=10)
    by_count.legend(fontsize=8, frameon=False, markerscale=2)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def choose_shown(table: pd.DataFrame) -> dict[str, str]:
    """Gene -> why it is shown: those nearest to three quantiles of r at the largest bin."""
    r = table[f"histex_{BINS[-1]}x"].dropna()
    if r.empty:
        return {}
    return {str((r - float(r.quantile(q))).abs().idxmin()): why for why, q in SHOWN.items()}


def draw_maps(
    axes: Sequence[Axes], truth: np.ndarray, maps: dict[str, np.ndarray], blocks: Blocks
) -> None:
    """A gene in a row: the truth (rows, columns) and maps by their title, all on its scale."""
    side = SHOWN_BIN * utils.SUPERPIXEL_UM
    shown = {f"truth, {side:.0f} um": truth, **maps}
    binned = [np.where(blocks.scored, blocks.mean(image), np.nan) for image in shown.values()]
    top = max(float(np.nanpercentile(binned[0], SATURATED)), 1e-6)
    for ax, title, values in zip(axes, shown, binned, strict=True):
        image = ax.imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        bare(ax, title)
    bar = axes[0].figure.colorbar(image, ax=list(axes), extend="max", pad=0.01, aspect=25)
    bar.set_label("counts per superpixel", fontsize=9)
    bar.outline.set_visible(False)


def draw(table: pd.DataFrame, truth: Truth, directory: Path) -> Figure:
    """The picture of a section with truth: scores, then a row of maps per shown gene."""
    genes = choose_shown(table)
    heights = [4.9, *[3.8] * len(genes)]  # inches
    figure = Figure(figsize=(13, sum(heights)), layout="constrained", dpi=100)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    side = f"{BINS[-1] * utils.SUPERPIXEL_UM:.0f} um"
    draw_scores(parts[0].subplots(1, 3), table, f"{BINS[-1]}x", f"r at {side}")
    blocks, files = Blocks(truth.tissue, SHOWN_BIN), map_files(directory)
    for part, (gene, why) in zip(parts[1:], genes.items(), strict=True):
        true = select_genes(truth, [gene]).counts[..., 0] * truth.capture
        centres, counts = read_spots(directory, [gene])
        area = np.pi * read_radius(directory) ** 2
        _, linear = interpolate_spots(centres, counts / area, truth.tissue.shape)
        images = {"histex": read_map(files[gene], truth.tissue.shape), "linear": linear[..., 0]}
        maps = {
            f"{METHODS[name]}, r = {table[f'{name}_{SHOWN_BIN}x'][gene]:.2f}": image
            for name, image in images.items()
        }
        axes = part.subplots(1, 3)
        draw_maps(axes, true, maps, blocks)
        axes[0].set_ylabel(f"{gene}\n{why}", fontsize=11)
    return figure


def draw_left_out(table: pd.DataFrame) -> Figure:
    """The picture of the left-out spots."""
    figure = Figure(figsize=(13, 4.9), layout="constrained", dpi=100)
    draw_scores(figure.subplots(1, 3), table, "spots", "r in left-out spots")
    return figure
