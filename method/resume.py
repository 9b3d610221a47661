"""What a long computation has finished, kept so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import utils
from writing import disk


def work_folder(directory: Path, name: str, decisive: Any) -> Path:
    """Hidden folder in which a computation gathers what it has finished, to outlive a killed run.

    Its name is a hash of all that decides the results, so that those of two images, networks or
    settings never meet. It lacks ".partial", since such files are swept away as left behind. Two
    runs may share it, if each result appears whole. Folders of other settings go when an hour old.
    """
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    folder = directory / f".{name}.{key}.work"
    disk.sweep_work(directory, name, but=folder)
    return folder


def keep_finished(work: Path, folders: dict[utils.Artifact, Path], files: list) -> None:
    """Give finished files, (artifact, name) in its folder, a second name in the work folder."""
    with contextlib.suppress(FileNotFoundError):  # a run beside this one ended and took the folder
        for artifact, name in files:
            (work / artifact.name).mkdir(parents=True, exist_ok=True)
            _link(folders[artifact] / name, work / artifact.name / name)


def take_finished(work: Path, folders: dict[utils.Artifact, Path], files: list) -> bool:
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
        with disk.atomic(other) as partial:
            shutil.copyfile(path, partial)
