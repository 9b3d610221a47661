"""The uncertainty of the maps: the variance of each gene's errors, by held-out spots.

The errors of a spot's counts are those of a sum over its disc, whose variance follows from the
shape that all genes have in common (errors.py). What the squared errors are above the noise of
counts tells the factor of the gene.

Letters in shapes: B spots, C superpixels of a disc, G genes, M held-out spots.
"""

from __future__ import annotations

import numpy as np
import torch

import utils
from method.errors import correlations, coverage, growth
from method.network import Network, run_batch
from method.section import Section, Split
from method.states import State

TYPICAL = 2.0  # variance in the middle of a spot over the gene's squared mean, of the median gene
GENE_FACTOR = 3.0  # a gene's own lies within a third and three times that of the median gene
MIN_CALIBRATION_COUNTS = 50  # held-out counts of which 1 is expected; with fewer: TYPICAL
SCORED_AT_ONCE = 16  # held-out spots


def of_disc(
    network: Network, section: Section, split: Split, batch: np.ndarray, device: torch.device
) -> np.ndarray:
    """Variance (B, G) of the predicted counts of held-out spots, for genes of factor 1."""
    output, areas, _ = run_batch(network, section, split, batch, device)
    maps, chosen = network.to_counts(output).cpu().numpy(), section.chosen[batch]
    row, col = section.patches(np.floor(section.spots[batch]).astype(int))
    places = np.stack([np.take_along_axis(x, chosen, axis=1) for x in (row, col)], axis=-1)
    out = np.empty((len(batch), maps.shape[-1]), np.float32)
    for i, (place, area) in enumerate(zip(places, areas.cpu().numpy(), strict=True)):
        grown = growth(place + 0.5, section.spots[split.train], section.radius)
        sd = area[:, None] * np.sqrt(grown[:, None] * maps[i])
        out[i] = (sd * (correlations(place) @ sd)).sum(axis=0)
    return out


def held_out_variance(
    states: list[State], section: Section, held_out: np.ndarray, device: torch.device
) -> np.ndarray:
    """Variance (M, G) of the counts predicted in the held-out spots (M,), for genes of factor 1."""
    out = np.empty((len(held_out), section.counts.shape[1]), np.float32)
    for state in reversed(states):  # the first that holds a spot out scores it
        spots = state.split.held_out
        state.network.eval()
        with torch.inference_mode():
            parts = [
                of_disc(state.network, section, state.split, batch, device)
                for batch in np.array_split(spots, -(-len(spots) // SCORED_AT_ONCE))
            ]
        out[np.searchsorted(held_out, spots)] = np.concatenate(parts)
    return out


def fit_factors(
    measured: np.ndarray, predicted: np.ndarray, variance: np.ndarray, disc: float
) -> np.ndarray:
    """Factors (G,), in counts, that turn the variances (M, G) into those of the held-out counts.

    What the squared errors of a gene are above the noise of counts is shared out over its spots.
    Genes differ in this by their means per superpixel, of which there are ``disc`` in a spot; what
    is left lies within GENE_FACTOR of the median gene, for a few spots tell it badly.
    """
    mean = np.maximum(predicted.mean(axis=0), 1e-6) / disc
    if (predicted >= 1).sum() < MIN_CALIBRATION_COUNTS:
        return (TYPICAL * mean).astype(np.float32)
    excess = (np.square(measured - predicted) - predicted).sum(axis=0)
    said = np.maximum(variance.sum(axis=0) * mean, 1e-12)
    own = np.where(predicted.sum(axis=0) > 0, excess / said, 0)
    middle = np.median(own[own > 0]) if (own > 0).any() else TYPICAL
    return (mean * own.clip(middle / GENE_FACTOR, middle * GENE_FACTOR)).astype(np.float32)


def calibrate(
    measured: np.ndarray, predicted: np.ndarray, variance: np.ndarray, disc: float
) -> tuple[np.ndarray, float | None]:
    """The factors of ``fit_factors``, and the coverage of counts by intervals fitted without them.

    Each half of the held-out spots is judged by the factors of the other half.
    """
    halves, counts, means, sds = (slice(0, None, 2), slice(1, None, 2)), [], [], []
    for learn, judge in (halves, halves[::-1]):
        if not len(measured[learn]):
            continue
        factors = fit_factors(measured[learn], predicted[learn], variance[learn], disc)
        seen = predicted[judge] >= 1
        counts.append(np.rint(measured[judge][seen]))
        means.append(predicted[judge][seen])
        sds.append(np.sqrt(factors * variance[judge])[seen])
    known = sum(map(len, counts)) >= MIN_CALIBRATION_COUNTS
    covered = coverage(*map(np.concatenate, (counts, means, sds))) if known else None
    factors = fit_factors(measured, predicted, variance, disc)
    return factors, None if covered is None else round(covered, 4)


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
