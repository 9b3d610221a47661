"""What every reader of TIFF needs before it asks tifffile for more than the first page."""

from __future__ import annotations

from typing import Any


def check_chain(tiff: Any) -> None:
    """Raise ValueError if the pages of a ``TiffFile`` go round in a circle.

    Each page tells where the next one lies. tifffile follows a page that points back for ever.
    """
    seen: dict[int, int] = {}
    for number, page in enumerate(tiff.pages, start=1):
        if page.offset in seen:
            raise ValueError(f"page {number} is page {seen[page.offset]} again: they never end")
        seen[page.offset] = number
