"""Which genes are chosen where the user names none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def most_variable(counts: sparse.csr_array, names: Sequence[str], n: int) -> np.ndarray:
    """Columns of the ``n`` genes whose counts (spots, genes) vary most, ascending.

    Equal variances go by gene name. Constant genes are never among them, so that there may be fewer
    than ``n``. Sums of whole numbers are exact, so the order of the spots cannot change the choice.
    """
    n_spots, n_genes = counts.shape
    values = counts.data.astype(np.float64)
    total = np.bincount(counts.indices, values, n_genes)
    variance = np.bincount(counts.indices, values**2, n_genes) - total**2 / n_spots
    varies = (counts.max(axis=0) > counts.min(axis=0)).toarray().ravel()
    ranked = np.lexsort((np.array(names), -variance))
    return np.sort(ranked[varies[ranked]][:n])
