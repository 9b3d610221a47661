"""--format spots of analysis/export.py: the maps summed over the discs of the spots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import utils
from analysis.formats.mapset import MapSet, each_map
from analysis.regions import MORE_SPOTS, centres_of, discs_of
from analysis.sheets import warn_of_formulas
from analysis.spots import sum_discs
from reading import tables

SPOT_SUPERPIXELS = 100  # of Visium, there is less than one spot in so many


def bytes_needed(source: MapSet) -> int:
    """Of the disk: digits."""
    return 12 * len(source.files) * source.n_superpixels // SPOT_SUPERPIXELS


def write(source: MapSet, target: Path) -> None:
    stage = source.stage
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    discs, kept = discs_of(stage, centres_of(locs), source.tissue)
    if not kept.any():
        problem = "has no spot on the tissue of the maps."
        raise stage.error(stage.path(utils.LOCS), problem, MORE_SPOTS)
    print(f"{kept.sum()} of {len(locs)} spots lie on the tissue")
    totals = np.column_stack([sum_discs(discs[kept], image) for image in each_map(source)])
    table = pd.DataFrame(totals, locs.index[kept], source.genes)
    for names in (table.index, source.genes):
        warn_of_formulas(stage, names)
    table.to_csv(target, lineterminator="\n", float_format="%.7g")
