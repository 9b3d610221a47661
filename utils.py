"""What the five HISTEX scripts share: files, arguments, records, geometry. No algorithm lives here.

A sample directory (``--directory``) is all that the scripts have in common. This file says which
files it holds and who writes them (the contract), reads them with checks, writes them so that a
crash never leaves half a file under a real name, and keeps a record per stage, ``<stage>.json``, by
which the next stage sees whether a file is fresh, edited by hand, or out of date.

Frames and units. Arrays are (row, col); x (column) and y (row) occur in CSV columns only. Pixel
coordinates are continuous: 0 is the left or upper edge of the first pixel. he.jpg has 0.5 um per
pixel; the superpixel of a coordinate p is floor(p / 16).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

# ------------------------------------------------------------------------------------------------
# geometry
# ------------------------------------------------------------------------------------------------
PIXEL_SIZE_UM = 0.5  # um per pixel of he.jpg: 20x, the scale UNI was trained on
TILE_PX = 224  # side of one input of the histology network
TOKEN_PX = 16  # side of one superpixel (one token of a ViT/16)
TOKENS_PER_TILE = TILE_PX // TOKEN_PX
SUPERPIXEL_UM = TOKEN_PX * PIXEL_SIZE_UM  # 8 um

# ------------------------------------------------------------------------------------------------
# the contract: which files a sample directory holds, and who writes them
# ------------------------------------------------------------------------------------------------
CALIBRATION = "image_calibration.py"
HIGH_RESOLUTION = "get_HR.py"
EXTRACTOR = "Histology_Extractor.py"
MASKING = "masking_non_tissue.py"
HISTEX = "HISTEX.py"


@dataclass(frozen=True)
class Artifact:
    """One file of the sample directory; of several ``names``, exactly one may exist."""

    names: tuple[str, ...]
    made_by: str | None  # script, or None for what the user brings
    what: str
    user_may_bring: bool = False  # accepted without a record of the producing script

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
MADE_BY = {name: artifact.made_by for artifact in CONTRACT for name in artifact.names}

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


def work_folder(directory: Path, name: str, decisive: Any) -> Path:
    """Hidden folder in which a computation gathers what it has finished, to outlive a killed run.

    Its name is a hash of all that decides the results, so that those of two images, networks or
    settings never meet. It lacks ".partial", since such files are swept away as left behind. Two
    runs may share it, if each result appears whole. Folders of other settings go when an hour old.
    """
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    folder = directory / f".{name}.{key}.work"
    for other in directory.glob(f".{name}.*.work"):
        if other != folder and time.time() - other.stat().st_mtime > STALE_PARTIAL_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def keep_finished(work: Path, folders: dict[Artifact, Path], files: list) -> None:
    """Give finished files, (artifact, name) in its folder, a second name in the work folder."""
    with contextlib.suppress(FileNotFoundError):  # a run beside this one ended and took the folder
        for artifact, name in files:
            (work / artifact.name).mkdir(parents=True, exist_ok=True)
            _link(folders[artifact] / name, work / artifact.name / name)


def take_finished(work: Path, folders: dict[Artifact, Path], files: list) -> bool:
    """Bring files of the work folder back: all, or none and False if not all of them are there."""
    try:
        for artifact, name in files:
            _link(work / artifact.name / name, folders[artifact] / name)
    except FileNotFoundError:
        for artifact, name in files:
            (folders[artifact] / name).unlink(missing_ok=True)
        return False
    return True


def _link(path: Path, other: Path) -> None:
    """A second name for a whole file; a copy, where the disk knows no second names."""
    try:
        os.link(path, other)
    except FileExistsError:
        pass  # by a run beside this one, with the same bytes
    except FileNotFoundError:
        raise
    except OSError:
        with atomic(other) as partial:
            shutil.copyfile(path, partial)


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
    """

    def __init__(self, script: str, args: argparse.Namespace) -> None:
        self.script = script
        self.args = args
        self.directory: Path = args.directory
        self.options: list[str] = getattr(args, "options", [])
        self.started = time.time()
        self.inputs: dict[str, dict[str, Any]] = {}
        self.pending: list[tuple[Path, Path]] = []
        self.outdated: list[Path] = []
        self.notes: list[str] = []
        Image.MAX_IMAGE_PIXELS = MAX_HE_PIXELS  # Pillow's own limit is below the size of a slide
        if not self.directory.is_dir():
            found = "is a file" if self.directory.exists() else "does not exist"
            raise StageError(
                f"--directory {self.directory} {found}; it must be the folder of one sample.",
                f"Run: python {script} --directory FOLDER",
            )
        if not os.access(self.directory, os.W_OK):
            raise StageError(
                f"{self.directory} cannot be written to; {script} writes its results there.",
                f"Make the folder writable, then run: {self.command(script)}",
            )
        for leftover in list(self.directory.rglob(".*.partial*")):
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
    def find(self, artifact: Artifact) -> Path | None:
        """The path of an artifact, or None. Two alternatives side by side are an error."""
        there = [
            self.directory / name for name in artifact.names if (self.directory / name).exists()
        ]
        if len(there) > 1:
            names = ", ".join(path.name for path in there)
            raise StageError(
                f"{self.directory} holds {names}; only one may be there ({artifact.what}).",
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
        path, record = self.find(artifact), read_record(self, self.script)
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
            path = self.find(artifact)
            record = read_record(self, self.script)
            if path is None or self.args.force or self.is_mine(artifact):
                continue
            if record is None and not artifact.user_may_bring:
                continue  # left by a run that never came to its record
            raise StageError(
                f"{path} was made or edited by hand; {self.script} would overwrite it.",
                f"Keep it and go on to the next stage, or replace it. "
                f"Run: {self.command(self.script)} --force",
            )

    @contextlib.contextmanager
    def writing(self, artifact: Artifact, name: str | None = None) -> Iterator[Path]:
        """Yield a temporary path for an output; ``finish`` gives it its real name."""
        path = self.directory / (name or artifact.name)
        partial = partial_name(path)
        self.pending.append((partial, path))
        yield partial

    def retire(self, artifact: Artifact) -> None:
        """Have ``finish`` remove what an earlier run wrote and this one does not: it is outdated.

        ``guard`` the artifact before, so that nothing of the user is lost.
        """
        if (path := self.find(artifact)) is not None:
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
        record_path = self.directory / record_name(self.script)
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
            **facts,
            "warnings": self.notes,
            "inputs": self.inputs,
            "outputs": outputs,
        }
        _write_json(record_path, record)
        print(f"{self.script} finished in {record['seconds']:.1f} s")


