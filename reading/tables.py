"""Tables of spots: places and counts, checked cell by cell."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from reading import genes as gene_names
from reading import plain
from utils import Stage, duplicates, some

SEP = re.compile(r'"?sep=.?"?\s*$', re.IGNORECASE)  # the line in which Excel names its separator
BLOCK_CHARACTERS = 2**20  # of a table read at a time
MAX_PLACE_PX = 1e7  # of a spot; ten times the longest side of a slide
MAX_COUNT = 1e9  # of a gene in a spot: a whole spot has 1e5 molecules, and no sum overflows yet
UNREADABLE = (ValueError, csv.Error, *plain.DAMAGED)  # ValueError: Unfit, and what is no UTF-8
Table = tuple[pd.Index, list[str], sparse.csr_array]
Row = tuple[str, int, str]  # id, number of other fields, and those that are read, a line each


def _lines(path: Path) -> Generator[list[str], None, None]:
    """The lines that are not blank, many at a time."""
    with plain.open_text(path) as file:
        while lines := file.readlines(BLOCK_CHARACTERS):
            if any("\0" in line for line in lines):
                raise plain.Unfit("it holds zero bytes, as no text does.")
            yield [line for line in lines if line.strip() and not SEP.match(line)]


def _delimiter(line: str) -> str:
    """Comma, tab or semicolon, whichever the first line of a table has most of."""
    delimiter = max(",\t;", key=line.count)
    if delimiter not in line:
        raise plain.Unfit(
            f"it has one column only ({line.strip()[:40]!r}); expected commas, tabs or semicolons "
            f"in it."
        )
    return delimiter


def _header(lines: list[str]) -> tuple[list[str], str]:
    """Column names without that of the ids, and the delimiter, of a table's first two lines.

    R's write.table leaves the id column without a name; then the rows have one field more.
    """
    delimiter = _delimiter("".join(lines[:1]))
    header, *rows = csv.reader(lines, delimiter=delimiter)
    if not rows:
        raise plain.Unfit("it has a header but no spot.")
    names = list(map(str.strip, header if len(rows[0]) == len(header) + 1 else header[1:]))
    return names, delimiter


def _split(lines: list[str], delimiter: str, picked: list[int] | None) -> list[Row]:
    """The rows; ``picked`` are the fields to read, None is all."""
    if picked is None and not any('"' in line for line in lines):  # much faster than csv
        parts = [line.rstrip("\n").partition(delimiter) for line in lines]
        return [(i, c.count(delimiter) + len(d), c.replace(delimiter, "\n")) for i, d, c in parts]
    rows = [(name, cells) for name, *cells in csv.reader(lines, delimiter=delimiter)]
    at = range(max(len(cells) for _, cells in rows)) if picked is None else picked
    return [(i, len(c), "\n".join(c[k] for k in at if k < len(c))) for i, c in rows]


def shown(names: list[str]) -> str:
    """Names for a message; one that is empty, as behind the last column of a spreadsheet, shows."""
    return some([name or "'' (no name)" for name in names])


def point(cell: str) -> str:
    """A hint if a cell would be a number with a decimal point."""
    decimal = "," in cell and plain.is_number(cell.replace(",", ".", 1))
    return ", written with a decimal point and without thousands separators" if decimal else ""


def _numbers(rows: list[Row], before: int, columns: list[str], dtype: type) -> sparse.csr_array:
    """Numbers (rows, columns) of rows that ``before`` others precede; beyond float32 lies inf.

    To pandas they are one column, so that wide tables take no longer.
    """
    text = "".join([f"{cells}\n" for *_, cells in rows])
    with np.errstate(over="ignore"):
        try:
            flat = pd.read_csv(
                io.StringIO(text), sep="\x1f", header=None, dtype=dtype, keep_default_na=False,
                skip_blank_lines=False, quoting=csv.QUOTE_NONE, low_memory=False,
            ).to_numpy().ravel()  # fmt: skip
        except ValueError:  # slower, but it goes on behind what is no number
            cells = np.array(text.split("\n")[:-1], object)
            flat = pd.to_numeric(cells, errors="coerce").astype(dtype)
    values = flat.reshape(len(rows), len(columns))
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        cell = text.split("\n")[row * len(columns) + column]
        beyond = f", read as {values[row, column]}," if plain.is_number(cell) else ""
        where = f"spot {rows[row][0]}, column {columns[column]} (data row {before + row + 1})"
        raise plain.Unfit(f"it holds {cell!r}{beyond} for {where}; expected a number{point(cell)}.")
    return sparse.csr_array(values)


def read_table(path: Path, wanted: list[str] | None = None, repeats: bool = False) -> Table:
    """Ids of the rows (text), names of all columns, and numbers (rows, columns) without the zeros.

    The ``wanted`` columns are float64, or all of them float32. No large table is ever held whole.
    What is wrong with the file is one of UNREADABLE; columns of one name are, unless ``repeats``.
    """
    ids: list[str] = []
    blocks: list[sparse.csr_array] = []
    with contextlib.closing(_lines(path)) as parts:
        first = [*next(parts, []), *next(parts, [])]  # a header may fill a part alone
        names, delimiter = _header(first[:2])
        if not repeats and (repeated := duplicates(names)):
            raise plain.Unfit(f"it names the columns {shown(repeated)} more than once.")
        columns, dtype = (wanted, np.float64) if wanted else (names, np.float32)
        if missing := " and ".join(sorted(set(columns) - set(names))):
            raise plain.Unfit(f"it has the columns {some(names)}; expected a column {missing}.")
        picked = [names.index(name) for name in wanted] if wanted else None
        for lines in filter(None, itertools.chain([first[1:]], parts)):
            rows = _split(lines, delimiter, picked)
            for row, (name, n, _) in enumerate(rows, len(ids) + 1):
                if n != len(names):
                    lack = f", none for column {names[n]}" if n < len(names) else ""
                    where = f"for spot {name[:40]!r} (data row {row})"
                    raise plain.Unfit(f"it has {n} fields {where}{lack}; expected {len(names)}.")
            blocks.append(_numbers(rows, len(ids), columns, dtype))
            ids += [name.strip() for name, *_ in rows]
    if repeated := duplicates(ids):
        raise plain.Unfit(f"it lists the spots {some(repeated)} more than once.")
    return pd.Index(ids, dtype=str), names, sparse.vstack(blocks, format="csr")


def column_names(path: Path) -> list[str]:
    """Those of read_table, without reading the rows."""
    with contextlib.closing(_lines(path)) as parts:
        return _header([*next(parts, []), *next(parts, [])][:2])[0]


def read_rows(path: Path) -> list[list[str]]:
    """The cells of a small table as text, stripped, row by row; all rows have as many.

    What is wrong with the file is one of UNREADABLE. A row that is the first has no more meaning
    than the others; as the header of R's write.table, it may lack the first cell.
    """
    with contextlib.closing(_lines(path)) as parts:
        lines = list(itertools.chain.from_iterable(parts))
    if not lines:
        raise plain.Unfit("it is empty.")
    rows = [list(map(str.strip, row)) for row in csv.reader(lines, delimiter=_delimiter(lines[0]))]
    if len(rows) > 1 and len(rows[1]) == len(rows[0]) + 1:
        rows[0].insert(0, "")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise plain.Unfit(f"it has {len(row)} fields in row {number}; expected {len(rows[0])}.")
    return rows


def read_text_table(path: Path) -> pd.DataFrame:
    """A small table as text, its first row the header; see read_rows."""
    header, *rows = read_rows(path)
    if repeated := duplicates(header):
        raise plain.Unfit(f"it names the columns {shown(repeated)} more than once.")
    return pd.DataFrame(rows, columns=header, dtype=object)


def _read_table(stage: Stage, path: Path, wanted: list[str] | None = None) -> Table:
    try:
        return read_table(path, wanted)
    except UNREADABLE as error:
        raise stage.error(path, f"cannot be read: {error}") from error


def read_locs(stage: Stage, path: Path) -> pd.DataFrame:
    """Spot centres: index = spot id (text), columns x, y (float64)."""
    ids, _, places = _read_table(stage, path, ["x", "y"])
    locs = pd.DataFrame(places.toarray(), ids, ["x", "y"])
    if len(far := locs.index[(locs.abs() > MAX_PLACE_PX).any(axis=1)]):
        raise stage.error(
            path, f"puts the spots {some(far)} more than {MAX_PLACE_PX:g} px away from the image."
        )
    if len(repeated := locs.index[locs.duplicated()]):
        raise stage.error(path, f"gives the spots {some(repeated)} the place of another spot.")
    return locs


def read_sparse_counts(
    stage: Stage, path: Path, spots: pd.Index
) -> tuple[sparse.csr_array, list[str]]:
    """Counts (len(spots), genes) float32 without the zeros, in the order of ``spots``; the genes.

    Rows without a location are dropped with a note; a location without counts is an error.
    """
    ids, genes, counts = _read_table(stage, path)
    if all(map(plain.is_number, genes)):
        raise stage.error(path, f"has the gene names {some(genes)}; the header line is missing.")
    if len(lack := spots.difference(ids, sort=False)):
        missing = f"{len(lack)} of the {len(spots)} spots that have a location: {some(lack)}"
        raise stage.error(path, f"has no counts for {missing}; its own ids look like {some(ids)}.")
    if extra := len(ids) - len(spots):
        print(f"{path.name}: {extra} of {len(ids)} rows have no location and are left out")
    counts = counts[ids.get_indexer(spots)]
    if not counts.nnz:
        raise stage.error(path, "holds nothing but zeros; expected raw counts.")
    if (lowest := counts.data.min()) < 0:
        row, column = (at[0] for at in (counts == lowest).nonzero())
        where = f"spot {spots[row]}, gene {genes[column]}"
        raise stage.error(path, f"holds {lowest:g} for {where}; counts cannot be negative.")
    if (highest := counts.data.max()) > MAX_COUNT:
        row, column = (at[0] for at in (counts == highest).nonzero())
        raise stage.error(
            path,
            f"holds {highest:g} for spot {spots[row]}, gene {genes[column]}; expected counts of at "
            f"most {MAX_COUNT:g}.",
        )
    gene_names.warn_of_excel(stage, path, genes)
    if (counts.data != np.floor(counts.data)).any():
        stage.warn(f"{path.name} holds fractions; raw counts are expected, not normalised ones")
    return counts, genes
