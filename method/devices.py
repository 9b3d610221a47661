"""Where to compute: devices, and the processes that torchrun starts."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from utils import StageError

SPARE_BYTES = 500_000_000  # where memory is not a card's own


def resolve_device(name: str) -> torch.device:
    """torch.device of ``--device``; auto is CUDA, else MPS, else CPU; a named one must work."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and name.startswith("cuda:"):
        raise StageError(
            f"--device {name} puts all {world} processes of torchrun on one card.",
            "Say --device cuda: each process then takes a card of its own.",
        )
    wanted = ["cuda", "mps", "cpu"] if name == "auto" else [name]
    reason: Exception | None = None
    for candidate in wanted:
        try:
            device = torch.device(candidate)
            probe = torch.ones(2, 2, device=device)
            if (
                float((probe @ probe).sum()) == 8.0
            ):  # is_available() can be true with a broken driver
                return probe.device  # with its number, which threads would not know
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = error
    detail = str(reason).splitlines()[0] if reason else "a test product came out wrong"
    raise StageError(
        f"--device {name} cannot be used on this machine: {detail}",
        "Leave --device out to take what is there, or say --device cpu.",
    )


def limit_threads(device: torch.device, most: int) -> None:
    """Have a CPU compute with at most so many threads, and leave one core to other programs.

    Unless the user has said how many. Threads wait for each other after every small operator: if
    one shares its core with another program, all are as slow as that one.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(most, torch.get_num_threads() - 1)))


def set_precision(wanted: str, device: torch.device, best: str = "bfloat16") -> str:
    """Have torch compute with these numbers, and return which they are: auto is settled here.

    It is ``best``, what suits the network, on a card that has units for it.

    TF32 is for the products and convolutions that stay in float32; torch uses it in convolutions
    unless told otherwise. Cards have units for it, as for bfloat16, from compute capability 8 on.
    """
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if wanted == "auto":
        wanted = best if has_units else "float32"
    if wanted == "tf32" and not has_units:
        raise StageError(
            f"--precision tf32 is not for {device}: it needs a CUDA card of compute capability 8 "
            f"or more.",
            "Leave --precision out.",
        )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if wanted == "float32" else "high")
        torch.backends.cudnn.allow_tf32 = wanted != "float32"
    return wanted


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there; a graphics card gets it while the CPU goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def spare_bytes(device: torch.device) -> int:
    """Memory that may be taken to save time: half of a card's free one, for all processes on it."""
    if device.type != "cuda":
        return SPARE_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / torch.cuda.device_count()
    return (torch.cuda.mem_get_info(device)[0] + cached) // (2 * math.ceil(processes))


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of its own for it, MPS and the CPU have not."""
    return "out of memory" in str(error).lower() or "allocate memory" in str(error)


# ----- several processes (torchrun) -----
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # environment variables
LONGEST_WAIT = timedelta(days=7)  # of one process for another; a dead one is noticed at once


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started for one command: this one is ``rank`` of ``world``."""

    rank: int
    world: int

    def share(self, items: Sequence, rank: int | None = None) -> Sequence:
        """Every world-th of the items, of this process or of another: each belongs to one."""
        return items[self.rank if rank is None else rank :: self.world]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world == 1:
            return
        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise StageError(
                f"Process {self.rank} of {self.world} cannot go on: another one has ended.",
                "Mend what that one says, then run the same command.",
            ) from error


ALONE = Ranks(0, 1)


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
        yield ALONE
        return
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


@contextlib.contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Turn the failure to get memory into a StageError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise StageError(
            f"The memory of {device} does not suffice: {str(error).splitlines()[0]:.200}",
            "Run the same command with a smaller --batch-size, such as 4, or with --device cpu.",
        ) from error
