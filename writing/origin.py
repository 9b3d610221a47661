"""Which code and which libraries made a file, for its record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

VERSION = "1.0.0"  # of HISTEX; CHANGELOG.md and CITATION.cff tell it, too


def commit(root: Path) -> dict[str, str]:
    """Of the code in ``root``, if git knows it."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            return {"commit": found.stdout.strip()}
    return {}


def versions() -> dict[str, str]:
    """Of HISTEX, of Python, and of the libraries that decide results."""
    names = (
        "torch", "timm", "numpy", "pandas", "scipy", "scikit-image", "opencv-python", "pillow",
        "pyvips", "pyarrow",
    )  # fmt: skip
    versions = {"histex": VERSION, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
