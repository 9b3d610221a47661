"""What an error while reading a file of others means: damaged bytes, or unknown content."""

from __future__ import annotations

import contextlib
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import plain

DAMAGED = (OSError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile)  # bytes not decoded
UNKNOWN = (
    KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError, AssertionError,
    MemoryError,
)  # fmt: skip


class Refused(ValueError):
    """Something in a file that is not read: what it is, and the way out. See readable()."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


@contextlib.contextmanager
def readable(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Whatever cannot be read of ``path`` becomes a StageError that names it.

    Damaged bytes are to be copied again. Content that is not that of the format gets the
    ``remedy``, and what is Refused its own. Errors of the system itself (errno) are passed on.
    """
    try:
        yield
    except utils.StageError:
        raise
    except Refused as error:
        raise utils.StageError(f"{path} {error.problem}", error.remedy) from error
    except plain.Unfit as error:
        raise utils.StageError(f"{path} cannot be read: {error}", remedy) from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise utils.broken(path, f"is no whole {what}: {error!r:.300}") from error
    except UNKNOWN as error:
        raise utils.StageError(f"{path} is no {what} as known: {error!r:.300}.", remedy) from error
