"""Predict left-out spots without any truth: what analysis/evaluate.py does with --holdout.

The spots are split into folds. For each, a folder is made in which the left-out spots have neither
place nor counts; get_HR.py and HISTEX.py run there, and the new maps are summed over the left-out
discs. Image, features and mask are taken over: they hold no expression. gene-names.txt is too; if
its genes were selected by their variance, that choice saw all spots, though no prediction did.

Interpolation has the noise of three spots. A Gaussian mean over more of them tells more of a spot
that was left out, so this is what HISTEX has to exceed. In the maps, which know all spots, it is
the other way round: there the mean is too smooth.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import utils
from analysis import inputs, scores, spots
from method.grid import neighbour_distance

PREDICTIONS = ("histex", "linear", "smooth", "nearest")
NAMES = {**scores.METHODS, "smooth": "Gaussian mean of spots, one pitch wide"}


def choose_folds(n_spots: int, n_folds: int, seed: int) -> np.ndarray:
    """Fold (spots,) of every spot; the folds differ by one spot at most."""
    return np.random.default_rng(seed).permutation(n_spots) % n_folds


def link(source: Path, target: Path) -> None:
    """The same file under a second name where the disk can do that, else a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make_fold(
    stage: utils.Stage, folder: Path, locs: pd.DataFrame, counts: pd.DataFrame, kept: np.ndarray
) -> None:
    """A sample directory in which only the spots ``kept`` (spots,) have a place and counts.

    It looks as after image_calibration.py, Histology_Extractor.py and masking_non_tissue.py, with a
    hand-edited locs.csv: their records are there, so that the next scripts check what they always
    check. (Of locs-raw.csv, these see only that it is unchanged; no script reads it again.) The
    mask's record would name the full locs.csv, so the mask comes as one of the user's own.
    """
    names = {utils.MASK.name}
    for script in (utils.CALIBRATION, utils.EXTRACTOR):
        record = utils.read_record(stage, script) or {}
        names |= {utils.record_name(script), *record["inputs"], *record["outputs"]}
    own = {*utils.LOCS.names, *utils.CNTS.names, *utils.GENE_NAMES.names}  # written below: no links
    for name in sorted(names - own):
        if (stage.directory / name).exists():
            link(stage.directory / name, folder / name)
    locs[kept].to_csv(folder / utils.LOCS.name, lineterminator="\n")
    counts[kept].to_csv(folder / utils.CNTS.name, lineterminator="\n")
    lines = "".join(f"{gene}\n" for gene in counts.columns)
    (folder / utils.GENE_NAMES.name).write_text(lines, encoding="utf-8", newline="\n")


