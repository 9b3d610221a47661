"""What all HISTEX scripts share: files, arguments, records, geometry. No algorithm lives here.

A sample directory (``--directory``) is all that the scripts have in common. This file says which
files it holds and who writes them (the contract), writes them so that a crash never leaves half a
file under a real name, and keeps a record per script, ``<script>.json``, by which the next one sees
whether a file is fresh, edited by hand, or out of date.

Frames and units. Arrays are (row, col); x (column) and y (row) occur in CSV columns only. Pixel
coordinates are continuous: 0 is the left or upper edge of the first pixel. he.jpg has 0.5 um per
pixel; the superpixel of a coordinate p is floor(p / 16).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------
# geometry
# ------------------------------------------------------------------------------------------------
PIXEL_SIZE_UM = 0.5  # um per pixel of he.jpg: 20x, the scale UNI was trained on
TILE_PX = 224  # side of one input of the histology network
TOKEN_PX = 16  # side of one superpixel (one token of a ViT/16)
TOKENS_PER_TILE = TILE_PX // TOKEN_PX
SUPERPIXEL_UM = TOKEN_PX * PIXEL_SIZE_UM  # 8 um
VISIUM_PITCH_UM, VISIUM_RADIUS_UM = 100.0, 27.5  # centre to centre; printed spots of 55 um
LEGACY_PITCH_UM, LEGACY_RADIUS_UM = 200.0, 50.0  # legacy ST, which came before Visium

# ------------------------------------------------------------------------------------------------
# the contract: which files a sample directory holds, and who writes them
# ------------------------------------------------------------------------------------------------
CALIBRATION = "image_calibration.py"
HIGH_RESOLUTION = "get_HR.py"
EXTRACTOR = "Histology_Extractor.py"
MASKING = "masking_non_tissue.py"
HISTEX = "HISTEX.py"
STAGES = (CALIBRATION, HIGH_RESOLUTION, EXTRACTOR, MASKING, HISTEX)
MADE_BY: dict[str, str | None] = {}  # file name -> script, of every artifact that is defined


@dataclass(frozen=True)
class Artifact:
    """One file of the sample directory; of several ``names``, exactly one may exist."""

    names: tuple[str, ...]
    made_by: str | None  # script, or None for what the user brings
    what: str
    user_may_bring: bool = False  # accepted without a record of the producing script

    def __post_init__(self) -> None:
        MADE_BY.update(dict.fromkeys(self.names, self.made_by))

    @property
    def name(self) -> str:
        return self.names[0]


HE_RAW = Artifact(
    ("he-raw.jpg", "he-raw.jpeg", "he-raw.png", "he-raw.tif", "he-raw.tiff"),
    None,
    "the H&E image that the spot coordinates refer to",
)
PIXEL_SIZE_RAW = Artifact(("pixel-size-raw.txt",), None, "um per pixel of he-raw, one number")
LOCS_RAW = Artifact(("locs-raw.csv",), None, "spot id, x (column), y (row), pixels of he-raw")
CNTS = Artifact(
    ("cnts.csv", "cnts.tsv", "cnts.csv.gz", "cnts.tsv.gz"), None, "spots x genes, raw counts"
)
RADIUS_RAW = Artifact(("radius-raw.txt",), None, "spot radius, pixels of he-raw, one number")
GENE_NAMES = Artifact(
    ("gene-names.txt",), HIGH_RESOLUTION, "genes to predict, one a line", user_may_bring=True
)
HE = Artifact(
    ("he.jpg", "he.png"), CALIBRATION, "RGB, 0.5 um per pixel, sides padded to multiples of 224"
)
LOCS = Artifact(("locs.csv",), CALIBRATION, "spot id, x, y, pixels of he.jpg")
RADIUS = Artifact(("radius.txt",), CALIBRATION, "spot radius, pixels of he.jpg")
PIXEL_SIZE = Artifact(("pixel-size.txt",), CALIBRATION, "um per pixel of he.jpg")
HR_LOCS = Artifact(
    ("HRlocs.csv",), HIGH_RESOLUTION, "HR points: x, y (pixels of he.jpg), measured, parents"
)
HR_CNTS = Artifact(("HRcnts.npy",), HIGH_RESOLUTION, "float32 (HR points, genes), counts")
FEATURES = Artifact(
    ("Histology_feature_map.npy",),
    EXTRACTOR,
    "float16 (rows, columns, features), one token a superpixel",
)
RGB = Artifact(
    ("Histology_rgb.npy",), EXTRACTOR, "uint8 (rows, columns, 3), mean colour of a superpixel"
)
MASK = Artifact(
    ("mask.png",), MASKING, "8 bit (rows, columns), tissue is nonzero", user_may_bring=True
)
MASK_OVERLAY = Artifact(
    ("mask-overlay.png",), MASKING, "picture: tissue outlined on the H&E, with the spots"
)
STATES = Artifact(("states",), HISTEX, "trained networks, one folder a state")
MAPS = Artifact(("cnts-super",), HISTEX, "float32 (rows, columns) per gene, counts per superpixel")
SPREAD = Artifact(
    ("cnts-super-sd",), HISTEX, "float32 (rows, columns) per gene, standard deviation of the maps"
)
EMBEDDINGS = Artifact(
    ("embeddings-gene.pickle",), HISTEX, "dict(cls=float32 (dims, rows, columns))"
)
PLOTS = Artifact(("cnts-super-plots",), HISTEX, "PNG maps of the best explained genes")
HELD_OUT = Artifact(
    ("held-out-r.csv",), HISTEX, "gene, correlation with the counts of held-out spots"
)
CONTRACT = (
    HE_RAW, PIXEL_SIZE_RAW, LOCS_RAW, CNTS, RADIUS_RAW, GENE_NAMES, HE, LOCS, RADIUS, PIXEL_SIZE,
    HR_LOCS, HR_CNTS, FEATURES, RGB, MASK, MASK_OVERLAY, STATES, MAPS, SPREAD, EMBEDDINGS, PLOTS,
    HELD_OUT,
)  # fmt: skip

MIN_PIXEL_SIZE_UM, MAX_PIXEL_SIZE_UM = 0.05, 2.5  # 200x and 4x objectives; a hires image is above
MAX_RADIUS_SUPERPIXELS = 64  # 0.5 mm; a spot is at least one superpixel
MAX_MEGAPIXELS = 2000  # about 6 GB as RGB; more is taken for a decompression bomb
MAX_HE_PIXELS = 65_500**2  # of he.jpg, which is ours; the format has no larger sides
PUT_ATTEMPTS = 10
DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
STALE_PARTIAL_SECONDS = 3600  # a partial file untouched for an hour belongs to no living run


class StageError(ValueError):
    """What the user can put right: the problem (file, found, expected) and what to run."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")


