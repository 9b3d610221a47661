"""Marker genes of common tissues, for analysis/annotate.py: the table markers.csv.

A row is a gene, the label that it marks in a tissue, and where that is published; of ScType's table
the entry is named. The genes are human; those of other species are found by their letters, whatever
the capitals. They mark kinds of cells that single-cell studies tell apart; at 8 um a superpixel
holds parts of several.
"""

from __future__ import annotations

import csv
from pathlib import Path

TABLE = Path(__file__).with_suffix(".csv")


def rows_of(tissue: str | None = None) -> list[dict[str, str]]:
    """Rows with tissue, label, gene and source; of one tissue, or of all."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if tissue in (None, row["tissue"])]


def tissues() -> list[str]:
    return list(dict.fromkeys(row["tissue"] for row in rows_of()))


def markers_among(tissue: str, genes: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of a tissue whose gene is one of ``genes``, spelt as there; labels without any."""
    spelling = {gene.casefold(): gene for gene in genes} | {gene: gene for gene in genes}
    found, labels = [], []
    for row in rows_of(tissue):
        gene = spelling.get(row["gene"], spelling.get(row["gene"].casefold()))
        labels.append(row["label"])
        if gene is not None:
            found.append({**row, "gene": gene})
    left = {row["label"] for row in found}
    return found, [label for label in dict.fromkeys(labels) if label not in left]
