"""Gene names of the user: the option --genes, and the file gene-names.txt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import utils
from reading import plain

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
HELP = "names with commas between them, or a file with one name a line"  # for help of --genes
EXAMPLE = "Name some, --genes KRT8,CD3E, or give a file with one name a line."
MONTH = "(jan|feb|mar|mars|mrz|apr|avr|abr|may|mai|jun|jul|aug|sept?|oct|okt|nov|dec|dez|dic)"
EXCEL = re.compile(  # 1-Mar, 01. Mrz (MARCH1), Sep-02 (SEPT2), 2001-03-01, 2.31E+13 (2310061I04Rik)
    rf"\d{{1,2}}(-|\. ?){MONTH}((-|\. ?)\d{{2,4}})?|{MONTH}-\d{{1,2}}"
    r"|\d{4}-\d\d-\d\d( 00:00:00)?|\d([.,]\d+)?e\+\d+",
    re.IGNORECASE,
)


def read_genes(given: str | Path, known: Sequence[str], what: str) -> list[str]:
    """The genes of an option --genes: in its order, each once, all of them among ``known``.

    ``given`` is the text of the option: names with commas between them, or the path of a text file
    with one name a line. A file wins: if one has that name, it is read, even if a gene is called
    like it. An unknown name that looks like a path is said to be a missing file. ``what`` says in a
    message whose genes the known ones are, such as "cnts.csv".
    """
    lines = _lines_of(Path(given))
    source = f"--genes {given}" if lines is None else given
    names = str(given).split(",") if lines is None else lines
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise utils.StageError(f"{source} names no gene.", EXAMPLE)
    there = set(known)
    unknown = [name for name in names if name not in there]
    if lines is None and (paths := [name for name in unknown if _looks_like_a_path(name)]):
        raise utils.StageError(
            f"--genes {paths[0]} looks like a file, but there is no such file.", EXAMPLE
        )
    if unknown:
        excel = spoilt_by_excel(unknown)
        raise utils.StageError(
            f"{source} names {utils.some(unknown)}: no such gene in {what}. Genes there are like "
            f"{utils.some(known)}.{f' It names {excel}.' if excel else ''}",
            EXAMPLE if lines is None else "Mend the list, then run the same command.",
        )
    return names


def spoilt_by_excel(names: Iterable[str]) -> str:
    """Says which names Excel made of genes, such as 1-Mar of MARCH1; "" if there is none."""
    found = [name for name in names if EXCEL.fullmatch(name)]
    if not found:
        return ""
    return (
        f"{utils.some(found)}: a date or a number that Excel makes of a gene name (1-Mar of "
        f"MARCH1, 2-Sep of SEPT2, 2.31E+13 of 2310061I04Rik); see that the names are right"
    )


def warn_of_excel(stage: utils.Stage, path: Path, names: Iterable[str]) -> None:
    if spoilt := spoilt_by_excel(names):
        stage.warn(f"{path.name} names {spoilt}")


def _lines_of(path: Path) -> list[str] | None:
    """The lines of a text file that are not blank; None if there is none of that name."""
    try:
        if not path.is_file():
            return None
    except (OSError, ValueError):  # a long list of names is no possible path
        return None
    try:
        return plain.lines_of(path)
    except (ValueError, *plain.DAMAGED) as error:
        raise utils.StageError(f"{path} cannot be read: {error}", "Give a text file.") from error


def _looks_like_a_path(name: str) -> bool:
    return "/" in name or "\\" in name or name.lower().endswith(LIST_SUFFIXES)


def read_gene_names(stage: utils.Stage, path: Path) -> list[str]:
    """The genes of gene-names.txt: one name a line, none of them twice."""
    names = plain.read_lines(stage, path)
    if not names:
        raise stage.error(path, "holds no gene; expected one gene name a line.")
    if repeated := utils.duplicates(names):
        raise stage.error(
            path, f"names {utils.some(repeated)} more than once; each gene may occur once."
        )
    warn_of_excel(stage, path, names)
    return names
