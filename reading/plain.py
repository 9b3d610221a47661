"""Small text files: one number, one name a line."""

from __future__ import annotations

from pathlib import Path

import utils


def read_number(
    stage: utils.Stage, path: Path, low: float, high: float, unit: str, hint: str = ""
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


def read_lines(stage: utils.Stage, path: Path) -> list[str]:
    """The non-empty lines of a text file, stripped."""
    return [line.strip() for line in _read_text(stage, path).splitlines() if line.strip()]


def _read_text(stage: utils.Stage, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise stage.error(
            path, f"is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from error
