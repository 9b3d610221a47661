"""Signals that come where nothing can be raised: they come again, a little later."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

AGAIN_SECONDS = 0.05
_waiting: list[tuple[threading.Timer, int]] = []


def _send(number: int) -> None:
    if hasattr(signal, "pthread_kill") and callable(signal.getsignal(number)):
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # also ends a wait
    else:
        _thread.interrupt_main(signal.Signals(number))


def send_again(number: int) -> None:
    timer = threading.Timer(AGAIN_SECONDS, _send, [number])
    _waiting.append((timer, number))
    timer.start()


def forget() -> list[int]:
    """Have none come again; returns those that have not come yet."""
    left = [number for timer, number in _waiting if timer.is_alive()]
    for timer, _ in _waiting:
        timer.cancel()
    _waiting.clear()
    return left


def raise_waiting() -> None:
    """Let those that have not come yet come now, at the end of what they were to interrupt."""
    for number in forget():
        signal.raise_signal(number)


@contextlib.contextmanager
def not_within(code: CodeType) -> Iterator[None]:
    """Ctrl-C and SIGTERM do not raise in a function that a library calls."""
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is code:
            send_again(number)
        else:
            handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, handle)
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        if handlers:
            raise_waiting()
