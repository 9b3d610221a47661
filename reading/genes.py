"""Gene names of the user: the option --genes, and the file gene-names.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import utils
from reading import plain

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
HELP = "names with commas between them, or a file with one name a line"  # for help of --genes
EXAMPLE = "Name some, --genes KRT8,CD3E, or give a file with one name a line."


def read_genes(given: str, known: Sequence[str], what: str) -> list[str]:
    """The genes of an option --genes: in its order, each once, all of them among ``known``.

    ``given`` is the text of the option: names with commas between them, or the path of a text file
    with one name a line. A file wins: if one has that name, it is read, even if a gene is called
    like it. An unknown name that looks like a path is said to be a missing file. ``what`` says in a
    message whose genes the known ones are, such as "cnts.csv".
    """
    lines = _lines_of(Path(given))
    source = f"--genes {given}" if lines is None else given
    names = given.split(",") if lines is None else lines
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
        raise utils.StageError(
            f"{source} names {utils.some(unknown)}: no such gene in {what}. Genes there are like "
            f"{utils.some(known)}.",
            EXAMPLE if lines is None else "Mend the list, then run the same command.",
        )
    return names


def _lines_of(path: Path) -> list[str] | None:
    """The lines of a text file; None if there is none of that name."""
    try:
        if not path.is_file():
            return None
    except (OSError, ValueError):  # a long list of names is no possible path
        return None
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
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
    return names
