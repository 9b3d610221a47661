"""What long work says of itself: a bar on a terminal; else, in a log, a line every 30 seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar

from tqdm import tqdm

SPEAK_SECONDS = 30.0
Item = TypeVar("Item")
_bars: list[Bar] = []  # those that run now, the innermost last


class Bar(Generic[Item]):
    """Goes over ``items`` and shows how far it is; or, without items, ``update`` counts."""

    def __init__(
        self,
        items: Iterable[Item],
        what: str,
        total: int | None = None,
        done: int = 0,
        quiet: bool = False,
    ) -> None:
        self.items, self.what, self.done = items, what, done
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.shown = tqdm(total=self.total, initial=done, desc=what, disable=quiet or None)
        if not quiet:
            _bars.append(self)

    def __iter__(self) -> Iterator[Item]:
        try:
            for item in self.items:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, **facts: float) -> None:
        self.done += 1
        self.shown.update()
        if facts:
            self.shown.set_postfix({name: f"{value:.4f}" for name, value in facts.items()})

    def close(self) -> None:
        self.shown.close()
        with contextlib.suppress(ValueError):  # quiet, or closed already
            _bars.remove(self)

    def words(self) -> str:
        return f"{self.what}, {self.done:,} of {self.total:,}" if self.total else self.what


@contextlib.contextmanager
def spoken(script: str) -> Iterator[None]:
    """Where nobody sees bars: every 30 seconds a line on what the script is doing."""
    if sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    over, started = threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(SPEAK_SECONDS):
            doing = "; ".join(bar.words() for bar in list(_bars)) or "at work"
            minutes = (time.monotonic() - started) / 60
            line = f"{script}: {doing} ({minutes:.1f} min so far)"
            print(line, file=sys.stderr, flush=True)  # as bars: tables go to stdout

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