def record_name(script: str) -> str:
    return f"{Path(script).stem}.json"


def read_record(stage: Stage, script: str) -> dict[str, Any] | None:
    """The record of a script in this directory, or None if it has none."""
    path = stage.directory / record_name(script)
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


def _versions() -> dict[str, str]:
    names = ("torch", "timm", "numpy", "pandas", "scikit-image", "opencv-python", "pillow")
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


def stage_parser(doc: str) -> argparse.ArgumentParser:
    """Parser with the arguments all stages share, described by the first paragraph of ``doc``."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--directory",
        type=sample_directory,
        required=True,
        help="Folder of the sample; all files live there.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace outputs of this stage even if they were edited by hand.",
    )
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


def resolve_device(name: str):
    """torch.device of ``--device``; auto is CUDA, else MPS, else CPU; a named one must work."""
    import torch

    wanted = ["cuda", "mps", "cpu"] if name == "auto" else [name]
    reason: Exception | None = None
    for candidate in wanted:
        try:
            device = torch.device(candidate)
            probe = torch.ones(2, 2, device=device)
            if (
                float((probe @ probe).sum()) == 8.0
            ):  # is_available() can be true with a broken driver
                return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = error
    detail = str(reason).splitlines()[0] if reason else "a test product came out wrong"
    raise StageError(
        f"--device {name} cannot be used on this machine: {detail}",
        "Leave --device out to take what is there, or say --device cpu.",
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of its own for it, MPS and the CPU have not."""
    return "out of memory" in str(error).lower() or "allocate memory" in str(error)


def run_stage(
    main: Callable[[Stage], None], script: str, parser: argparse.ArgumentParser, argv=None
) -> int:
    """Run ``main(stage)`` and return the exit code: 0 done, 2 the user can mend it, 130 Ctrl-C."""
    args = parser.parse_args(argv)
    args.options = given_options(parser, args)

    def work() -> None:
        stage = Stage(script, args)
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


