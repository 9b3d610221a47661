"""benchmarks/error_shape.py: the shape of errors that were drawn with it comes back."""

import numpy as np
import pytest
from conftest import write_record
from scipy.ndimage import gaussian_filter
from test_evaluate import write_maps

import utils
from benchmarks import error_shape
from method import errors


@pytest.fixture
def section(tmp_path):
    """Expectations whose errors are those of method/errors.py around flat maps."""
    rng, shape = np.random.default_rng(0), (240, 240)
    spots = np.stack(np.meshgrid(np.arange(6, 240, 12.5), np.arange(6, 240, 12.5)), -1).reshape(
        -1, 2
    )
    places = np.argwhere(np.ones(shape, bool)) + 0.5
    grown = errors.growth(places, spots, 3.4375).reshape(shape)
    maps, counts = [], []
    for level in (30.0, 50.0):
        image = level * rng.uniform(0.5, 1.5, (60, 60)).repeat(4, 0).repeat(4, 1)
        noise = np.sqrt(errors.OWN) * rng.normal(size=shape)
        for share, width in errors.CORRELATION:
            field = gaussian_filter(rng.normal(size=shape), width / np.sqrt(2), mode="wrap")
            noise += np.sqrt(share) * field / field.std()
        truth = image + np.sqrt(2.0 * image * grown) * noise
        counts.append(rng.poisson(truth.clip(0)))
        maps.append(image)
    write_maps(tmp_path, np.dstack(maps), ["A", "B"])
    np.savez(
        tmp_path / "truth.npz", counts=np.dstack(counts).astype(np.float32),
        tissue=np.ones(shape, bool), genes=np.array(["A", "B"]),
    )  # fmt: skip
    lines = [f"s{i},{16 * x},{16 * y}" for i, (y, x) in enumerate(spots)]
    (tmp_path / "locs.csv").write_text("\n".join([",x,y", *lines]) + "\n")
    (tmp_path / "cnts.csv").write_text(
        "\n".join([",A,B", *(f"s{i},1,1" for i in range(len(spots)))])
    )
    (tmp_path / "radius.txt").write_text("55\n")
    write_record(tmp_path, utils.HISTEX, [], ["cnts-super"])
    return tmp_path


def test_the_shape_of_errors_comes_back(section, capsys):
    shape = error_shape.shape_of(section, 1)
    near = np.nanmedian(shape.by_distance[1], axis=0)
    assert (np.diff(near[:4]) > 0).all()
    assert near[3] / near[0] == pytest.approx((1 + 1.75) / (1 + 0.33), rel=0.1)
    np.testing.assert_allclose(np.median(shape.by_map, axis=0), 1, atol=0.25)
    found = np.median(shape.by_size, axis=0)
    np.testing.assert_allclose(found, error_shape.expected_by_size(), rtol=0.15)
    assert error_shape.run(["--directory", str(section)]) == 0
    out = capsys.readouterr().out
    assert "2 genes" in out
    assert "| by the rule |" in out
    assert error_shape.run(["--directory", str(section), "--fewest", "100000000"]) == 2
    assert "no gene of 100000000 counts" in capsys.readouterr().err
