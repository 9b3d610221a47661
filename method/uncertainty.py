"""The uncertainty of the maps: how far passes with random dropout differ, calibrated on spots.

Letters in shapes: G genes, M held-out spots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import utils
from method.network import Pass, disc_sums, run_batch
from method.section import Section
from method.states import State

HELD_OUT_PASSES = 32  # with dropout, in the held-out spots, which only one state has not seen
SCORED_AT_ONCE = 16  # held-out spots
ANSCOMBE = 0.375  # sqrt(count + 3/8) has a variance of 1/4 whatever the count (Anscombe 1948)
COVERAGE, COVERED_SD = 0.9, 1.645  # share of the counts in an interval; its half width
GENE_FACTOR = 3.0  # a gene's own scaling lies within a third and three times the median one
MIN_CALIBRATION_COUNTS = 50


class Spread:
    """Running mean and variance of equally shaped samples (Welford 1962)."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, sample: Tensor) -> None:
        self.n += 1
        if self.n == 1:
            self.mean, self.squares = sample.clone(), torch.zeros_like(sample)
            return
        step = sample - self.mean
        self.mean += step / self.n
        self.squares += step * (sample - self.mean)

    def relative(self) -> Tensor:
        """Standard deviation as a share of the mean; 0 where all samples are 0."""
        sd = (self.squares / max(self.n - 1, 1)).sqrt()
        return torch.where(self.mean > 0, sd / self.mean, 0)


def held_out_spread(
    states: list[State], section: Section, held_out: np.ndarray, seed: int, device: torch.device
) -> np.ndarray:
    """Relative spread (M, G) of the counts predicted in the held-out spots (M,).

    Over dropouts only: of the networks, just one has not been trained on a spot.
    """
    out = np.empty((len(held_out), section.counts.shape[1]), np.float32)
    for index, state in reversed(list(enumerate(states))):  # the first that holds a spot out scores
        spots, spread = state.split.held_out, Spread()
        batches = np.array_split(spots, -(-len(spots) // SCORED_AT_ONCE))
        with torch.inference_mode():
            for dropout in range(1, 1 + HELD_OUT_PASSES):
                network = Pass(state.network, dropout).start(seed, index)
                parts = (
                    run_batch(network, section, state.split, batch, device)[:2] for batch in batches
                )
                spread.add(torch.cat([disc_sums(*part) for part in parts]))
        out[np.searchsorted(held_out, spots)] = spread.relative().cpu().numpy()
    return out


def needed_scale(measured: np.ndarray, predicted: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Smallest factor on ``sd`` by which each count lies in the 90 % interval of its expectation.

    On the scale of square roots, where counting noise has a variance of 1/4 and an expectation with
    a standard deviation adds sd^2 / (4 predicted) (Anscombe 1948). 0 where the noise is enough.
    """
    missed = 2 * (np.sqrt(measured + ANSCOMBE) - np.sqrt(predicted + ANSCOMBE)) / COVERED_SD
    with np.errstate(divide="ignore"):
        return np.sqrt((missed**2 - 1).clip(min=0) * (predicted + ANSCOMBE)) / sd


def fit_spread(measured: np.ndarray, predicted: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Factors (G,) that turn a relative spread into a relative standard deviation.

    By held-out spots, all (M, G): the mean square of a gene's errors becomes what it should be, and
    90 % of the counts of all genes lie in their intervals. Poor counts may do so by their noise
    alone, which does not make the maps certain: the second step divides by GENE_FACTOR at most.
    Only counts of which at least 1 is expected teach anything.
    """
    seen = (predicted >= 1) & (spread > 0)
    if seen.sum() < MIN_CALIBRATION_COUNTS:
        return np.ones(measured.shape[1], np.float32)
    noise = predicted + ANSCOMBE
    missed = 4 * (np.sqrt(measured + ANSCOMBE) - np.sqrt(noise)) ** 2 - 1
    excess = (missed * noise * seen).sum(axis=0)
    ours = ((spread * predicted) ** 2 * seen).sum(axis=0)
    known = (excess > 0) & (ours > 0)
    factor = np.sqrt(excess[known] / ours[known])
    median = np.median(factor) if known.any() else 1.0
    factors = np.full(measured.shape[1], median)
    factors[known] = factor.clip(median / GENE_FACTOR, median * GENE_FACTOR)
    needed = needed_scale(measured[seen], predicted[seen], (factors * spread * predicted)[seen])
    scale = max(np.quantile(needed, COVERAGE), 1 / GENE_FACTOR)
    return (factors * scale).astype(np.float32)


def calibrate_spread(
    measured: np.ndarray, predicted: np.ndarray, spread: np.ndarray
) -> tuple[np.ndarray, float | None]:
    """The factors of ``fit_spread``, and how many counts lie in intervals fitted without them.

    Each half of the held-out spots is judged by the factors of the other half.
    """
    halves, parts = (slice(0, None, 2), slice(1, None, 2)), []
    for learn, judge in (halves, halves[::-1]):
        factors = fit_spread(measured[learn], predicted[learn], spread[learn])
        m, p, sd = measured[judge], predicted[judge], (factors * spread * predicted)[judge]
        seen = (p >= 1) & (sd > 0)
        parts.append(needed_scale(m[seen], p[seen], sd[seen]) <= 1)
    inside = np.concatenate(parts)
    covered = round(float(inside.mean()), 4) if len(inside) else None
    return fit_spread(measured, predicted, spread), covered


def report_coverage(stage: utils.Stage, covered: float | None) -> float | None:
    """Say how many held-out counts lie in their intervals."""
    if covered is None:
        stage.warn(
            f"{utils.SPREAD.name} is not calibrated: in held-out spots hardly any gene is "
            f"expected to have a count"
        )
    else:
        print(
            f"  intervals {covered:.0%} of held-out counts lie in a 90 % interval that was "
            f"calibrated on other held-out spots"
        )
    return covered
