"""The table of samples, samples.tsv: what each sample is made from, its options, its reference.

Nothing slow is imported here: Snakemake reads this file at its start and again in every job.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import plain

PREPARED = {  # platform -> the script that makes the sample directory
    name: f"prepare/{name}.py"
    for name in ("visium", "visium_hd", "xenium", "scverse", "legacy_st", "slides")
}
FOLDER = "sample"  # the platform of a folder that has the five files already
PLATFORMS = (*PREPARED, FOLDER)
MEASURE_ALL = ("visium_hd", "xenium")  # platforms whose scripts write a truth
TRUTH = "truth.npz"
REPORT, EXPORT = "analysis/report.py", "analysis/export.py"
EVERY = (*PREPARED.values(), *utils.STAGES, utils.PREDICTION, utils.LEARNING, REPORT, EXPORT)
AFTER = (*utils.STAGES, utils.PREDICTION, REPORT, EXPORT)  # scripts that options may be for
NEEDED = ("sample", "platform", "paths")
COLUMNS = (*NEEDED, "options", "teaches", "reference")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REFERENCE_ENDING = ".safetensors"
Options = dict[str, list[str]]  # script -> its words


@dataclass(frozen=True)
class Sample:
    """One row of the table."""

    name: str
    row: int  # of the table, the header is row 1
    prepared_by: str | None  # script, or None for a folder of the user's
    paths: list[str]  # words for that script
    options: Options
    directory: Path
    teaches: str  # name of a reference, or nothing
    reference: str  # name of one, or a file, or nothing
    has_spots: bool


@dataclass(frozen=True)
class Cell:
    """Where something stands, for messages."""

    table: Path
    row: int
    column: str

    def error(self, found: str, expected: str) -> utils.StageError:
        return utils.StageError(
            f"{self.table}, row {self.row}, column {self.column}: found {found}, expected "
            f"{expected}.",
            "Mend the table, then run the same command.",
        )


def split_options(words: list[str], scripts: tuple[str, ...], cell: Cell | None = None) -> Options:
    """The words of a cell by script: 'HISTEX.py --epochs 20 report.py --n-genes 9'."""
    known = {Path(script).name: script for script in scripts}
    known |= {script: script for script in scripts}
    found: Options = {}
    for word in words:
        if word in known:
            found.setdefault(known[word], [])
        elif not found:
            cell = cell or Cell(Path("options"), 1, "options")
            names = ", ".join(Path(script).name for script in scripts)
            raise cell.error(repr(word), f"the name of a script before its options, one of {names}")
        else:
            found[[*found][-1]].append(word)
    return found


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, cells by column) of every row of the table that is not empty."""
    if not path.is_file():
        raise utils.StageError(
            f"{path} is missing: the table of samples, with the columns {', '.join(COLUMNS)}.",
            "Write it (workflow/README.md shows one), or name another: --config samples=FILE for "
            "snakemake, --samples FILE for cohort.py.",
        )
    try:
        text = plain.read_text(path)
    except (ValueError, *plain.DAMAGED) as error:
        raise utils.broken(path, f"cannot be read: {error}") from error
    reader = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.strip() for name in next(reader, [])]
    top = Cell(path, 1, "header")
    for name in NEEDED:
        if name not in header:
            shown = utils.some(header) or "nothing"
            raise top.error(shown, f"a column {name}, and tabs between columns")
    for name in header:
        if name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, n=1)
            raise top.error(repr(name), f"{close[0] if close else 'one of ' + ', '.join(COLUMNS)}")
    if repeated := utils.duplicates(header):
        raise top.error(f"{repeated[0]} twice", "each column once")
    for cells in reader:
        if not any(cell.strip() for cell in cells) or cells[0].startswith("#"):
            continue
        row = reader.line_num
        if len(cells) > len(header):
            raise Cell(path, row, header[-1]).error(
                f"{len(cells)} cells", f"at most {len(header)}, with one tab between two"
            )
        padded = [*cells, *[""] * (len(header) - len(cells))]
        yield row, dict(zip(header, map(str.strip, padded), strict=True))