# ----- several processes (torchrun) -----
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # environment variables
LONGEST_WAIT = timedelta(days=7)  # of one process for another; a dead one is noticed at once


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started for one command: this one is ``rank`` of ``world``."""

    rank: int
    world: int

    def share(self, items: Sequence) -> Sequence:
        """Every world-th of the items: each belongs to exactly one process."""
        return items[self.rank :: self.world]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world == 1:
            return
        import torch.distributed

        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise StageError(
                f"Process {self.rank} of {self.world} cannot go on: another one has ended.",
                "Mend what that one says, then run the same command.",
            ) from error


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the processes of torchrun; without it, this one is alone.

    They share their work by files in the sample directory, so that they only ever wait for each
    other: gloo does that on any device. Each takes the card of its number for ``--device cuda``.
    All but the first are silent on stdout. If one fails, torchrun ends the others by SIGTERM, which
    is made a Ctrl-C here: it leaves no half files.
    """
    rank, world, local = (int(os.environ.get(name, "0")) for name in TORCHRUN)
    if world <= 1:
        yield Ranks(0, 1)
        return
    import torch.distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    with contextlib.ExitStack() as quiet:
        if rank > 0:
            nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
        yield Ranks(rank, world)
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# checked reads
# ------------------------------------------------------------------------------------------------
def read_number(
    stage: Stage, path: Path, low: float, high: float, unit: str, hint: str = ""
) -> float:
    """The one number in a text file, between ``low`` and ``high``."""
    text = _read_text(stage, path).strip()
    try:
        value = float(text) if "_" not in text else float("nan")
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # false for nan as well
        raise stage.error(
            path,
            f"holds {text[:40]!r}; expected one number between {low:g} and {high:g} ({unit}), "
            f"written with a decimal point.{' ' + hint if hint else ''}",
        )
    return value


def read_lines(stage: Stage, path: Path) -> list[str]:
    """The non-empty lines of a text file, stripped."""
    return [line.strip() for line in _read_text(stage, path).splitlines() if line.strip()]


def read_gene_names(stage: Stage, path: Path) -> list[str]:
    names = read_lines(stage, path)
    if not names:
        raise stage.error(path, "holds no gene; expected one gene name a line.")
    if repeated := duplicates(names):
        raise stage.error(path, f"names {some(repeated)} more than once; each gene may occur once.")
    return names


