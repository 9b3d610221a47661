"""What each part of HISTEX.py's default preset brings: take one away, train, score.

    python benchmarks/ablations.py --directory data/section --keep results
    python benchmarks/ablations.py --simulated 3 --variants default "no anchoring" --keep results

Reads   samples with a truth.npz, as benchmarks/accuracy.py does, and simulated ones
Writes  a table in Markdown to stdout, a row a variant; results as JSON in --keep, by which a later
        run goes on

A variant is a row of ROWS: the default preset with one thing changed. Its states are trained (state
i by seed + i, the same start for all variants) and its anchored maps are scored: median over genes
of Pearson r with the truth at 8 and 32 um, beside r on the held-out spots, which needs no truth and
on which a choice should rest. The truth is used for the score only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.measure import add_sections
from reading import cli


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add_sections(parser)
    option = parser.add_argument
    option("--variants", nargs="+", metavar="NAME", help="Rows of the table (default: all rows).")
    option("--n-states", type=cli.positive, default=1, help="Number of networks per variant.")
    parser.alias("--states", "--n-states")
    option("--seed", type=cli.not_negative, default=0, help="Random seed of the first state.")
    option("--keep", type=Path, required=True, help="Folder for samples and results.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import contextlib
import io
import json
import tempfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import HISTEX
from analysis import inputs
from benchmarks import accuracy
from method import linear, prediction, registration, states
from method.network import disc_sums
from method.section import Section, read_section

BINS = ("r 1x", "r 4x")


def keep(gradient: Tensor, columns: slice) -> Tensor:
    """The gradient of some columns; the weights of the others start at zero and stay there."""
    kept = torch.zeros_like(gradient)
    kept[:, columns] = gradient[:, columns]
    return kept


class WithoutAttention(HISTEX.DefaultNetwork):
    """The context enters by interpolation only."""

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.log_factor.weight.register_hook(lambda grad: keep(grad, slice(HISTEX.WIDTH, None)))


class WithoutHistology(HISTEX.DefaultNetwork):
    """Tokens act through the attention only."""

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.log_factor.weight.register_hook(lambda grad: keep(grad, slice(HISTEX.WIDTH)))


class SingleTokenDropout(HISTEX.DefaultNetwork):
    """Every superpixel hides other features."""

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.embed_tokens[0] = nn.Dropout(self.dropout)


class OneScale(HISTEX.DefaultNetwork):
    scales = ()
    halo = 0


class Dropout01(HISTEX.DefaultNetwork):
    dropout = 0.1


class Dropout03(HISTEX.DefaultNetwork):
    dropout = 0.3


class NoContextDropout(HISTEX.DefaultNetwork):
    context_dropout = 0.0


class HardlyAnyDropout(HISTEX.DefaultNetwork):
    dropout, context_dropout = 0.1, 0.0


class FullTrust(HISTEX.DefaultNetwork):
    """Every gene begins at the interpolated counts."""

    quick = ()
    fixed = 30.0  # of the sigmoid's argument

    def __init__(self, section: Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.trust.requires_grad_(False).fill_(self.fixed)


class NoTrust(FullTrust):
    """Every gene begins at the mean of the section."""

    fixed = -30.0


class PlainLoss(HISTEX.DefaultNetwork):
    """Squared error of the counts, each gene scaled by its mean."""

    def loss(self, output: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        total = disc_sums(self.to_counts(output), areas)
        return ((total - counts) * self.root_scale**2).square()


class PoissonLoss(HISTEX.DefaultNetwork):
    """Negative log likelihood of the counts, each gene scaled by the root of its mean."""

    def loss(self, output: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        total = disc_sums(self.to_counts(output), areas) + 1e-3
        return (total - counts * total.log()) * self.root_scale


DEFAULT = HISTEX.PRESETS["default"]
ROWS = {
    "default": DEFAULT,
    "no registration": replace(DEFAULT, registers=False),
    "no linear model": replace(DEFAULT, linear_share=0.0),
    "scales weighed alike": replace(DEFAULT, weighs_scales=False),
    "no anchoring": replace(DEFAULT, anchor_prior=None),
    "no averaging of weights": replace(DEFAULT, averaging=None),
    "dropout 0.1": replace(DEFAULT, network=Dropout01),
    "dropout 0.3": replace(DEFAULT, network=Dropout03),
    "dropout of single tokens": replace(DEFAULT, network=SingleTokenDropout),
    "no context dropout": replace(DEFAULT, network=NoContextDropout),
    "weight decay 0.01": replace(DEFAULT, weight_decay=0.01),
    "weight decay 3": replace(DEFAULT, weight_decay=3.0),
    "without all of these four": replace(
        DEFAULT, network=HardlyAnyDropout, averaging=None, weight_decay=0.01
    ),
    "learning rate 3e-4": replace(DEFAULT, learning_rate=3e-4),
    "batch 32": replace(DEFAULT, batch_size=32),
    "patience 20": replace(DEFAULT, patience=20),
    "one token scale": replace(DEFAULT, network=OneScale),
    "8 HR points": replace(DEFAULT, context=8),
    "32 HR points": replace(DEFAULT, context=32),
    "no attention": replace(DEFAULT, network=WithoutAttention),
    "attention only": replace(DEFAULT, network=WithoutHistology),
    "plain squared error": replace(DEFAULT, network=PlainLoss),
    "Poisson loss": replace(DEFAULT, network=PoissonLoss),
    "anchor prior 2": replace(DEFAULT, anchor_prior=2.0),
    "anchor prior 10": replace(DEFAULT, anchor_prior=10.0),
    "full trust": replace(DEFAULT, network=FullTrust),
    "no trust": replace(DEFAULT, network=NoTrust),
}
CPU = torch.device("cpu")


def run_variant(
    sample: Path, truth: inputs.Truth, row: HISTEX.Preset, n_states: int, seed: int
) -> dict[str, float | None]:
    """Train and score one preset on a sample whose first four stages are done."""
    training = HISTEX.Training(row, seed=seed)
    stage = utils.Stage(HISTEX.SCRIPT, argparse.Namespace(directory=sample, allow_stale=False))
    key = states.key_of(training, HISTEX.STATE_CODE, {}, CPU)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        section, _, genes = read_section(stage, row.context, row.by_area)
        if row.registers:
            registration.register(section, sample)
        linear.join(section, row.linear_share > 0, row.weighs_scales)
        start = time.perf_counter()
        trained = [
            HISTEX.train_state(section, Path(folder) / str(i), training, key, i, CPU)
            for i in range(n_states)
        ]
        seconds = time.perf_counter() - start
    networks = [state.network for state in trained]
    maps = np.full((len(genes), *section.tissue.shape), np.nan, np.float32)
    with tempfile.TemporaryFile() as file:
        prediction.embed_section(networks, section, section.tissue, row.overlap, file, CPU)
        decoder = prediction.Decoder(
            networks, section, section.tissue, row.anchor_prior, [file], CPU, row.linear_share
        )
        for chosen in decoder.blocks():
            maps[chosen, section.tissue] = decoder.maps(chosen)
    held_out, predicted = states.held_out(trained)
    r = states.correlations(predicted, section.counts[held_out])
    h, w = truth.tissue.shape
    order = [genes.index(gene) for gene in truth.genes]
    scores = accuracy.score_maps(truth, maps[order, :h, :w].transpose(1, 2, 0))
    return {"held-out r": float(np.nanmedian(r)), "seconds": seconds, **scores}


def prepared(code: accuracy.Code, source: Path, work: Path) -> tuple[Path, inputs.Truth]:
    """The sample after its first four stages, and the truth of the genes that it predicts."""
    work.mkdir(parents=True, exist_ok=True)
    sample, _ = accuracy.prepare_section(code, source, work)
    truth = inputs.read_truth(source)
    chosen = set((sample / utils.GENE_NAMES.name).read_text(encoding="utf-8").split())
    return sample, inputs.select_genes(truth, [g for g in truth.genes if g in chosen])


def table(rows: dict[str, dict[str, dict]], names: list[str]) -> str:
    """Markdown: variants down, sections across; r at 1x / 4x, and in brackets r of held-out."""
    lines = ["| variant | " + " | ".join(names) + " | seconds |", "|---" * (len(names) + 2) + "|"]
    for variant, results in rows.items():
        cells = [
            " / ".join(f"{results[name][key]:.3f}" for key in BINS)
            + f" ({results[name]['held-out r']:.3f})"
            for name in names
        ]
        seconds = sum(result["seconds"] for result in results.values())
        lines.append(f"| {variant} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    variants = args.variants or list(ROWS)
    if unknown := [name for name in variants if name not in ROWS]:
        raise utils.StageError(
            f"--variants: there is no row {utils.some(unknown)}.", f"Rows: {', '.join(ROWS)}."
        )
    rows: dict[str, dict[str, dict]] = {variant: {} for variant in variants}
    accuracy.check(args)
    code = accuracy.copy_code(args.keep)
    sources = accuracy.sections_of(args, args.keep)
    for name, source in sources.items():
        sample, truth = prepared(code, source, args.keep / name)
        for variant in variants:
            training = states.described(HISTEX.Training(ROWS[variant], seed=args.seed))
            made = accuracy.digest(Path(__file__), sample.name, json.dumps(training), args.n_states)
            key = accuracy.score_key(code, made, source / inputs.TRUTH)

            score = partial(run_variant, sample, truth, ROWS[variant], args.n_states, args.seed)
            result = accuracy.cached(args.keep / name / f"ablation-{key}.json", score)
            rows[variant][name] = result
            print(f"{name}, {variant}: {json.dumps(result)}", file=sys.stderr, flush=True)
    print(table(rows, list(sources)))


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return cli.exit_code(lambda: main(args), args.keep, "results that are finished are kept")


if __name__ == "__main__":
    sys.exit(run())