# ------------------------------------------------------------------------------------------------
# fingerprints and atomic writes
# ------------------------------------------------------------------------------------------------
def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but those that file managers leave in it."""
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name not in DESKTOP_FILES)


def _stat(path: Path) -> dict[str, int]:
    """Bytes and newest mtime of a file, or of all files of a folder."""
    stats = [file.stat() for file in files_in(path)]
    return {
        "bytes": sum(s.st_size for s in stats),
        "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


def _digest(path: Path) -> str:
    """sha256 of a file; of a folder, the sha256 of its sorted names and files' sha256."""
    if path.is_file():
        return sha256(path)
    whole = hashlib.sha256()
    for file in files_in(path):
        whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    return {**_stat(path), "sha256": _digest(path)}


def same_as(path: Path, known: dict[str, Any]) -> bool:
    """True if the file is the one fingerprinted as ``known``; hashes only if the mtime differs."""
    if not path.exists():
        return known == ABSENT
    stat = _stat(path)
    if stat["bytes"] != known["bytes"]:
        return False
    return stat["mtime_ns"] == known["mtime_ns"] or _digest(path) == known["sha256"]


ABSENT = {"bytes": 0, "mtime_ns": 0, "sha256": "absent"}  # of an optional input that was not there


def partial_name(path: Path) -> Path:
    """A temporary name in the same folder that keeps the suffix, which image writers go by."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(partial: Path, path: Path) -> None:
    """Move a finished file or folder to its real name; a folder in the way is moved aside first.

    Another run may put its folder there between the two moves; then it is moved aside as well.
    """
    if not partial.is_dir():
        os.replace(partial, path)
        return
    for attempt in range(PUT_ATTEMPTS):
        aside = partial_name(path)
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        try:
            partial.rename(path)
        except OSError:
            if attempt == PUT_ATTEMPTS - 1 or not path.exists():
                if aside.exists() and not path.exists():
                    aside.rename(path)
                raise
        else:
            _remove(aside)
            return
        _remove(aside)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, it takes the name ``path``."""
    partial = partial_name(path)
    try:
        yield partial
        _put(partial, path)
    finally:
        _remove(partial)