def run_script(script: str, folder: Path, options: list[str]) -> None:
    command = [sys.executable, str(utils.ROOT / script), "--directory", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise utils.StageError(
            f"{script} ended with {done.returncode} on a copy without the left-out spots:\n"
            f"{done.stderr.strip()[-2000:]}",
            "See that the sample itself runs with these options, then run the same command.",
        )


def recorded_options(stage: utils.Stage) -> list[str]:
    """The options that HISTEX.py was last run with here; none, its defaults, without a record."""
    record = utils.read_record(stage, utils.HISTEX) or {}
    return [str(option) for option in record.get("options", [])]


def predict_left_out(
    folder: Path, genes: list[str], centres: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Totals (spots, genes) of the maps in ``folder`` over discs, and which spots are on tissue."""
    files = inputs.map_files(folder)
    image = inputs.read_map(files[genes[0]])
    weights = spots.disc_weights(centres, radius, image.shape)
    totals = [spots.sum_discs(weights, inputs.read_map(files[gene])) for gene in genes]
    return np.column_stack(totals), spots.on_tissue(weights, image, radius)


def predict_folds(
    stage: utils.Stage,
    fold: np.ndarray,
    options: list[str],
    place: Path,
    locs: pd.DataFrame,
    counts: pd.DataFrame,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Totals (spots, genes) of each prediction, made without the spot's own fold (spots,).

    And which spots are on tissue. The folders of the folds are made in ``place``.
    """  # fmt: skip
    centres, measured = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, counts.to_numpy(np.float64)
    radius, genes = inputs.read_radius(stage.directory), list(counts.columns)
    predicted = {name: np.empty(measured.shape) for name in PREDICTIONS}
    usable = np.zeros(len(locs), bool)
    for i in range(fold.max() + 1):
        start, out = time.time(), fold == i
        with tempfile.TemporaryDirectory(prefix="evaluation-fold-", dir=place) as name:
            make_fold(stage, Path(name), locs, counts, ~out)
            run_script(utils.HIGH_RESOLUTION, Path(name), [])
            run_script(utils.HISTEX, Path(name), [*options, "--n-plots", "0"])
            found = predict_left_out(Path(name), genes, centres[out], radius)
        predicted["histex"][out], usable[out] = found
        nearest, linear = spots.interpolation_weights(centres[~out], centres[out])
        predicted["nearest"][out] = nearest @ measured[~out]
        predicted["linear"][out] = linear @ measured[~out]
        around = spots.gaussian_weights(centres[~out], centres[out], neighbour_distance(centres))
        predicted["smooth"][out] = around @ measured[~out]
        seconds = time.time() - start
        print(
            f"fold {i + 1}: {out.sum()} of {len(out)} spots left out, {seconds:.0f} s", flush=True
        )
    return predicted, usable


def score_left_out(
    measured: np.ndarray, predicted: dict[str, np.ndarray], genes: list[str]
) -> pd.DataFrame:
    """r per gene (rows) of predicted with measured totals (spots, genes), and the ceiling."""
    rows = []
    for i in range(len(genes)):
        true = measured[:, i]
        row = {"mean_count": true.mean()}
        row |= {
            f"{name}_spots": scores.pearson(sums[:, i], true) for name, sums in predicted.items()
        }
        row["ceiling_spots"] = scores.best_r_of_counts(true)
        _, row["ratio"] = spots.score_totals(predicted["histex"][:, i], true)
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(genes, name="gene"))


def hold_out(
    stage: utils.Stage, n_folds: int, seed: int, options: list[str] | None, place: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Scores per gene on the left-out spots, and the facts of the summary."""
    stage.require(
        utils.HE, utils.LOCS, utils.RADIUS, utils.CNTS, utils.GENE_NAMES, utils.FEATURES, utils.MASK
    )
    for path in (utils.ROOT / utils.HIGH_RESOLUTION, utils.ROOT / utils.HISTEX):
        stage.use(path)  # they make the folds
    if options is None:
        stage.use(stage.directory / utils.record_name(utils.HISTEX))
        options = recorded_options(stage)
    genes = inputs.read_gene_names(stage.directory)
    locs, counts = inputs.read_tables(stage, genes)
    if not 2 <= n_folds <= len(locs):
        raise utils.StageError(
            f"--holdout is {n_folds}; expected 2 to {len(locs)}, the number of spots.",
            f"Run: {stage.command()}",
        )
    fold = choose_folds(len(locs), n_folds, seed)
    predicted, usable = predict_folds(stage, fold, options, place, locs, counts)
    measured = counts.to_numpy(np.float64)[usable]
    table = score_left_out(measured, {k: v[usable] for k, v in predicted.items()}, genes)
    middle = table.median()
    facts = {
        "folds": n_folds,
        "seed": seed,
        "options of HISTEX.py": shlex.join(options),
        "genes": len(genes),
        "spots": int(usable.sum()),
        "spots without tissue": int((~usable).sum()),
        "median r": {
            name: scores.rounded(middle[f"{name}_spots"]) for name in (*PREDICTIONS, "ceiling")
        },
        "median ratio": scores.rounded(middle["ratio"]),
    }
    return table, facts
