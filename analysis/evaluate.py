"""Score super-resolved maps against the truth, or, without one, on spots that were left out.

    python analysis/evaluate.py --directory demo/section
    python analysis/evaluate.py --directory data/section --holdout 5 --histex "--epochs 500"

Against the truth, of the tissue alone, per gene; tables give the median over genes. 1x is the
superpixel of 8 um; 2x and 4x are 16 and 32 um: the mean over the tissue superpixels of each block
that is at least half tissue. A superpixel of true tissue for which the map says nothing (NaN,
outside the mask) counts as zero; a constant map has r = 0.

* Pearson's and Spearman's r.
* SSIM (windows of 7 x 7, the constants of scikit-image). Local means and variances are those of the
  tissue in the window, and the tissue's SSIM is averaged: background has no say. Truth and map
  stay in counts; the one data range of both is that of the truth.
* RMSE in counts per superpixel, on the one scale of what spots catch: the truth is multiplied by
  ``capture``, where truth.npz has it.

Beside HISTEX stand two predictions without histology, the nearest spot and linear interpolation
between spots, and the ceiling. Molecules are counts, so even the exact expected expression
correlates with them imperfectly: where truth.npz holds the expectation (``mean``), the ceiling is
its own score. Else it is what two random halves of the molecules (binomial thinning) tell of the
counting noise. Halves of correlation r give the whole the reliability 2 r / (1 + r) (Spearman and
Brown), and the best correlation is its square root. For Pearson's r that is computed as the
mean over all such halves, which is known exactly; so are the best RMSE and, in every window, the
variance of the expectation for SSIM; for Spearman's r one pair of halves is drawn. The ceilings of
rho and SSIM are approximate: with less than 0.05 counts per superpixel, that of SSIM at 1x may be
0.1 too high. Of truth that was binned by area, and so holds fractions, the noise is known roughly:
ceilings are given for the correlations in blocks, and may be off by 0.1.

Spot totals: r between the measured counts and the sum of the map over each spot's disc, weighted by
area; what the map leaves out (NaN) adds nothing, and spots with less than a quarter of their disc
on the map's tissue are left out. ``ratio`` is all predicted over all measured counts.

Seams: the mean difference of neighbouring superpixels across the lines of a grid, relative to all
other offsets of the same grid: ``excess`` (0 is none), ``rank`` among the offsets (1 is the
strongest) and ``z``. Genes weigh alike. Without a seam, the rank is random, and z mostly within 2,
with five offsets within 4.

Published protocol, for comparison with published figures only: RMSE and SSIM of the whole map with
its background, truth and map each scaled to 0..1 by its own extremes. Background alone lifts it.

Uncertainty, if there is a cnts-super-sd/: the share of true counts within the central 90 % interval
that map and standard deviation (sd) give, counting noise included; the sd of the errors over the
sd that is said; and, among blocks of about the same map, how the sd ranks the errors. See
uncertainty.py.

Left-out spots: see holdout.py. The ceiling is by halves of the spots' counts.

Reads   cnts-super/, locs.csv, radius.txt, cnts.csv, and the truth: truth.npz (counts (rows,
        columns, genes), tissue; genes, or else gene-names.txt), or genes_3D.pkl (the pickled array
        alone; genes of gene-names.txt, tissue of mask.png). With --holdout, in place of maps and
        truth: he.jpg, gene-names.txt, Histology_feature_map.npy and mask.png.
Writes  evaluation.csv (a row per gene; histex_1x, _2x and _4x are Pearson's r at 8, 16 and 32 um),
        evaluation.json (the tables) and evaluation.png; with --holdout, evaluation-holdout.* of the
        left-out spots. The record of both is evaluate.json.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "analysis/evaluate.py"


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    files.add_output(parser)
    option = parser.add_argument
    option(
        "--holdout",
        type=cli.positive,
        metavar="K",
        help="Leave out the spots in K folds and predict them, in place of a truth (default: score "
        "against the truth).",
    )
    option(
        "--histex",
        type=shlex.split,
        metavar="OPTIONS",
        help="With --holdout: options of HISTEX.py, in quotes (default: those of its last run).",
    )
    option(
        "--seed",
        type=cli.not_negative,
        default=0,
        help="With --holdout: seed of the folds.",
    )
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import holdout, inputs, scores, seams, sheets, spots, uncertainty
from analysis.scores import BINS, CEILING, METHODS, column, number_text, rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COVERAGES = {
    "coverage": "map and standard deviation",
    "coverage_poisson": "map and counting noise alone",
}
RATIO = {"sd_ratio": "shown by the errors, over said"}
RANKS = {"sd": "standard deviation", "map": "the map itself", "ideal": "if errors were as it says"}


# --------------------------------------------------------------------------------------------------
# scores of a sample
# --------------------------------------------------------------------------------------------------
def score_against_truth(
    truth: inputs.Truth, gene: str, maps: dict[str, np.ndarray], grids: list[scores.Blocks]
) -> dict[str, float]:
    """All scores of maps (rows, columns) of a gene that need the truth alone."""
    k = truth.genes.index(gene)
    true, mean = truth.counts[..., k], None if truth.mean is None else truth.mean[..., k]
    row = {"mean_count": true[truth.tissue].mean(dtype=np.float64) * truth.capture}
    row |= scores.score_gene(true, maps, grids, mean, truth.capture)
    for name, image in maps.items():
        error, similar = scores.published_protocol(image, true)
        row |= {f"{name}_published_rmse": error, f"{name}_published_ssim": similar}
    return row


def evaluate(directory: Path, truth: inputs.Truth) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Scores per gene, and the facts of the summary."""
    files, spreads = inputs.map_files(directory), {}
    if (directory / utils.SPREAD.name).is_dir():
        spreads = inputs.map_files(directory, utils.SPREAD)
    genes = [gene for gene in truth.genes if gene in files]
    if not genes:
        raise utils.StageError(
            f"{directory / utils.MAPS.name} holds no map of a gene of the truth.",
            "Put the genes of the truth into gene-names.txt and run the five scripts again.",
        )
    (centres, counts), radius = inputs.read_spots(directory, genes), inputs.read_radius(directory)
    shape, tissue = truth.tissue.shape, truth.tissue
    first = inputs.read_map(files[genes[0]])
    inputs.read_map(files[genes[0]], shape)  # refuses maps smaller than the truth
    discs = spots.disc_weights(centres, radius, first.shape)
    usable, area = spots.on_tissue(discs, first, radius), np.pi * radius**2
    nearest, linear = spots.interpolation_weights(centres, spots.superpixel_centres(shape))
    if spots.triangulate(centres) is None:
        print("note: the spots lie on a line: linear interpolation is that of the nearest spot")
    grids, wide = scores.make_blocks(tissue), uncertainty.make_grids(tissue)
    rows, gradients, blank = [], [], tissue.copy()
    for i, gene in enumerate(genes):
        image = inputs.read_map(files[gene])
        if image.shape != first.shape:
            raise utils.StageError(
                f"{files[gene]} is {image.shape}, other maps are not.", f"Run {utils.HISTEX} again."
            )
        inside = image[: shape[0], : shape[1]]
        maps = {
            "histex": inside,
            "linear": (linear @ counts[:, i] / area).reshape(shape),
            "nearest": (nearest @ counts[:, i] / area).reshape(shape),
        }
        row = score_against_truth(truth, gene, maps, grids)
        totals = spots.score_totals(spots.sum_discs(discs, image)[usable], counts[usable, i])
        row["totals_r"], row["totals_ratio"] = totals
        if gene in spreads:
            true = truth.counts[..., truth.genes.index(gene)]
            sd = inputs.read_map(spreads[gene], shape)
            row |= uncertainty.score_uncertainty(true, inside, sd, wide, truth.capture)
        rows.append(row)
        gradients.append(seams.line_gradients(image[..., None]))
        blank &= np.isnan(inside)
    found, by_gene = seams.score_seams(join_gradients(gradients), radius)
    table = pd.DataFrame(rows, index=pd.Index(genes, name="gene")).assign(**by_gene)
    facts = {
        "genes of the truth": len(truth.genes),
        "tissue without map": rounded(blank.sum() / tissue.sum()),
        "spots": int(usable.sum()),
        "spots without tissue": int((~usable).sum()),
    }
    return table, {**facts, **summarise(table), "seams": found}


