"""benchmarks/gpu.py at a small size on the CPU, and what its made-up section is like."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import gpu

SMALL = ("--device", "cpu", "--small", "--mm", "0.6", "--spots", "20", "--genes", "6")
SMALL += ("--states", "2", "--batch-size", "4", "--seconds", "0.01")
BLOCKED = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pandas", "scipy", "pyvips", "skimage", "matplotlib", "h5py"}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_it_runs_where_nothing_but_torch_timm_numpy_and_opencv_is():
    """As a process, for the packages are blocked before anything is imported."""
    script = str(ROOT / "benchmarks" / "gpu.py")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, script, *SMALL],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    stages = [name.split(",")[0] for name in rows]
    assert stages == ["extraction"] * 2 + ["training"] * 3 + ["prediction"]
    for name, (measured, seconds, _, busy) in rows.items():
        if " ms a " not in measured:
            assert (name, measured) == ("training, spots", "kept on the device")
            continue
        assert float(seconds.removeprefix("~")) > 0
        assert 1 <= float(busy.removesuffix("%")) <= 110
    one, both = (float(rows[name][1][1:]) for name in rows if "state" in name and "train" in name)
    assert both == pytest.approx(2 * one, rel=0.01)
    assert "0.6 mm, 20 spots, 6 genes, 2 states" in done.stdout


def test_a_name_of_an_absent_package_can_be_imported_but_not_used():
    name = gpu.Placeholder("scipy").spatial.cKDTree
    with pytest.raises(ImportError, match=r"scipy.spatial.cKDTree is not installed"):
        name(np.zeros((2, 2)))


def test_the_made_up_section_is_a_lattice_with_its_nearest_points():
    args = gpu.build_parser().parse_args(SMALL)
    section, split = gpu.make_section(args)
    assert len(section.spots) == 20
    apart = np.linalg.norm(section.spots[:, None] - section.spots, axis=2)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(apart.min(axis=1), 100 / 8, rtol=1e-9)
    assert set(split.train).isdisjoint(split.held_out)
    assert len(split.train) + len(split.held_out) == 20
    measured = section.parents[:, 0] == section.parents[:, 1]
    assert measured.sum() == 20
    distance = np.linalg.norm(
        np.subtract(*section.spots[section.parents[~measured]].swapaxes(0, 1)), axis=1
    )
    np.testing.assert_allclose(distance, 100 / 8, rtol=1e-9)
    far = np.linalg.norm(section.points[None] - section.spots[:, None], axis=2)
    wanted = np.sort(far, axis=1)[:, : section.context]
    np.testing.assert_allclose(np.take_along_axis(far, split.near, axis=1), wanted, atol=1e-6)


def test_a_step_is_timed_and_its_share_of_work_is_known():
    a, cpu = torch.rand(300, 300), torch.device("cpu")
    full = gpu.busy_share(lambda: [a @ a for _ in range(100)], cpu)
    idle = gpu.busy_share(lambda: (a @ a, gpu.time.sleep(0.5)), cpu)
    assert idle < 0.5 < full < 1.1
