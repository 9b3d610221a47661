"""Tables of spots: places and counts, checked cell by cell."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from utils import Stage, duplicates, is_number, some

UNREADABLE = (ValueError, EOFError, OSError, zlib.error, csv.Error)  # what damaged tables raise
BLOCK_CELLS = 2**24  # of a table read at a time: about 0.5 GB by pandas
MAX_DIGITS = 9  # of a number that is read without pandas; no count is longer
ID = "\0id"  # the column of the ids; no header holds this


def _open_table(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_header(stage: Stage, path: Path) -> tuple[list[str], str, bool]:
    """Column names (without the id column), delimiter, and whether the file has data rows.

    R's write.table leaves the id column without a name; then the rows have one field more.
    """
    try:
        with _open_table(path) as file:
            first, second = file.readline(), file.readline()
    except UNREADABLE as error:
        raise stage.error(path, f"cannot be read as text: {error}") from error
    delimiter = max(",\t;", key=first.count)
    if first.count(delimiter) == 0:
        raise stage.error(
            path,
            f"has one column only ({first.strip()[:40]!r}); expected commas or tabs between them.",
        )
    try:
        rows = [line for line in (first, second) if line.strip()]
        header, *row = csv.reader(rows, delimiter=delimiter)
    except (ValueError, csv.Error) as error:
        raise stage.error(path, f"is not a table: {error}") from error
    row = row[0] if row else []
    names = header if len(row) == len(header) + 1 else header[1:]
    return [name.strip() for name in names], delimiter, bool(row)


def _lines_below_header(stage: Stage, path: Path, size: int) -> Iterator[tuple[int, list[str]]]:
    """The other lines of a table, ``size`` at a time, and how many lines came before them."""
    before = 1
    try:
        with _open_table(path) as file:
            file.readline()
            while lines := list(itertools.islice(file, size)):
                yield before, lines
                before += len(lines)
    except UNREADABLE as error:
        raise stage.error(path, f"cannot be read: {error}") from error


def _whole_numbers(lines: list[str], delimiter: str, n: int) -> tuple[list[str], np.ndarray] | None:
    """Ids and numbers (rows, n) of lines of a table; None if some are not plain whole numbers.

    Most tables of counts hold nothing else, and pandas takes five times as long for the same bits.
    """
    ids, values = [], np.empty((len(lines), n), np.float32)
    for row, line in enumerate(lines):
        name, _, cells = line.rstrip("\r\n").partition(delimiter)
        if len(name) > 1 and name[0] == name[-1] == '"':
            name = name[1:-1]
        text = (cells + delimiter).replace(f".0{delimiter}", delimiter)
        digits = np.frombuffer(text.encode(), np.uint8) - np.uint8(ord("0"))
        ends = np.flatnonzero(digits > 9)  # what comes before 0 wraps around
        lengths = np.diff(ends, prepend=-1) - 1
        if '"' in name or "\0" in name or not len(ends) == text.count(delimiter) == n:
            return None
        if lengths.min() < 1 or lengths.max() > MAX_DIGITS:
            return None
        numbers = digits[ends - 1].astype(np.float64)
        for place in range(1, lengths.max()):
            longer = np.flatnonzero(lengths > place)
            numbers[longer] += 10.0**place * digits[ends[longer] - 1 - place]
        ids.append(name)
        values[row] = numbers
    return ids, values


def _any_numbers(
    stage: Stage, path: Path, text: str, n_before: int, options: dict[str, Any], columns: list[str]
) -> tuple[list[str], np.ndarray]:
    """Ids and numbers (rows, columns) of a part of a table, below its first ``n_before`` rows."""
    try:
        # A number beyond float32 becomes inf, which is refused later; a row with too many fields
        # would lose the last ones with no more than a warning.
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(io.StringIO(text), **options)
    except pd.errors.ParserWarning as error:
        n_fields = len(options["names"])
        raise stage.error(
            path, f"has rows with more fields than the {n_fields} columns of its header."
        ) from error
    except UNREADABLE as error:
        problem = _where_not_numeric(text, n_before, options, columns)
        raise stage.error(path, problem or f"cannot be read: {error}") from error
    return list(table[ID]), table[columns].to_numpy()


def _where_not_numeric(
    text: str, n_before: int, options: dict[str, Any], columns: list[str]
) -> str | None:
    """Name the first cell that is no number, reading the table a second time as text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            table = pd.read_csv(io.StringIO(text), **{**options, "dtype": str})
    except UNREADABLE:
        return None
    for column in columns:
        bad = np.flatnonzero(pd.to_numeric(table[column], errors="coerce").isna())
        if len(bad):
            rows = ", ".join(str(n_before + row + 1) for row in bad[:5])
            found = table[column].iat[bad[0]]
            return f"holds {found!r} in column {column}, data row {rows}; expected a number."
    return None