def check_disk(directory: Path, need: int, what: str) -> None:
    """Raise StageError if the disk has less than ``need`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise StageError(
            f"{what}: about {need / 1e9:.2f} GB are needed in {directory}, but only "
            f"{free / 1e9:.2f} GB are free.",
            "Free some space or move the folder to another disk, then run the same command.",
        )


# ------------------------------------------------------------------------------------------------
# one run of one stage
# ------------------------------------------------------------------------------------------------
class Stage:
    """One run of one script on one sample directory: its inputs, its outputs, the record of both.

    ``require`` names the inputs, ``guard`` the outputs; both are called before any work is done.
    ``writing`` gives a temporary path per output. ``finish`` puts all outputs in place and writes
    the record last. A run that ends in any other way leaves the sample directory as it was.

    Inputs lie in ``directory``. Outputs and the record go there too, or into another ``folder``.
    A folder is made when the first output is written, if ``makes_folders`` or if it is that other.
    """

    def __init__(
        self,
        script: str,
        args: argparse.Namespace,
        folder: Path | None = None,
        makes_folders: bool = False,
    ) -> None:
        self.script = script
        self.args = args
        self.directory: Path = args.directory
        self.folder = folder or self.directory
        self.options: list[str] = getattr(args, "options", [])
        self.started = time.time()
        self.inputs: dict[str, dict[str, Any]] = {}
        self.pending: list[tuple[Path, Path]] = []
        self.outdated: list[Path] = []
        self.notes: list[str] = []
        if not (self.directory.is_dir() or (makes_folders and not self.directory.exists())):
            found = "is a file" if self.directory.exists() else "does not exist"
            raise StageError(
                f"--directory {self.directory} {found}; it must be the folder of one sample.",
                f"Run: python {script} --directory FOLDER",
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise StageError(
                f"{self.folder} is a file; {script} writes into a folder.",
                "Name another one, or leave it out to write into the folder of the sample.",
            )
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            raise StageError(
                f"{self.folder} cannot be written to; {script} writes its results there.",
                f"Make the folder writable, then run: {self.command(script)}",
            )
        for leftover in list(self.folder.rglob(".*.partial*")):
            with contextlib.suppress(OSError):  # gone, or in use by another run
                if time.time() - leftover.stat().st_mtime > STALE_PARTIAL_SECONDS:
                    _remove(leftover)

    def command(self, script: str | None = None) -> str:
        """The command that runs a script here, with the options it was last run with."""
        script = script or self.script
        options = self.options if script == self.script else []
        if script != self.script:  # not by read_record, whose own messages name a command
            with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
                text = (self.directory / record_name(script)).read_text(encoding="utf-8")
                options = [str(option) for option in json.loads(text)["options"]]
        parts = [str(self.directory), *options]
        first, *rest = (f'"{part}"' if " " in part else part for part in parts)
        return " ".join(["python", script, "--directory", first, *rest])

    def warn(self, text: str) -> None:
        """Print a warning, and keep it in the record."""
        print(f"warning: {text}")
        self.notes.append(text)

    def error(self, path: Path, problem: str, remedy: str | None = None) -> StageError:
        """A StageError about ``path``, whose remedy is to rerun its origin or to mend it."""
        made_by = MADE_BY.get(path.name)
        if remedy is None and made_by and made_by != self.script:
            remedy = f"It is written by {made_by}. Run: {self.command(made_by)}"
        elif remedy is None:
            remedy = f"It is a file you provide: mend it, then run: {self.command(self.script)}"
        return StageError(f"{path} {problem}", remedy)

    # ----- inputs -----
    def find(self, artifact: Artifact, folder: Path | None = None) -> Path | None:
        """The path of an artifact, or None. Two alternatives side by side are an error."""
        folder = folder or self.directory
        there = [folder / name for name in artifact.names if (folder / name).exists()]
        if len(there) > 1:
            names = ", ".join(path.name for path in there)
            raise StageError(
                f"{folder} holds {names}; only one may be there ({artifact.what}).",
                f"Move the others away, then run: {self.command(self.script)}",
            )
        return there[0] if there else None

    def require(self, *artifacts: Artifact) -> None:
        """Check that the inputs exist, are finished and fresh; note hand edits and fingerprints."""
        for artifact in artifacts:
            path = self.find(artifact)
            if path is None:
                origin = (
                    f"It is written by {artifact.made_by}. Run: {self.command(artifact.made_by)}"
                    if artifact.made_by
                    else f"It is a file you provide. Add it, then run: {self.command(self.script)}"
                )
                names = " or ".join(artifact.names)
                raise StageError(
                    f"{self.directory / artifact.name} is missing: {self.script} needs {names} "
                    f"({artifact.what}).",
                    origin,
                )
            self._check_fresh(artifact, path)

    def optional(self, artifact: Artifact) -> Path | None:
        """The path of an input that may be missing; its coming or going makes the outputs stale."""
        path = self.find(artifact)
        if path is None:
            self.inputs[artifact.name] = ABSENT
        else:
            self.require(artifact)
        return path

    def use(self, path: Path) -> None:
        """Note the fingerprint of an input that lies anywhere, as the user named it."""
        self.inputs[str(path.resolve())] = fingerprint(path)

    def path(self, artifact: Artifact) -> Path:
        """Path of a required artifact."""
        return self.find(artifact) or self.directory / artifact.name

    def _check_fresh(self, artifact: Artifact, path: Path) -> None:
        record = read_record(self, artifact.made_by) if artifact.made_by else None
        if artifact.made_by is None:
            known = None
        elif record is None:
            if not artifact.user_may_bring:
                raise self.error(
                    path,
                    f"has no record {record_name(artifact.made_by)}; its stage did not finish.",
                )
            print(f"{path.name}: not made by {artifact.made_by}, taken as your own")
            known = None
        elif not record["finished"]:
            raise self.error(
                path, f"is unfinished: the last run of {artifact.made_by} was cut off."
            )
        else:
            stale = _stale(self, artifact.made_by)
            known = record["outputs"].get(path.name)
            if known is None and not artifact.user_may_bring:
                raise self.error(path, f"is not listed in {record_name(artifact.made_by)}.")
            edited = known is None or not same_as(path, known)
            if stale and edited and artifact.user_may_bring:
                print(
                    f"{path.name}: your own; {stale[1]} has changed since, see that it still fits"
                )
            elif stale and self.args.allow_stale:
                print(f"{path.name}: out of date ({stale[1]} changed), used all the same")
            elif stale:
                script, changed = stale
                raise StageError(
                    f"{path} is out of date: {self.directory / changed} has changed since {script} "
                    f"read it.",
                    f"Run: {self.command(script)} and then the stages after it "
                    f"(or add --allow-stale to use the old files all the same).",
                )
            elif edited:
                print(f"{path.name}: edited since {artifact.made_by} wrote it, the edit is used")
            if edited:
                known = None
        if known is not None and _stat(path)["mtime_ns"] == known["mtime_ns"]:
            self.inputs[path.name] = known  # unchanged, so its hash is known
        else:
            self.inputs[path.name] = fingerprint(path)

    # ----- outputs -----
    def is_mine(self, artifact: Artifact) -> bool:
        """True if the artifact is an unedited output of the last run of this script."""
        path, record = self.find(artifact, self.folder), read_record(self, self.script)
        if path is None or record is None:
            return False
        # A run that was cut off while it put its outputs in place left some old and some new ones.
        keys = ("outputs",) if record["finished"] else ("pending", "previous")
        return any(
            path.name in record[key] and same_as(path, record[key][path.name]) for key in keys
        )

    def guard(self, *artifacts: Artifact) -> None:
        """Refuse to replace an output that was edited or brought by the user, unless --force."""
        for artifact in artifacts:
            path = self.find(artifact, self.folder)
            record = read_record(self, self.script)
            if path is None or self.args.force or self.is_mine(artifact):
                continue
            if record is None and self.script in STAGES and not artifact.user_may_bring:
                continue  # left by a run that never came to its record
            raise StageError(
                f"{path} was made or edited by hand; {self.script} would overwrite it.",
                f"Keep it and go on to the next stage, or replace it. "
                f"Run: {self.command(self.script)} --force",
            )

    @contextlib.contextmanager
    def writing(self, artifact: Artifact, name: str | None = None) -> Iterator[Path]:
        """Yield a temporary path for an output; ``finish`` gives it its real name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (name or artifact.name)
        partial = partial_name(path)
        self.pending.append((partial, path))
        yield partial

    def retire(self, artifact: Artifact) -> None:
        """Have ``finish`` remove what an earlier run wrote and this one does not: it is outdated.

        ``guard`` the artifact before, so that nothing of the user is lost.
        """
        if (path := self.find(artifact, self.folder)) is not None:
            self.outdated.append(path)

    def discard(self) -> None:
        """Remove the temporary files of a run that did not finish."""
        for partial, _ in self.pending:
            _remove(partial)

    def finish(self, **facts: Any) -> None:
        """Put the outputs in place, then write the record: the last write says that all is well."""
        json.dumps(facts)  # what cannot be recorded fails here, before any output is replaced
        outputs = {path.name: fingerprint(partial) for partial, path in self.pending}
        before = read_record(self, self.script) or {}
        previous = before.get("outputs") or before.get("previous", {})
        unfinished = {"finished": False, "pending": outputs, "previous": previous}
        record_path = self.folder / record_name(self.script)
        _write_json(record_path, {"script": self.script, **unfinished})
        for partial, path in self.pending:
            _put(partial, path)  # keeps size and mtime, so that the fingerprint holds
            print(f"wrote {path.name}: {outputs[path.name]['bytes'] / 1e6:,.2f} MB")
        for path in self.outdated:
            aside = partial_name(path)  # half a folder would be taken for the user's own
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            _remove(aside)
            print(f"removed {path.name}, which belonged to an earlier run")
        hidden = ("login", "options")
        arguments = {key: str(value) for key, value in vars(self.args).items() if key not in hidden}
        if getattr(self.args, "login", None):
            arguments["login"] = "***"
        record = {
            "finished": True,
            "script": self.script,
            "arguments": arguments,
            "options": self.options,
            "seconds": round(time.time() - self.started, 2),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": _versions(),
            "code": code_of(self.script),
            **facts,
            "warnings": self.notes,
            "inputs": self.inputs,
            "outputs": outputs,
        }
        _write_json(record_path, record)
        print(f"{self.script} finished in {record['seconds']:.1f} s")


