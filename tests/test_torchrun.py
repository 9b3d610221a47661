"""Several processes for one slide: same bytes as one, and none left waiting when another fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_section, run, write_record
from PIL import Image

import Histology_Extractor as extractor
import utils
from method import devices

PATCHED = """
import os, sys
sys.path.insert(0, {root!r})
import Histology_Extractor as extractor
extractor.CNN_TILING = extractor.Tiling(20, 4, False)
genuine, computed = extractor.save_row, []
def save_row(path, row):
    genuine(path, row)
    computed.append(path.name)
    if {fails} and os.environ.get("RANK") == {failing!r}:
        raise extractor.StageError("this process stops", "Do nothing.")
extractor.save_row = save_row
code = extractor.run(sys.argv[1:])
print("computed", *computed, file=sys.stderr)
sys.exit(code)
"""
OPTIONS = ("--backbone", "efficientnet_lite0", "--device", "cpu")
MAPS = (utils.FEATURES.name, utils.RGB.name)


@pytest.fixture
def script(tmp_path):
    """The extractor with small tiles, and, if asked, with a process that fails after a row."""

    def write(failing: str | None = None) -> Path:
        path = tmp_path / "patched.py"
        text = PATCHED.format(root=str(ROOT), fails=failing is not None, failing=failing)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def section(directory: Path) -> Path:
    directory.mkdir()
    Image.fromarray(draw_section((1120, 224))).save(directory / "he.png")
    write_record(directory, "image_calibration.py", inputs=[], outputs=["he.png"])
    return directory


def run_two(directory: Path, script: Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, str(script), "--directory", str(directory), *OPTIONS],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The section after a run of one process, which has one thread as those of torchrun have."""
    monkeypatch.setattr(extractor, "CNN_TILING", extractor.Tiling(20, 4, False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = section(tmp_path / "one")
    assert run(utils.EXTRACTOR, directory, *OPTIONS) == 0
    torch.set_num_threads(threads)
    return directory


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(alone, tmp_path, script):
    directory = section(tmp_path / "two")
    done = run_two(directory, script())
    assert done.returncode == 0, done.stderr
    for name in MAPS:
        assert (directory / name).read_bytes() == (alone / name).read_bytes()
    assert np.load(directory / MAPS[0]).shape == (70, 14, 158)
    shares = [line.split()[1:] for line in done.stderr.splitlines() if "computed" in line]
    names = [f"row_{number:04d}.npy" for number in range(5)]
    assert sorted(shares) == [names[0::2], names[1::2]]
    assert done.stdout.count("finished in") == 1  # the other is silent
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [*MAPS, "Histology_Extractor.json", "he.png", "image_calibration.json"]
    )


@pytest.mark.slow
def test_when_one_process_fails_all_end_and_no_map_is_left(tmp_path, script):
    directory = section(tmp_path / "s")
    done = run_two(directory, script("1"))
    assert done.returncode == 1  # torchrun's own
    assert "error: this process stops" in done.stderr
    there = sorted(path.name for path in directory.iterdir() if not path.name.endswith(".work"))
    assert there == ["he.png", "image_calibration.json"]
    assert list(directory.glob(".*.work/row_0001.npy"))  # what was finished is not lost


def test_without_torchrun_a_process_is_alone(monkeypatch, capsys):
    for name in devices.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with devices.ranks() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        assert list(ranks.share(range(5))) == [0, 1, 2, 3, 4]
        ranks.barrier()
        print("heard")
    assert capsys.readouterr().out == "heard\n"
    assert not torch.distributed.is_initialized()


@pytest.fixture
def joined(monkeypatch):
    """torch.distributed and CUDA as far as ranks() asks for them; what it asked."""
    asked = []

    def note(name):
        return lambda *given, **options: asked.append((name, *given, *options.values()))

    for name in ("init_process_group", "destroy_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, note(name))
    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("rank", "cards"), [(0, False), (1, False), (0, True), (3, True)])
def test_a_process_of_torchrun_has_its_card_and_one_of_them_speaks(
    joined, monkeypatch, capsys, rank, cards
):
    for name, value in zip(devices.TORCHRUN, (rank, 4, rank), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards)
    with devices.ranks() as ranks:
        print("said")
        ranks.barrier()
        assert (ranks.rank, ranks.world) == (rank, 4)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    print("after")
    assert capsys.readouterr().out == ("said\nafter\n" if rank == 0 else "after\n")
    card = [("set_device", rank % 2)] if cards else []
    start = ("init_process_group", "gloo", devices.LONGEST_WAIT)
    assert joined == [*card, start, ("barrier",), ("destroy_process_group",)]


def test_a_process_that_waits_for_one_that_has_ended_says_so(monkeypatch):
    def fail():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "barrier", fail)
    with pytest.raises(utils.StageError, match="Process 1 of 3 cannot go on: another one has"):
        devices.Ranks(1, 3).barrier()


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to\nallocate", "can't allocate memory"]
)
def test_memory_of_a_device_that_runs_out_is_a_message(said):
    words = r"The memory of cpu does not suffice: (CUDA out of memory. Tried to|can't allocate mem)"
    explained = devices.memory_explained(torch.device("cpu"))
    with pytest.raises(utils.StageError, match=words) as error, explained:
        raise RuntimeError(said)
    assert "--batch-size" in str(error.value)


def test_another_error_of_a_device_stays_what_it_is():
    explained = devices.memory_explained(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explained:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_every_item_belongs_to_one_process():
    shares = [devices.Ranks(rank, 3).share(range(7)) for rank in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert devices.Ranks(2, 3).share(["a"]) == []


@pytest.mark.parametrize(("processes", "share"), [("1", 2), ("2", 2), ("3", 4), ("5", 6)])
def test_processes_share_the_free_memory_of_their_card(processes, share, monkeypatch):
    """Half of it; what torch has and does not use is free as well."""
    card = torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert devices.spare_bytes(card) == 1200 // share
    assert devices.spare_bytes(torch.device("cpu")) == devices.SPARE_BYTES


def test_a_device_has_its_number():
    """Each thread has a current card of its own, which is the first."""

    class Probe:
        device = torch.device("cuda:3")

        def __matmul__(self, other):
            return torch.full((2, 2), 2.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "ones", lambda *shape, device: Probe())
        assert devices.resolve_device("cuda") == torch.device("cuda:3")
