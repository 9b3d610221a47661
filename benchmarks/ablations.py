"""What each part of HISTEX.py's default preset brings: take one away, train, score.

    python benchmarks/ablations.py --directory data/section --keep results
    python benchmarks/ablations.py --simulated 3 --variants default "no averaging" --states 2

Sections are those of benchmarks/accuracy.py: samples with a truth.npz, and simulated ones. Every
variant changes one thing of HISTEX.py, trains its states (state i by seed + i, the same start for
all variants) and scores the anchored maps: median over genes of Pearson r with the truth at 8 and
32 um, beside r on the held-out spots, which needs no truth and on which a choice should rest.
Prints a table in Markdown, a row a variant; results are kept as JSON in --keep, by which a later
run goes on. The truth is used for the score only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import HISTEX
import utils
from analysis import inputs
from benchmarks import accuracy

BINS = ("r 1x", "r 4x")


def keep(gradient: Tensor, columns: slice) -> Tensor:
    """The gradient of some columns; the weights of the others start at zero and stay there."""
    kept = torch.zeros_like(gradient)
    kept[:, columns] = gradient[:, columns]
    return kept


class WithoutAttention(HISTEX.Network):
    """The context enters by interpolation only."""

    def __init__(self, section: HISTEX.Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.log_factor.weight.register_hook(lambda grad: keep(grad, slice(HISTEX.WIDTH, None)))


class WithoutHistology(HISTEX.Network):
    """Tokens act through the attention only."""

    def __init__(self, section: HISTEX.Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.log_factor.weight.register_hook(lambda grad: keep(grad, slice(HISTEX.WIDTH)))


class SingleTokenDropout(HISTEX.Network):
    """Every superpixel hides other features."""

    def __init__(self, section: HISTEX.Section, train: np.ndarray) -> None:
        super().__init__(section, train)
        self.embed_tokens[0] = nn.Dropout(HISTEX.DROPOUT)


class OneScale(HISTEX.Network):
    halo = 0


class PlainLoss(HISTEX.Network):
    """Squared error of the counts, each gene scaled by its mean."""

    def loss(self, maps: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        total = torch.einsum("btg,bt->bg", maps, areas)
        return ((total - counts) * self.root_scale**2).square()


class PoissonLoss(HISTEX.Network):
    """Negative log likelihood of the counts, each gene scaled by the root of its mean."""

    def loss(self, maps: Tensor, areas: Tensor, counts: Tensor) -> Tensor:
        total = torch.einsum("btg,bt->bg", maps, areas) + 1e-3
        return (total - counts * total.log()) * self.root_scale


VARIANTS: dict[str, dict] = {  # names in HISTEX.py and what they become
    "default": {},
    "no anchoring": {"anchor_to_spots": lambda maps, measured, anchors: None},
    "no averaging of weights": {"AVERAGING_DECAY": 0.0},
    "dropout 0.1": {"DROPOUT": 0.1},
    "dropout 0.3": {"DROPOUT": 0.3},
    "dropout of single tokens": {"NETWORKS": SingleTokenDropout},
    "no context dropout": {"CONTEXT_DROPOUT": 0.0},
    "weight decay 0.01": {"WEIGHT_DECAY": 0.01},
    "weight decay 3": {"WEIGHT_DECAY": 3.0},
    "without all of these four": {
        "AVERAGING_DECAY": 0.0, "DROPOUT": 0.1, "CONTEXT_DROPOUT": 0.0, "WEIGHT_DECAY": 0.01,
    },
    "learning rate 3e-4": {"LEARNING_RATE": {"default": 3e-4}},
    "batch 32": {"BATCH": 32},
    "patience 20": {"PATIENCE_EPOCHS": 20},
    "one token scale": {"SCALES": (), "NETWORKS": OneScale},
    "8 HR points": {"DEFAULT_CONTEXT": 8},
    "32 HR points": {"DEFAULT_CONTEXT": 32},
    "no attention": {"NETWORKS": WithoutAttention},
    "attention only": {"NETWORKS": WithoutHistology},
    "plain squared error": {"NETWORKS": PlainLoss},
    "Poisson loss": {"NETWORKS": PoissonLoss},
    "anchor prior 1": {"ANCHOR_PRIOR": 1.0},
    "anchor prior 5": {"ANCHOR_PRIOR": 5.0},
}  # fmt: skip


@contextlib.contextmanager
def changed(names: dict):
    """HISTEX.py with some of its names changed."""
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            value = {"default": value} if name == "NETWORKS" else value
            stack.enter_context(mock.patch.object(HISTEX, name, value))
        yield


def run_variant(sample: Path, truth, variant: str, args: argparse.Namespace) -> dict:
    """Train and score one variant on a sample whose first four stages are done."""
    options = HISTEX.build_parser().parse_args(["--directory", str(sample)])
    options.seed = args.seed
    quiet = contextlib.redirect_stdout(io.StringIO())
    with changed(VARIANTS[variant]), tempfile.TemporaryDirectory() as folder, quiet:
        section, _, genes = HISTEX.read_section(utils.Stage(HISTEX.SCRIPT, options))
        start = time.perf_counter()
        networks, held_out, predicted = zip(
            *(
                HISTEX.train_state(section, Path(folder) / str(i), options, "", i, "cpu")
                for i in range(args.states)
            ),
            strict=True,
        )
        seconds = time.perf_counter() - start
        maps = np.full((len(genes), *section.tissue.shape), np.nan, np.float32)
        with tempfile.TemporaryFile() as file:
            prediction = HISTEX.Prediction(networks, section, options, file, "cpu")
            for chosen in prediction.blocks():
                maps[chosen, prediction.shown] = prediction.maps(chosen)[0]
    held_out, predicted = np.concatenate(held_out), np.concatenate(predicted)
    r = HISTEX.correlations(predicted, section.counts[held_out])
    h, w = truth.tissue.shape
    order = [genes.index(gene) for gene in truth.genes]
    scores = accuracy.score_maps(truth, maps[order, :h, :w].transpose(1, 2, 0))
    return {"held-out r": float(np.nanmedian(r)), "seconds": seconds, **scores}


def prepared(code: Path, source: Path, work: Path) -> tuple[Path, inputs.Truth]:
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    accuracy.add_sections(parser)
    option = parser.add_argument
    option("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
           help=f"Rows of the table, of: {', '.join(VARIANTS)}.")  # fmt: skip
    option("--states", type=utils.positive, default=1, help="Networks a variant.")
    option("--seed", type=utils.not_negative, default=0, help="Random seed of the first state.")
    option("--keep", type=Path, required=True, help="Folder for samples and results.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows: dict[str, dict[str, dict]] = {variant: {} for variant in args.variants}
    version = accuracy.digest(Path(HISTEX.__file__), Path(__file__))
    try:
        accuracy.check(args)
        code = accuracy.copy_code(args.keep)
        sources = accuracy.sections_of(args, args.keep)
        for name, source in sources.items():
            sample, truth = prepared(code, source, args.keep / name)
            for variant in args.variants:
                made = accuracy.digest(version, sample.name, variant, args.states, args.seed)
                key = accuracy.score_key(code, made, source / inputs.TRUTH)
                run = lambda s=sample, t=truth, v=variant: run_variant(s, t, v, args)  # noqa: E731
                result = accuracy.cached(args.keep / name / f"ablation-{key}.json", run)
                rows[variant][name] = result
                print(f"{name}, {variant}: {json.dumps(result)}", file=sys.stderr, flush=True)
    except utils.StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, list(sources)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
