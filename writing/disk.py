"""Files on the disk: by what one is known again, and how one is written so that none is ever half.

A crash, a full disk or a power cut leaves the old file or the new one under a real name, and beside
it at most a partial file, which the next run sweeps away.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from writing import late

PUT_ATTEMPTS = 10
DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
FILE_PRINT = re.compile(r"\d+ -?\d+ [0-9a-f]{64}")  # of a file in a folder's fingerprint
SMALL_BYTES = 1 << 20  # 1 MiB: its sha256 takes a millisecond
# By partial_name: ".he.<random>-<machine>-<process>.partial.jpg"; before, without the last two
PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}(?:-([0-9a-f]{8})-(\d+))?\.partial(?:\.\w+)?")
STALE_PARTIAL_SECONDS = 3600  # a partial file untouched for an hour belongs to no living run


# ------------------------------------------------------------------------------------------------
# fingerprints
# ------------------------------------------------------------------------------------------------
def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but those that file managers leave in it."""
    if path.is_file():
        return [path]
    found = (
        Path(place, name) for place, _, names in os.walk(path, onerror=_fail) for name in names
    )
    return sorted(f for f in found if f.is_file() and f.name not in DESKTOP_FILES)


def _fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # gone meanwhile, as rglob would have it as well
        raise error


def _by_name(folder: Path) -> dict[str, Path]:
    return {file.relative_to(folder).as_posix(): file for file in files_in(folder)}


def fingerprint(path: Path) -> dict[str, Any]:
    """Bytes, mtime and sha256 of a file. Of a folder: all bytes, the newest mtime, the sha256 of
    sorted names and their sha256, and under ``files`` "bytes mtime sha256" of each."""
    if not path.is_dir():
        stat = path.stat()
        return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}
    files = {name: fingerprint(file) for name, file in _by_name(path).items()}
    names = "".join(f"{name}\0{known['sha256']}\n" for name, known in files.items())
    return {
        "bytes": sum(known["bytes"] for known in files.values()),
        "mtime_ns": max((known["mtime_ns"] for known in files.values()), default=0),
        "sha256": hashlib.sha256(names.encode()).hexdigest(),
        "files": {name: " ".join(map(str, known.values())) for name, known in files.items()},
    }


def hash_of(paths: Iterable[Path]) -> str:
    """Hash of source files, their names and content."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(f"{path.name}\0".encode() + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return whole.hexdigest()[:16]


def changed_in(path: Path, known: dict[str, Any]) -> list[Path]:
    """What is there and differs from ``known``, or is new: the file, or files of the folder.

    What is missing has not changed. The content is compared where size or mtime differ; that of
    small files, which people edit by hand, always: an editor or a copy may keep both.
    """
    if not path.exists() or known == ABSENT:
        return [path] if path.exists() else []
    if not path.is_dir() or "files" not in known:
        small = path.is_file() and known["bytes"] <= SMALL_BYTES
        return [path] if _differs(path, known, small) else []
    recorded = {}
    for name, text in known["files"].items():
        size, mtime, digest = str(text).split()
        recorded[name] = {"bytes": int(size), "mtime_ns": int(mtime), "sha256": digest}
    files = _by_name(path).items()
    return [f for name, f in files if name not in recorded or _differs(f, recorded[name], False)]


def is_added(file: Path, folder: Path, known: dict[str, Any]) -> bool:
    """True for a file of a folder that was not in it when ``known`` was taken."""
    return file != folder and file.relative_to(folder).as_posix() not in known.get("files", ())


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Bytes, mtime and inode, by which a file that is being read is known; None if it is gone."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def has_time(path: Path, known: dict[str, Any]) -> bool:
    return bool(path.stat().st_mtime_ns == known["mtime_ns"])


def _differs(path: Path, known: dict[str, Any], hash_always: bool) -> bool:
    if path.is_file():
        stat = path.stat()
        if stat.st_size != known["bytes"]:
            return True
        if stat.st_mtime_ns == known["mtime_ns"] and not hash_always:
            return False
    return bool(fingerprint(path)["sha256"] != known["sha256"])


def lost_from(path: Path, known: dict[str, Any]) -> list[Path]:
    """What was fingerprinted and is missing: the file or folder, or files of the folder."""
    if known == ABSENT or not path.exists():
        return [] if known == ABSENT else [path]
    return [path / name for name in known.get("files", ()) if not (path / name).exists()]


def is_whole(path: Path, known: dict[str, Any]) -> bool:
    return not lost_from(path, known)


def same_as(path: Path, known: dict[str, Any]) -> bool:
    """True if the file or folder is the one fingerprinted as ``known``."""
    return is_whole(path, known) and not changed_in(path, known)


ABSENT = {"bytes": 0, "mtime_ns": 0, "sha256": "absent"}  # of an optional input that was not there


def is_fingerprint(known: Any) -> bool:
    """True for what ``fingerprint`` returns, read back from a record."""
    if not isinstance(known, dict) or not isinstance(known.get("sha256"), str):
        return False
    files = known.get("files", {})
    return (
        all(isinstance(known.get(key), int) for key in ("bytes", "mtime_ns"))
        and isinstance(files, dict)
        and all(FILE_PRINT.fullmatch(str(text)) for text in files.values())
    )


# ------------------------------------------------------------------------------------------------
# atomic writes
# ------------------------------------------------------------------------------------------------
def partial_name(path: Path) -> Path:
    """A temporary name in the same folder that keeps the suffix, which image writers go by."""
    owner = f"{uuid.uuid4().hex[:8]}-{machine()}-{os.getpid()}"
    return path.with_name(f".{path.stem}.{owner}.partial{path.suffix}")


@functools.cache
def machine() -> str:
    """A short hash of this machine, or of the container: where process numbers mean the same."""
    namespace = ""
    with contextlib.suppress(OSError):  # Linux only
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def is_dead(process: int) -> bool:
    """True if no process of this machine has that number; Windows cannot be asked."""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # it belongs to someone else
    return False


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Have the system write a file or folder to the disk now: a power cut may come at any time."""
    for place in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync(place)