def read_sample(table: Path, row: int, cells: dict[str, str], output: Path) -> Sample:
    """One row, checked by itself."""

    def cell(column: str) -> Cell:
        return Cell(table, row, column)

    def words(column: str) -> list[str]:
        try:
            return shlex.split(cells.get(column, ""))
        except ValueError as error:
            raise cell(column).error(cells[column], f"quotes in pairs ({error})") from error

    name, platform = cells["sample"], cells["platform"]
    if not NAME.fullmatch(name):
        raise cell("sample").error(repr(name), "letters, digits, dots, - and _: it names a folder")
    if platform not in PLATFORMS:
        raise cell("platform").error(repr(platform), f"one of {', '.join(PLATFORMS)}")
    paths, prepared_by = words("paths"), PREPARED.get(platform)
    check_paths(paths, prepared_by, cell("paths"))
    directory = output / "samples" / name if prepared_by else Path(paths[0])
    scripts = (*((prepared_by,) if prepared_by else ()), *AFTER)
    options = split_options(words("options"), scripts, cell("options"))
    for column in ("teaches", "reference"):
        given = cells.get(column, "")
        if not (NAME.fullmatch(given) or not given or given.endswith(REFERENCE_ENDING)):
            raise cell(column).error(repr(given), "a name of letters, digits, dots, - and _")
    sample = Sample(
        name, row, prepared_by, paths if prepared_by else [], options, directory,
        cells.get("teaches", ""), cells.get("reference", ""),
        has_spots=(directory / utils.LOCS_RAW.name).exists() or platform not in ("slides", FOLDER),
    )  # fmt: skip
    check_truth(sample, platform, cell("teaches"))
    if not sample.has_spots and not sample.reference:
        raise cell("reference").error(
            f"nothing, and no {utils.LOCS_RAW.name} in {directory}",
            "a reference, since the sample has no spots",
        )
    return sample


def check_paths(paths: list[str], prepared_by: str | None, cell: Cell) -> None:
    """Every path is there. Those of a script stand after its options, as in its own command."""
    if prepared_by is None:
        if len(paths) != 1 or not Path(paths[0]).is_dir():
            raise cell.error(shlex.join(paths) or "nothing", "one folder that is there")
        return
    if not paths or not paths[0].startswith("--"):
        raise cell.error(
            shlex.join(paths) or "nothing", f"options of {prepared_by}, such as --image FILE"
        )
    for word in paths:
        prefix = Path(word)  # scverse.py --tables takes a prefix of file names
        begins = prefix.parent.is_dir() and any(prefix.parent.glob(f"{prefix.name}*"))
        if not word.startswith("--") and not prefix.exists() and not begins:
            raise cell.error(word, "a file or folder that is there")


def check_truth(sample: Sample, platform: str, cell: Cell) -> None:
    prepares = sample.options.get(sample.prepared_by or "", [])
    none = any(a == "--truth-genes" and b == "0" for a, b in itertools.pairwise(prepares))
    has_truth = (platform in MEASURE_ALL and not none) or (sample.directory / TRUTH).exists()
    if sample.teaches and not has_truth:
        raise cell.error(
            f"{sample.teaches} for a sample without a {TRUTH}",
            "nothing: only samples with a truth teach (visium_hd, xenium)",
        )
    if sample.teaches and sample.teaches == sample.reference:
        raise cell.error(
            f"{sample.teaches}, which the sample also uses", "another reference, or none"
        )


def read_table(path: Path, output: Path) -> dict[str, Sample]:
    """All samples by name; ``output`` is the folder of the results. StageError if it is unfit."""
    samples: dict[str, Sample] = {}
    places: dict[Path, str] = {}
    for row, cells in rows_of(path):
        sample = read_sample(path, row, cells, output)
        if sample.name in samples:
            twin = samples[sample.name].row
            raise Cell(path, row, "sample").error(
                f"{sample.name}, as in row {twin}", "a name of its own"
            )
        place = sample.directory.resolve()
        if place in places:
            raise Cell(path, row, "paths").error(
                f"the folder of sample {places[place]}", "a folder of its own for every sample"
            )
        samples[sample.name], places[place] = sample, sample.name
    if not samples:
        raise Cell(path, 2, "sample").error("no sample", "a row for every sample")
    taught = {sample.teaches for sample in samples.values()}
    for sample in samples.values():
        wanted = sample.reference
        if wanted and wanted not in taught and not Path(wanted).is_file():
            others = ", ".join(sorted(taught - {""})) or "none is taught"
            raise Cell(path, sample.row, "reference").error(
                wanted, f"a file {REFERENCE_ENDING}, or what another sample teaches ({others})"
            )
    return samples


def check_options(path: Path, samples: dict[str, Sample], shared: Options, python: str) -> None:
    """Have the scripts themselves read all options before any work is done; each kind once."""
    known: set[tuple[str, ...]] = set()
    for sample in samples.values():
        for script, words in {**shared, **sample.options}.items():
            command = (script, *shared.get(script, []), *sample.options.get(script, []))
            if command in known:
                continue
            known.add(command)
            done = subprocess.run(
                [python, str(utils.ROOT / script), *command[1:], "--help"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                said = done.stderr.strip().splitlines()[-1]
                raise Cell(path, sample.row, "options").error(
                    shlex.join([script, *words]), f"what {script} takes ({said})"
                )
