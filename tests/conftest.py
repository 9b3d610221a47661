"""A complete tiny sample that every test may copy, and the two ways in which tests run a stage."""

import argparse
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

import utils
from writing import disk

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = (
    ROOT.parent / "shared" / "data"
)  # real sections, beside the checkout where they are at hand

# Each run of the tests has the same examples, so that none fails by chance; HISTEX_FUZZ=1 draws new
settings.register_profile(
    "histex",
    derandomize=not os.environ.get("HISTEX_FUZZ"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("histex")


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what the imports made, which stays until the end."""
    gc.collect()
    gc.freeze()


IMAGE_SHAPE = (
    440,
    660,
)  # rows, columns at 0.5 um/px: padding up to 448 x 672 is part of every test
PITCH_PX, RADIUS_PX = 100.0, 27.5  # half the Visium scale, so that a small image holds many spots
GENES = [f"GENE{i}" for i in range(8)]


def draw_section(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A pink ellipse with dark nuclei on a nearly white slide, uint8 (rows, columns, 3)."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[: shape[0], : shape[1]]
    inside = ((row / shape[0] - 0.5) / 0.46) ** 2 + ((col / shape[1] - 0.5) / 0.46) ** 2 < 1
    image = np.full((*shape, 3), (243, 241, 244), float) + rng.normal(0, 1.5, (*shape, 3))
    image[inside] = (214, 140, 184)
    image[inside] += rng.normal(0, 12, (inside.sum(), 3))
    for r, c in zip(rng.uniform(0, shape[0], 500), rng.uniform(0, shape[1], 500), strict=True):
        nucleus = ((row - r) ** 2 + (col - c) ** 2 < 5**2) & inside
        image[nucleus] = (92, 62, 140)
    return image.clip(0, 255).astype(np.uint8)


def hexagonal_spots(shape: tuple[int, int], pitch: float, margin: float) -> np.ndarray:
    """Spot centres (N, 2), x and y, on a Visium-like lattice ``margin`` px from every edge."""
    points = []
    for i, y in enumerate(np.arange(margin, shape[0] - margin, pitch * np.sqrt(3) / 2)):
        for x in np.arange(margin + (i % 2) * pitch / 2, shape[1] - margin, pitch):
            points.append((x, y))
    return np.array(points)


def write_sample(directory: Path, shape: tuple[int, int] = IMAGE_SHAPE, seed: int = 0) -> Path:
    """The user's five files of a small sample."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_section(shape, seed)).save(directory / "he-raw.png")
    (directory / "pixel-size-raw.txt").write_text("0.5\n")
    (directory / "radius-raw.txt").write_text(f"{RADIUS_PX}\n")
    xy = hexagonal_spots(shape, PITCH_PX, margin=60.0)
    spots = [f"spot{i:03d}" for i in range(len(xy))]
    pd.DataFrame(xy, index=spots, columns=["x", "y"]).to_csv(directory / "locs-raw.csv")
    rate = 3 + 6 * np.abs(np.sin(xy[:, :1] / 150 + np.arange(len(GENES))[None]))
    counts = pd.DataFrame(rng.poisson(rate), index=spots, columns=GENES)
    counts.to_csv(directory / "cnts.csv")
    return directory


@pytest.fixture(scope="session")
def _sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample") / "section A")


@pytest.fixture
def sample(_sample, tmp_path):
    """A fresh copy of the tiny raw sample (he-raw, pixel-size-raw, radius-raw, locs-raw, cnts)."""
    return Path(shutil.copytree(_sample, tmp_path / "section A"))


def write_record(
    directory: Path, script: str, inputs: list[str], outputs: list[str], **facts: Any
) -> None:
    """The record ``script`` would have left, to test a stage without those before it."""
    record = {
        "finished": True,
        "script": script,
        "inputs": {name: disk.fingerprint(directory / name) for name in inputs},
        "outputs": {name: disk.fingerprint(directory / name) for name in outputs},
        **facts,
    }
    (directory / utils.record_name(script)).write_text(json.dumps(record))


def run(script: str, directory: Path, *options: str) -> int:
    """Run a stage in this process and return its exit code."""
    module = importlib.import_module(Path(script).stem)
    return module.run(["--directory", str(directory), *options])


def run_process(
    script: str, directory: Path, *options: str, **kwargs
) -> subprocess.CompletedProcess:
    """Run a stage as its user does, from the shell."""
    command = [sys.executable, str(ROOT / script), "--directory", str(directory), *options]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def run_as_main(script: str, *options: object) -> int:
    """Run a script as its user does, but in this process, where it is imported already.

    Only a process of its own shows what a signal, an import or a console does: see run_process.
    """
    path = ROOT / script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, options)])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        before = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(SystemExit) as done:
                runpy.run_path(str(path), run_name="__main__")
        finally:
            signal.signal(signal.SIGINT, before)
    assert isinstance(done.value.code, int)
    return done.value.code


def run_alone(script: str, directory: Path, *options: str) -> None:
    """The same from within the sample, without the project on sys.path, torch and matplotlib."""
    code = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
except SystemExit as done:
    assert done.code == 0, done.code
assert not {{"torch", "matplotlib"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, script, "--directory", str(directory), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr


PIPELINE = (  # the README's order, with options that suit a test
    ("image_calibration.py",),
    ("get_HR.py",),
    ("Histology_Extractor.py", "--backbone", "efficientnet_lite0", "--device", "cpu"),
    ("masking_non_tissue.py",),
    ("HISTEX.py", "--epochs", "2", "--n-states", "1", "--n-plots", "1", "--device", "cpu"),
)
RECORDS = tuple(utils.record_name(script) for script, *_ in PIPELINE)


@pytest.fixture(scope="session")
def finished_sample(tmp_path_factory):
    """The tiny sample after all five stages. Do not change it: ask for ``finished``, a copy."""
    directory = write_sample(tmp_path_factory.mktemp("finished") / "section A")
    for script, *options in PIPELINE:
        assert run(script, directory, *options) == 0
    return directory


@pytest.fixture
def finished(finished_sample, tmp_path):
    """A fresh copy of the finished sample; copytree keeps times, so its records stay valid."""
    return Path(shutil.copytree(finished_sample, tmp_path / "finished A"))


@pytest.fixture(scope="session")
def _labelled(tmp_path_factory):
    from test_regions import true_labels, write_section

    directory = tmp_path_factory.mktemp("regions") / "section R"
    return write_section(directory, true_labels(), np.random.default_rng(0))


@pytest.fixture
def labelled(_labelled, tmp_path):
    """A fresh copy of a finished section of three regions."""
    return Path(shutil.copytree(_labelled, tmp_path / "section R"))


# ----- reading one file -----
ONE_FOLDER = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def stage(tmp_path) -> utils.Stage:
    """A run of a stage in an empty folder."""
    directory = tmp_path / "sample"
    directory.mkdir()
    return make_stage(directory)


def make_stage(directory: Path, script: str = "a_test.py", **arguments) -> utils.Stage:
    known = {"directory": directory, "force": False, "allow_stale": False, **arguments}
    return utils.Stage(script, argparse.Namespace(**known))


def put(stage: utils.Stage, name: str, content: str | bytes) -> Path:
    path = stage.directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outcome(read, *args):
    """What ``read`` returns and None, or None and the message of its StageError."""
    try:
        return read(*args), None
    except utils.StageError as error:
        return None, str(error)
