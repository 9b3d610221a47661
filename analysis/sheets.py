"""Tables of text that the scripts of analysis/ read and write, and that people open and edit.

One reader for all of them. Names are kept as they are: "NA" is a gene, and a line ends where a
line ends, not at every character that Unicode counts as a break.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import utils
from reading import plain

DELIMITERS = ",\t;"
FORMULA = ("=", "+", "-", "@")  # a spreadsheet takes a cell that begins so for a formula
Refusal = Callable[[str], utils.StageError]  # from what is wrong with a table


def read_lines(path: Path, refuse: Refusal) -> list[str]:
    """The lines of a text file, without what ends them."""
    try:
        text = plain.read_text(path)
    except (FileNotFoundError, IsADirectoryError, ValueError, *plain.DAMAGED) as error:
        raise refuse(f"cannot be read as text: {str(error).rstrip('.')}.") from error
    return text.removesuffix("\n").split("\n")


def read_sheet(path: Path, columns: Sequence[str], refuse: Refusal) -> pd.DataFrame:
    """A table (commas, tabs or semicolons) as text, its rows under their line numbers.

    ``columns`` are those that it must have. As R writes it, the header may lack the name of the
    first column. Blank lines are skipped, and so are the blanks around a cell.
    """
    lines = read_lines(path, refuse)
    delimiter = max(DELIMITERS, key=lines[0].count)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        numbered = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise refuse(f"is not a table: line {reader.line_num}: {error}.") from error
    numbered = [(line, row) for line, row in numbered if any(row)]
    if not numbered:
        raise refuse("holds no row below its header.")
    (_, names), *rows = numbered
    if rows and len(rows[0][1]) == len(names) + 1:
        names = ["", *names]
    if lacking := [column for column in columns if column not in names]:
        raise refuse(f"has the columns {utils.some(names)}. It lacks {' and '.join(lacking)}.")
    if repeated := utils.duplicates(names):
        raise refuse(f"names the columns {utils.some(repeated)} more than once.")
    for line, row in rows:
        if len(row) != len(names):
            raise refuse(f"has {len(row)} fields in line {line}; its header has {len(names)}.")
    index = pd.Index([line for line, _ in rows], dtype=np.int64)
    return pd.DataFrame([row for _, row in rows], index, names, dtype=str)


def numbers_in(
    table: pd.DataFrame, column: str, refuse: Refusal, largest: float = np.inf
) -> pd.Series:
    """Floats of a column of text; an empty cell, or nan, is NaN. None is above ``largest``."""
    text = table[column]
    values = pd.to_numeric(text, errors="coerce").astype(np.float64)
    empty = text.str.lower().isin(["", "nan", "na"])
    for line in table.index[(values.isna() & ~empty) | (values.abs() > largest) | np.isinf(values)]:
        raise refuse(f"holds {text[line][:40]!r} for {column} in line {line}; expected a number.")
    return values


def warn_of_formulas(stage: utils.Stage, names: Iterable[object]) -> None:
    """Names are written as they are, so that what reads them finds them; a spreadsheet would not.

    To mark them as text, with an apostrophe or a blank, would make other names of them.
    """
    formulas = [
        name for name in names
        if isinstance(name, str) and name.startswith(FORMULA) and not plain.is_number(name)
    ]  # fmt: skip
    if formulas:
        stage.warn(
            f"a spreadsheet takes the names {utils.some(formulas)} for formulas: import the tables "
            f"as text"
        )