def _sync(path: Path) -> None:
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # cannot be opened there
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a drive that knows no fsync
            raise
    finally:
        os.close(handle)


def put(partial: Path, path: Path) -> None:
    """Move a finished file or folder to its real name; a folder in the way is moved aside first.

    Another run may put its folder there between the two moves; then it is moved aside as well.
    The content is on the disk before the name, and the name when this returns.
    """
    to_disk(partial)
    if partial.is_dir():
        _put_folder(partial, path)
    else:
        os.replace(partial, path)
    _sync(path.parent)


def _put_folder(partial: Path, path: Path) -> None:
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
            remove(aside)
            return
        remove(aside)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, it takes the name ``path``."""
    partial = partial_name(path)
    try:
        yield partial
        put(partial, path)
    finally:
        remove(partial)


class _Patient(io.FileIO):
    """A file of which no write fails: what the system refuses is lost, and told by ``failed``."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        content = memoryview(data).cast("B")
        done = 0
        while done < len(content) and self.failed is None:
            try:
                done += super().write(content[done:])
            except OSError as error:
                self.failed = error
        return len(content)

    def check(self) -> None:
        """Raise what a write has failed with, where the library can be left."""
        if self.failed is not None:
            raise self.failed


@contextlib.contextmanager
def late_errors(path: Path) -> Iterator[_Patient]:
    """A new file for a library that does not survive a write that fails, as HDF5 does not.

    It crashes, or goes on and tells nobody. Here it goes on; then, or by ``check``, the error is
    raised.
    """
    with _Patient(path, "w+") as file, late.not_within(_Patient.write.__code__):
        try:
            yield file
        except Exception:
            if file.failed is None:
                raise
        file.check()


def sweep_work(folder: Path, name: str, but: Path | None = None) -> None:
    """Remove the folders with finished parts of ``name`` that no run has written to for an hour."""
    for work in folder.glob(f".{name}.*.work"):
        with contextlib.suppress(OSError):  # gone, or in use by another run
            if work != but and time.time() - work.stat().st_mtime > STALE_PARTIAL_SECONDS:
                remove(work)


def sweep(folder: Path) -> None:
    """Remove what runs that were killed left in a folder: partial files that nobody writes now."""
    for leftover in folder.glob(".*.partial*"):
        if (ours := PARTIAL.fullmatch(leftover.name)) is None:
            continue
        with contextlib.suppress(OSError):  # gone, or in use by another run
            orphaned = ours[1] == machine() and is_dead(int(ours[2]))
            if orphaned or time.time() - leftover.stat().st_mtime > STALE_PARTIAL_SECONDS:
                remove(leftover)