def join_gradients(by_gene: list[seams.Gradients]) -> seams.Gradients:
    """The gradients of all genes from those of each; all maps are NaN in the same places."""
    return [
        (np.concatenate([sums for sums, _ in axis], axis=1), axis[0][1])
        for axis in zip(*by_gene, strict=True)
    ]


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Medians over genes, for evaluation.json."""
    middle = {name: rounded(value) for name, value in table.median().items()}
    facts: dict[str, Any] = {"genes": len(table)}
    for measure in scores.MEASURES:
        facts[f"median {measure}"] = {
            name: {f"{size}x": middle[column(name, measure, size)] for size in BINS}
            for name in METHODS
        }
    facts["published protocol"] = {
        name: {m: middle[f"{name}_published_{m}"] for m in ("rmse", "ssim")}
        for name in METHODS
        if name != CEILING
    }
    facts["spot totals"] = {"median r": middle["totals_r"], "median ratio": middle["totals_ratio"]}
    if "coverage_1x" in middle:
        sizes = uncertainty.SIZES
        for title, names in (("median coverage", COVERAGES), ("median sd", RATIO)):
            facts[title] = {
                name: {f"{size}x": middle[f"{name}_{size}x"] for size in sizes} for name in names
            }
        facts["median rank"] = {name: middle[f"rank_{name}"] for name in RANKS}
    return facts


# --------------------------------------------------------------------------------------------------
# the printed summary
# --------------------------------------------------------------------------------------------------
def number(value: float | None) -> str:
    return number_text(value, ".3f")


def by_size(what: str, rows: dict[str, dict[str, float | None]], names: dict[str, str]) -> str:
    """A table of medians: a row a method, a column a size of block."""
    sizes = [int(key[:-1]) for key in next(iter(rows.values()))]
    lines = [f"{what:40}" + "".join(f"{utils.SUPERPIXEL_UM * b:>7.0f} um" for b in sizes)]
    for name, values in rows.items():
        cells = "".join(f"{number(value):>10}" for value in values.values())
        lines.append(f"{names[name]:40}{cells}")
    return "\n".join(lines)


def summary_text(facts: dict[str, Any]) -> str:
    """The printed summary of evaluation.json."""
    over = f"over {facts['genes']} genes"
    parts = [
        by_size(f"median {what} {over}", facts[f"median {m}"], METHODS)
        for m, what in scores.MEASURES.items()
    ]
    if "median coverage" in facts:
        what = f"counts in their 90 % interval {over}"
        parts.append(by_size(what, facts["median coverage"], COVERAGES))
        parts.append(by_size(f"standard deviation {over}", facts["median sd"], RATIO))
        lines = [f"{'ranks of errors in blocks of 32 um':40}{'Spearman':>10}"]
        lines += [f"{RANKS[name]:40}{number(r):>10}" for name, r in facts["median rank"].items()]
        parts.append("\n".join(lines))
    lines = [f"{'published protocol (see evaluate.py)':40}{'RMSE':>10}{'SSIM':>10}"]
    for name, values in facts["published protocol"].items():
        lines.append(f"{METHODS[name]:40}{number(values['rmse']):>10}{number(values['ssim']):>10}")
    parts.append("\n".join(lines))
    lines = [f"{'seams':40}{'excess':>10}{'rank':>10}{'z':>10}"]
    for name, seam in facts["seams"].items():
        if seam["excess"] is not None:
            rank = f"{seam['rank']} of {seam['offsets']}"
            z = number_text(seam["z"], ".1f")
            lines.append(f"{name:40}{seam['excess']:>+10.2%}{rank:>10}{z:>10}")
    parts.append("\n".join(lines))
    totals = facts["spot totals"]
    parts.append(
        f"spot totals: median r {number(totals['median r'])} over {of_spots(facts)}; the maps hold "
        f"{number_text(totals['median ratio'], '.1%')} of the measured counts\n"
        f"{facts['tissue without map']:.1%} of the tissue lies outside the mask and counts as zero"
    )
    if facts["genes"] < facts["genes of the truth"]:
        parts.append(f"of {facts['genes of the truth']} genes of the truth, the others have no map")
    return "\n\n".join(parts)


def of_spots(facts: dict[str, Any]) -> str:
    """How many spots are scored: those with tissue, as HISTEX.py counts them, of all."""
    without = facts["spots without tissue"]
    return f"{facts['spots']} of {facts['spots'] + without} spots" + " with tissue" * bool(without)


def left_out_text(facts: dict[str, Any]) -> str:
    """The printed summary of evaluation-holdout.json."""
    lines = [f"{'median r over ' + str(facts['genes']) + ' genes':40}{'left-out spots':>16}"]
    lines += [f"{holdout.NAMES[name]:40}{number(r):>16}" for name, r in facts["median r"].items()]
    lines.append(f"{of_spots(facts)}, each predicted by maps made without it")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def main(stage: utils.Stage) -> None:
    args, figure = stage.args, None
    stage.keeps_others = True  # the scores by the truth and those by left-out spots
    outputs = [files.EVALUATION, files.EVALUATION_FACTS, files.EVALUATION_PICTURE]
    if args.holdout:
        outputs = [files.LEFT_OUT, files.LEFT_OUT_FACTS, files.LEFT_OUT_PICTURE]
    files.check_matplotlib(stage)
    if args.no_plot:
        del outputs[2]
    else:
        from analysis import picture
    stage.guard(*outputs)
    if args.holdout:
        stage.folder.mkdir(parents=True, exist_ok=True)
        table, facts = holdout.hold_out(stage, args.holdout, args.seed, args.histex, stage.folder)
        print(f"\n{left_out_text(facts)}\n")
        if not args.no_plot:
            figure = picture.draw_left_out(table)
    else:
        inputs.note_truth(stage)
        inputs.note_inputs(stage, utils.MAPS, utils.SPREAD, utils.LOCS, utils.RADIUS, utils.CNTS)
        used = stage.fact(utils.HISTEX, "reference")
        if isinstance(used, dict) and used.get("knows_this_section"):
            stage.warn("a reference that knows this truth made the maps: their scores say nothing")
        truth = inputs.read_truth(args.directory)
        table, facts = evaluate(args.directory, truth)
        print(f"{summary_text(facts)}\n")
        if not args.no_plot:
            figure = picture.draw(table, truth, args.directory)
    write_scores(stage, outputs, table, facts, figure)


def write_scores(
    stage: utils.Stage,
    outputs: list[utils.Artifact],
    table: pd.DataFrame,
    facts: dict[str, Any],
    figure: Figure | None,
) -> None:
    """The table, the summary and, unless it is None, the picture."""
    sheets.warn_of_formulas(stage, table.index)
    with stage.writing(outputs[0]) as partial:
        table.round(5).to_csv(partial, lineterminator="\n")
    with stage.writing(outputs[1]) as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        with stage.writing(outputs[2]) as partial:
            figure.savefig(partial)
    stage.finish()


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