def _read_text(stage: Stage, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise stage.error(
            path, f"is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from error


UNREADABLE = (ValueError, EOFError, OSError, zlib.error, csv.Error)  # what damaged tables raise
BLOCK_CELLS = 2**24  # of a table read at a time: about 0.5 GB by pandas
MAX_DIGITS = 9  # of a number that is read without pandas; no count is longer
ID = "\0id"  # the column of the ids; no header holds this
BLOCK_BYTES = 2**23  # of a memory map read at a time: more than that leaves the processor's cache


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


def read_array(
    stage: Stage,
    artifact: Artifact,
    dtype: type,
    shape: tuple[int | None, ...],
    finite: bool = True,
) -> np.ndarray:
    """Memory-map an .npy of the given dtype and shape (None is any length); unpickles nothing."""
    path = stage.path(artifact)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can raise nearly anything
        raise stage.error(path, f"is not a whole .npy array ({error!r:.200}).") from error
    wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    fits = array.ndim == len(shape) and all(
        n in (None, m) for n, m in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits or array.size == 0:
        raise stage.error(
            path,
            f"is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {wanted}: "
            f"{artifact.what}.",
        )
    step = max(1, BLOCK_BYTES // array[:1].nbytes)
    blocks = (some_rows(array, start, start + step) for start in range(0, len(array), step))
    if finite and not all(map(_is_finite, blocks)):
        raise stage.error(path, "holds values that are not finite.")
    return array


def _is_finite(block: np.ndarray) -> bool:
    if block.dtype != np.float16:
        return bool(np.isfinite(block).all())
    # Ten times as fast: without their signs, nan and inf are the largest numbers of 16 bits
    return bool((block.view(np.uint16) & 0x7FFF).max() < np.float16(np.inf).view(np.uint16))


def some_rows(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of a whole memory-mapped array, read from its file.

    What is read through the map counts as memory of the process for as long as the map is there.
    """
    if not isinstance(array, np.memmap):
        return array[start:stop]
    shape = (min(stop, len(array)) - start, *array.shape[1:])
    offset = array.offset + start * array[:1].nbytes
    values = np.fromfile(array.filename, array.dtype, math.prod(shape), offset=offset)
    return values.reshape(shape)


BLOCK_PX = 8  # side of a JPEG's blocks where the colours have full resolution
RESTART, END = 0xD0, 0xD9  # second bytes of JPEG markers; restarts count from 0xD0 to 0xD7
LONGEST_HEADER = 2**16  # bytes; what image_calibration.py writes has 600
SEARCHED_AT_ONCE = 2**24  # bytes, for markers
BAD_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class JpegHeader(NamedTuple):
    """Of a JPEG whose rows of blocks can be decoded one by one."""

    rows: int  # of pixels
    columns: int
    rows_at: int  # byte at which the header says how many rows there are, in two bytes
    length: int  # bytes before the pixels


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header, if each row of blocks stands alone, as image_calibration.py writes them.

    That is: one pass (baseline), colours at full resolution, a restart marker after every row.
    None for any other JPEG, and for what is no JPEG.
    """
    content: dict[int, int] = {}  # first byte of what a segment holds, by the segment's marker
    at = 2
    while 0xDA not in content and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        content[data[at + 1]] = at + 4
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if data[:2] != b"\xff\xd8" or not content.keys() >= {0xC0, 0xDD, 0xDA} or at > len(data):
        return None
    frame, scan = data[content[0xC0] :][:15], data[content[0xDA] :][:1]
    rows, columns = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    interval = int.from_bytes(data[content[0xDD] :][:2])
    bits, colours, sampling = frame[:1], frame[5:6], frame[7::3]
    if (bits, colours, sampling, scan) != (b"\x08", b"\x03", b"\x11\x11\x11", b"\x03"):
        return None
    if rows * columns == 0 or interval != -(-columns // BLOCK_PX):
        return None
    return JpegHeader(rows, columns, content[0xC0] + 1, at)


def rows_of_blocks(file: BinaryIO, header: JpegHeader) -> list[int]:
    """Byte at which each row of blocks starts, and that at which the last one ends."""
    n = -(-header.rows // BLOCK_PX)
    expected = bytes(RESTART + row % 8 for row in range(n - 1)) + bytes([END])
    found, starts, tail = b"", [header.length], b""
    at = file.seek(header.length)
    while len(found) < n and (chunk := tail + file.read(SEARCHED_AT_ONCE)) != tail:
        for match in re.finditer(rb"\xff([^\x00])", chunk):  # 255 in a pixel is followed by 0
            found += match[1]
            starts.append(at + match.end())
        tail = b"\xff" if chunk.endswith(b"\xff") else b""
        at += len(chunk) - len(tail)
    for row in range(n):
        if found[row : row + 1] != expected[row : row + 1]:
            raise OSError(f"truncated or damaged near row {row * BLOCK_PX} of {header.rows}")
    return starts[: n + 1]


class ImageRows:
    """An RGB image that is decoded where it is sliced: image[top:bottom] is uint8 (n, columns, 3).

    Of he.jpg as image_calibration.py writes it, only the rows asked for are in memory. Any other
    image is decoded when it is opened, and kept at 4 bytes a pixel. A truncated or damaged file is
    an error, never grey rows. One thread may slice at a time.
    """

    def __init__(self, stage: Stage, path: Path) -> None:
        self.stage, self.path = stage, path
        with self.checked(), contextlib.ExitStack() as opened:
            self.file = opened.enter_context(path.open("rb"))
            head = self.file.read(LONGEST_HEADER)
            self.header = jpeg_header(head)
            if self.header is None:
                with Image.open(path) as self.picture:
                    self.picture.load()
                rows, columns = self.picture.height, self.picture.width
            else:
                self.head = head[: self.header.length]
                self.starts = rows_of_blocks(self.file, self.header)
                rows, columns = self.header[:2]
            self.shape = (rows, columns, 3)
            opened.pop_all()

    def __enter__(self) -> ImageRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        top, bottom, step = rows.indices(len(self))
        if step != 1:
            raise IndexError("an image is sliced as image[top:bottom]")
        if bottom <= top:
            return np.empty((0, *self.shape[1:]), np.uint8)
        with self.checked():
            if self.header is None:
                box = (0, top, self.shape[1], bottom)
                return np.asarray(self.picture.crop(box).convert("RGB"))
            first = top // BLOCK_PX
            decoded = self.decode(self.header, first, -(-bottom // BLOCK_PX))
        return decoded[top - first * BLOCK_PX : bottom - first * BLOCK_PX]

    def decode(self, header: JpegHeader, first: int, last: int) -> np.ndarray:
        """Rows of blocks first..last - 1, as a JPEG of its own with markers that count anew."""
        start, end = self.starts[first], self.starts[last]
        self.file.seek(start)
        jpeg = bytearray(self.head + self.file.read(end - start))
        rows = min(last * BLOCK_PX, header.rows) - first * BLOCK_PX
        jpeg[header.rows_at : header.rows_at + 2] = rows.to_bytes(2)
        for row in range(first, last):
            marker = self.starts[row + 1] - 1 - start + header.length
            jpeg[marker] = END if row == last - 1 else RESTART + (row - first) % 8
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return np.asarray(image)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        try:
            yield
        except BAD_IMAGE as error:
            raise self.stage.error(self.path, f"is not a whole image: {error}") from error


def read_rgb(stage: Stage, path: Path) -> np.ndarray:
    """An RGB image as uint8 (rows, columns, 3); a truncated file is an error, never grey rows."""
    with ImageRows(stage, path) as image:
        rgb = np.empty(image.shape, np.uint8)
        for top in range(0, len(image), TILE_PX):  # a whole copy at a time would be three
            rgb[top : top + TILE_PX] = image[top : top + TILE_PX]
        return rgb


def grid_shape(stage: Stage) -> tuple[int, int]:
    """Rows and columns of superpixels of he.jpg, from its header alone."""
    path = stage.path(HE)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is not an image: {error}") from error
    if width % TILE_PX or height % TILE_PX:
        raise stage.error(
            path, f"is {width} x {height} px; both sides must be multiples of {TILE_PX} px."
        )
    return height // TOKEN_PX, width // TOKEN_PX


def read_mask(stage: Stage, shape: tuple[int, int]) -> np.ndarray:
    """Tissue (h, w) bool from mask.png: whatever is not black or transparent, in any image mode.

    The picture has a pixel a superpixel, or a whole multiple of that.
    """
    path = stage.path(MASK)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise stage.error(path, f"is not a readable image: {error}") from error
    painted = (pixels[..., :3] > 0).any(axis=-1) & (pixels[..., 3] > 0)
    times = max(1, painted.shape[0] // shape[0])
    if painted.shape != (shape[0] * times, shape[1] * times):
        raise stage.error(
            path,
            f"is {painted.shape[1]} x {painted.shape[0]} px; expected {shape[1]} x {shape[0]} px, "
            f"one a superpixel (or a whole multiple of that).",
        )
    tissue = painted.reshape(shape[0], times, shape[1], times).mean(axis=(1, 3)) >= 0.5
    if not tissue.any():
        raise stage.error(
            path,
            "is all black, which leaves no tissue.",
            f"Paint the tissue white, or remove the file and run: {stage.command(MASKING)}",
        )
    if tissue.all():
        print(f"warning: by {path.name} the whole image is tissue")
    return tissue


class _Dtype:
    """Stands in for numpy.dtype, for numbers only: flags set in the real one could crash Python."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not read")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy's _reconstruct; its state is (version, shape, dtype, Fortran?, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.array = _from_bytes(content, dtype, shape, "F" if is_fortran else "C")


def _from_bytes(
    content: bytes, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None
) -> np.ndarray:
    """``axes`` of a transposed array, which numpy 2.4 and later pickle as they lie in memory."""
    array = np.frombuffer(content, dtype.dtype)
    if axes is not None:
        return array.reshape(shape).transpose(axes).copy(order="K")
    return array.reshape(shape, order=order).copy(order=order)[()]


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes in protocol 2
}
for _core in ("numpy.core", "numpy._core"):
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Array
    STAND_INS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw: _from_bytes(raw, dtype, (), "C")
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_bytes


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays of numbers in plain containers; refuses all that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return STAND_INS[module, name]


def _plain(content: Any) -> Any:
    """Arrays in place of their stand-ins, also inside of dicts, lists and tuples."""
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_plain, content))
    return content


def read_pickle(path: Path) -> Any:
    """What a .pickle file holds, if that is numpy arrays in plain containers; else StageError."""
    try:
        with path.open("rb") as file:
            return _plain(_ArraysOnly(file).load())
    except Exception as error:  # damaged bytes can raise nearly anything
        raise StageError(
            f"{path} is not a pickled numpy array ({error!r:.200}).",
            "Do not open it with other tools unless you trust it.",
        ) from error


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def duplicates(names) -> list[str]:
    index = pd.Index(names)
    return list(index[index.duplicated()].unique())


def some(names) -> str:
    """The first five of a list, for a message."""
    shown = ", ".join(str(name) for name in list(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")