def record_name(script: str) -> str:
    """Of a script; those of prepare/ write the same files and share one record."""
    return "prepare.json" if script.startswith("prepare/") else f"{Path(script).stem}.json"


def read_record(stage: Stage, script: str) -> dict[str, Any] | None:
    """The record of a script in this directory, or None if it has none."""
    folder = stage.folder if script == stage.script else stage.directory
    path = folder / record_name(script)
    if not path.is_file():
        return None
    remedy = f"Remove it and run: {stage.command(script)}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise StageError(f"{path} is not a readable record: {error}", remedy) from error
    if not isinstance(record, dict) or not isinstance(record.get("finished"), bool):
        raise StageError(f"{path} is not a record of {script}.", remedy)
    for key in ("inputs", "outputs") if record["finished"] else ("pending", "previous"):
        files = record.get(key)
        if not isinstance(files, dict) or not all(map(is_fingerprint, files.values())):
            raise StageError(f"{path} is not a whole record of {script}: see {key!r}.", remedy)
    return record


def is_fingerprint(known: Any) -> bool:
    return isinstance(known, dict) and known.keys() >= {"bytes", "mtime_ns", "sha256"}


def _stale(stage: Stage, script: str) -> tuple[str, str] | None:
    """(script to rerun, changed file) if inputs of ``script`` or of a stage before it changed."""
    record = read_record(stage, script)
    if record is None or not record["finished"]:
        return None
    for name, known in record["inputs"].items():
        producer = MADE_BY.get(name)
        if producer and producer != script and (earlier := _stale(stage, producer)):
            return earlier
        if not same_as(stage.directory / name, known):
            return script, name
    return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def hash_of(paths: Iterable[Path]) -> str:
    """Hash of source files, their names and content."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(f"{path.name}\0".encode() + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return whole.hexdigest()[:16]


def code_of(script: str) -> dict[str, str]:
    """What a record says about the code: the commit if there is one, and a hash of the files."""
    rooms = {"method", "reading", *Path(script).parts[:-1]}
    files = [ROOT / script, ROOT / "utils.py"]
    files += [file for room in rooms for file in (ROOT / room).glob("*.py")]
    code = {"sha256": hash_of({file for file in files if file.is_file()})}
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            code["commit"] = found.stdout.strip()
    return code


def _versions() -> dict[str, str]:
    names = (
        "torch", "timm", "numpy", "pandas", "scipy", "scikit-image", "opencv-python", "pillow",
        "pyvips", "pyarrow",
    )  # fmt: skip
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ------------------------------------------------------------------------------------------------
# arguments and entry point
# ------------------------------------------------------------------------------------------------
def sample_directory(text: str) -> Path:
    """A path with or without a trailing / or \\ (the published README writes ``dataset\\``)."""
    return Path(text.rstrip("\\/") or text)


class Help(argparse.RawDescriptionHelpFormatter):
    """Tells the default of an option once, and none where the option has none of its own."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        no_value = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if no_value or action.required or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """The one command-line grammar: no abbreviations, and a hint where an option is misspelt.

    ``doc`` is the docstring of the script. Its first paragraph describes it in --help; below the
    options stand the example (the indented paragraph) and the paragraphs Reads and Writes.
    """

    def __init__(self, doc: str) -> None:
        first, *others = doc.strip().split("\n\n")
        shown = [text for text in others if text.startswith(("    ", "Reads", "Writes"))]
        super().__init__(
            description=first, epilog="\n\n".join(shown), formatter_class=Help, allow_abbrev=False
        )

    def alias(self, old: str, new: str) -> None:
        """Let an earlier spelling of an option go on; --help does not show it."""
        self._option_string_actions[old] = self._option_string_actions[new]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """As argparse does, but a misspelt option is named before anything that is missing."""
        for text in sys.argv[1:] if args is None else args:
            name = str(text).split("=")[0]
            if " " in name:
                continue  # options in quotes, the value of another one
            if name.startswith("--") and name not in self._option_string_actions:
                known = [option for option in self._option_string_actions if option[:2] == "--"]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {close[0]}?" if close else "See --help for those that it has."
                self.error(f"there is no option {name}. {hint}")
        return super().parse_known_args(args, namespace)


def add_force(parser: Parser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace the outputs of this script even if they were edited by hand.",
    )


def stage_parser(doc: str) -> Parser:
    """Parser with the arguments of all scripts that go on with a sample."""
    parser = Parser(doc)
    parser.add_argument(
        "--directory",
        type=sample_directory,
        required=True,
        help="Folder of the sample; all files live there.",
    )
    add_force(parser)
    parser.add_argument(
        "--allow-stale",
        action="store_true",
        help="Use inputs even if the stage that made them is out of date.",
    )
    return parser


def positive(text: str) -> int:
    """argparse type: a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be 1 or more")
    return number