def _read_table(
    stage: Stage, path: Path, numeric: list[str] | None, pack: Callable[[np.ndarray], Any]
) -> tuple[pd.Index, list[str], list[Any]]:
    """Ids of the rows (text), names of the columns, and blocks of rows (rows, columns), packed.

    ``numeric`` are the columns to read, as float64; None is for all, as float32. Every block goes
    through ``pack`` as soon as it is read, so that a large table is never held whole.
    """
    names, delimiter, has_rows = _read_header(stage, path)
    if not has_rows:
        raise stage.error(path, "has a header but no spot.")
    if repeated := duplicates(names):
        raise stage.error(path, f"names the columns {some(repeated)} more than once.")
    missing = [name for name in numeric or [] if name not in names]
    if missing:
        raise stage.error(
            path, f"has the columns {some(names)}; expected a column {' and '.join(missing)}."
        )
    columns = names if numeric is None else numeric
    others = np.float32 if numeric is None else str
    types = defaultdict(lambda: others, {ID: str, **dict.fromkeys(numeric or [], np.float64)})
    options: dict[str, Any] = {
        "sep": delimiter, "header": None, "names": [ID, *names], "dtype": types,
        "keep_default_na": False, "index_col": False, "low_memory": False,
    }  # fmt: skip
    ids: list[str] = []
    blocks, first, n_bad = [], "", 0
    for before, lines in _lines_below_header(stage, path, max(1, BLOCK_CELLS // len(names))):
        block = _whole_numbers(lines, delimiter, len(names)) if numeric is None else None
        if block is None:
            # Blank lines are skipped, but let the parser's messages count from the top of the file.
            text = "\n" * before + "".join(lines)
            block = _any_numbers(stage, path, text, len(ids), options, columns)
        found, values = [name.strip() for name in block[0]], block[1]
        bad = np.argwhere(~np.isfinite(values))
        if len(bad) and not n_bad:
            row, column = bad[0]
            first = (
                f"holds {values[row, column]} for spot {found[row]}, column {columns[column]} "
                f"(data row {len(ids) + row + 1})"
            )
        n_bad += len(bad)
        ids += found
        blocks.append(pack(values))
    if n_bad:
        raise stage.error(path, f"{first}; {n_bad} of its values are not finite numbers.")
    if repeated := duplicates(ids):
        raise stage.error(path, f"lists the spots {some(repeated)} more than once.")
    return pd.Index(ids, dtype=str), columns, blocks


def read_locs(stage: Stage, path: Path) -> pd.DataFrame:
    """Spot centres: index = spot id (text), columns x, y (float64)."""
    ids, columns, blocks = _read_table(stage, path, ["x", "y"], np.asarray)
    locs = pd.DataFrame(np.concatenate(blocks), ids, columns)
    repeated = locs.index[locs.duplicated()]
    if len(repeated):
        raise stage.error(path, f"gives the spots {some(repeated)} the place of another spot.")
    return locs


def read_sparse_counts(
    stage: Stage, path: Path, spots: pd.Index
) -> tuple[sparse.csr_array, list[str]]:
    """Counts (len(spots), genes) float32 without the zeros, in the order of ``spots``; the genes.

    Rows without a location are dropped with a note; a location without counts is an error.
    """
    ids, genes, blocks = _read_table(stage, path, None, sparse.csr_array)
    if all(is_number(name) for name in genes):
        raise stage.error(path, f"has the gene names {some(genes)}; the header line is missing.")
    missing = spots.difference(ids, sort=False)
    if len(missing):
        raise stage.error(
            path,
            f"has no counts for {len(missing)} of the {len(spots)} spots that have a location: "
            f"{some(missing)}; its own ids look like {some(ids)}.",
        )
    extra = len(ids) - len(spots)
    if extra:
        print(f"{path.name}: {extra} of {len(ids)} rows have no location and are left out")
    counts = sparse.vstack(blocks, format="csr")
    del blocks
    counts = counts[ids.get_indexer(spots)]
    if (counts.data < 0).any():
        at = int(np.argmax(counts.data < 0))
        row = int(np.searchsorted(counts.indptr, at, side="right")) - 1
        raise stage.error(
            path,
            f"holds {counts.data[at]:g} for spot {spots[row]}, gene "
            f"{genes[counts.indices[at]]}; counts cannot be negative.",
        )
    if not counts.nnz:
        raise stage.error(path, "holds nothing but zeros; expected raw counts.")
    if (counts.data != np.floor(counts.data)).any():
        stage.warn(f"{path.name} holds fractions; raw counts are expected, not normalised ones")
    return counts, genes


def read_counts(stage: Stage, path: Path, spots: pd.Index) -> pd.DataFrame:
    """``read_sparse_counts`` as a table, zeros and all."""
    counts, genes = read_sparse_counts(stage, path, spots)
    return pd.DataFrame(counts.toarray(), spots, genes, copy=False)