def not_negative(text: str) -> int:
    """argparse type: a whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="Where to compute: auto, cpu, cuda, cuda:N or mps."
    )


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults, as they would be typed; a token is not shown."""
    options = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in ("directory", "force", "allow_stale") or value == action.default:
            continue
        options.append(action.option_strings[-1])
        if action.nargs != 0:
            options.append("***" if action.dest == "login" else str(value))
    return options


def run_stage(
    main: Callable[[Stage], None],
    script: str,
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    *,
    makes_folders: bool = False,
) -> int:
    """Run ``main(stage)`` and return the exit code: 0 done, 2 the user can mend it, 130 Ctrl-C.

    Outputs go into the folder ``args.folder`` if the parser has such an option, else into the
    sample's.
    """
    args = parser.parse_args(argv)
    args.options = given_options(parser, args)

    def work() -> None:
        stage = Stage(script, args, getattr(args, "folder", None), makes_folders)
        try:
            main(stage)
        finally:
            stage.discard()

    return exit_code(work, args.directory, "files already finished are kept")


def exit_code(work: Callable[[], None], directory: Path, when_interrupted: str) -> int:
    """0 if ``work()`` ends well, 2 with a message if the user can mend it, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a console that cannot show a gene name must not stop us
    try:
        work()
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(
            f"error: {error.filename2 or error.filename or directory}: {error.strerror}.\n"
            f"Make room, give access to it or close it elsewhere, then run the same command.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {when_interrupted}", file=sys.stderr)
        return 130
    return 0


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def duplicates(names: Iterable[str]) -> list[str]:
    """What occurs more than once, in the order of the first time."""
    return [name for name, n in Counter(names).items() if n > 1]


def some(names: Collection) -> str:
    """The first five of a list, for a message."""
    shown = ", ".join(str(name) for name in list(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")
