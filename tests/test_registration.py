"""method/registration.py: images moved on purpose are found and moved back; parts by loops."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import make_stage, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from test_HISTEX import make_section

import HISTEX
from analysis import inputs
from method import registration
from method.registration import Offset
from reference import lessons

SIDE, GENES, FEATURES = 88, 12, 6


def smooth_noise(rng, shape, sigma):
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (sigma, sigma, 0))
    return noise / noise.std(axis=(0, 1))


def moved_image(place, seed=0, tied=1.0):
    """Tokens (h, w, F), and rates (h, w, G) of what they show: at p - place what they show at p."""
    rng = np.random.default_rng(seed)
    tokens = smooth_noise(rng, (SIDE, SIDE, FEATURES), 1.5)
    weights = rng.standard_normal((FEATURES, GENES)) / math.sqrt(FEATURES)
    shown = ndimage.shift(tokens, (-place[0], -place[1], 0), order=3, mode="nearest")
    return tokens.astype(np.float16), 2 * np.exp(0.8 * tied * shown @ weights)


def moved_section(place, n=121, seed=0, tied=1.0):
    """A section whose image lies at ``place``; ``tied`` is how far its counts heed the image."""
    (tokens, rates), rng = moved_image(place, seed, tied), np.random.default_rng(seed + 1)
    steps = np.linspace(8, SIDE - 8, math.isqrt(n))
    spots = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    section = make_section()
    section = type(section)(
        tokens=tokens,
        tissue=np.ones((SIDE, SIDE), bool),
        spots=spots,
        counts=np.zeros((len(spots), GENES), np.float32),
        points=spots,
        expression=np.zeros((len(spots), GENES), np.float32),
        parents=np.stack([np.arange(len(spots))] * 2, axis=1),
        radius=3.4,
        context=4,
        by_area=True,
    )
    row, col = section.patches(np.floor(spots).astype(int))
    expected = np.einsum("nt,ntg->ng", section.areas, rates[row, col])
    section.counts = rng.poisson(expected).astype(np.float32)
    return section


# ----- finding it ---------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [(2, -1), (-3.4, 0.6), (0.5, 0.7), (-4.5, 4.5)])
def test_an_image_moved_on_purpose_is_found(place):
    found = registration.find_offset(moved_section(place))
    assert found.clear
    assert found.within_reach
    assert np.abs(found.place - place).max() < 0.25
    assert (found.sd < 0.3).all()
    assert (np.abs(found.place - place) < 4 * found.sd).all()


@pytest.mark.parametrize("seed", range(4))
def test_an_image_in_place_stays(seed):
    found = registration.find_offset(moved_section((0, 0), seed=seed))
    assert not found.clear
    assert np.abs(found.place).max() < 0.25


@pytest.mark.parametrize("seed", range(4))
def test_counts_that_the_image_does_not_explain_tell_nothing(seed):
    assert not registration.find_offset(moved_section((3, 3), seed=seed, tied=0)).clear


def test_an_image_too_far_away_is_beyond_reach():
    found = registration.find_offset(moved_section((0, 5.6)))
    assert found.clear
    assert not found.within_reach


def test_what_is_found_depends_on_the_section_only():
    one, other = (registration.find_offset(moved_section((2, 1))) for _ in range(2))
    assert np.array_equal(one.place, other.place)
    assert one.chance == other.chance


def test_of_many_spots_some_are_drawn(monkeypatch):
    monkeypatch.setattr(registration, "MOST_SPOTS", 110)
    found = registration.find_offset(moved_section((2, -1)))
    assert np.abs(found.place - (2, -1)).max() < 0.35


def test_disc_means_by_loop():
    section = moved_section((0, 0))
    section.tissue[:30, 40:] = False
    section = replace(section, tissue=section.tissue)
    mean, std = section.token_statistics
    spots = np.array([0, 5, 17, 60])
    found = registration.disc_means(section, spots, None, 2)
    assert found.shape == (5, 5, 4, FEATURES)
    x = (section.tokens.astype(np.float64) - mean) / std * section.tissue[..., None]
    x = np.pad(x, ((20, 20), (20, 20), (0, 0)), mode="edge")
    row, col = section.patches(np.floor(section.spots[spots]).astype(int))
    areas = registration.grid.disc_areas(section.spots[spots], row, col, section.radius)
    for down in range(-2, 3):
        for right in range(-2, 3):
            there = x[row + 20 + down, col + 20 + right]
            wanted = (areas[..., None] * there).sum(axis=1) / areas.sum(axis=1)[:, None]
            np.testing.assert_allclose(found[down + 2, right + 2], wanted, atol=1e-4)
    axes = np.random.default_rng(0).standard_normal((FEATURES, 3)).astype(np.float32)
    projected = registration.disc_means(section, spots, axes, 2)
    np.testing.assert_allclose(projected, found @ axes, atol=1e-4)


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 3.0]))
@settings(max_examples=20)
def test_what_is_left_over_is_that_of_regressions_without_each_spot(seed, penalty):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((15, 4)), rng.standard_normal((15, 3))
    centred = x - x.mean(axis=0)
    parts = np.linalg.svd(np.stack([centred, 2 * centred]), full_matrices=False)
    found, scaled = registration.left_over(*parts[:2], y, penalty)
    np.testing.assert_allclose(found, scaled, atol=1e-9)
    ridge = penalty * (centred**2).sum() * np.diag([0, 1, 1, 1, 1])  # not of the constant
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        a = np.column_stack([np.ones(14), x[others]])
        weights = np.linalg.solve(a.T @ a + ridge, a.T @ y[others])
        np.testing.assert_allclose(found[i], y[i] - np.append(1, x[i]) @ weights, atol=1e-8)


@given(st.floats(-3.4, 3.4), st.floats(-3.4, 3.4), st.floats(-0.9, 0.9))
@settings(max_examples=50)
def test_the_lowest_place_of_a_parabola_is_exact(down, right, mixed):
    y, x = np.meshgrid(np.arange(-4, 5) - down, np.arange(-4, 5) - right, indexing="ij")
    values = y * y + x * x + mixed * x * y
    lowest = np.array(np.unravel_index(values.argmin(), values.shape)) - 4
    if np.abs(lowest - (down, right)).max() < 1:  # a long valley may be lowest far from its middle
        np.testing.assert_allclose(registration.lowest(values), (down, right), atol=1e-6)


def test_a_slope_and_a_saddle_are_lowest_at_a_point_of_the_grid():
    y, x = np.meshgrid(np.arange(-2, 3), np.arange(-2, 3), indexing="ij")
    assert registration.lowest(3.0 * y + x).tolist() == [-2, -2]
    assert registration.lowest(y * y - 0.1 * x * x).tolist() == [0, -2]


def test_blocks_have_as_many_spots_each():
    places = np.random.default_rng(0).uniform(0, 100, (160, 2))
    block = registration.blocks(places)
    assert np.bincount(block).tolist() == [10] * 16
    above = [places[block // 4 == i, 0] for i in range(4)]
    assert all(one.max() < other.min() for one, other in pairwise(above))


def test_the_error_is_that_of_the_jackknife():
    """Of a mean, the jackknife gives the standard error, and the chance is Hotelling's."""
    x = np.random.default_rng(1).normal((0.3, 0.1), 1, (16, 2))
    without = (x.sum(axis=0) - x) / 15
    sd, chance = registration.error_of(x.mean(axis=0), without)
    np.testing.assert_allclose(sd, x.std(axis=0, ddof=1) / 4, rtol=1e-4)
    squared = 16 * x.mean(axis=0) @ np.linalg.solve(np.cov(x.T), x.mean(axis=0))
    assert chance == pytest.approx(stats.f.sf(squared * 14 / (2 * 15), 2, 14), rel=1e-3)


# ----- undoing it ---------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [(0, 0), (2, -3), (0.25, 0.5), (-1.75, 4.0625)])
def test_tokens_are_moved_as_scipy_moves_images(place, monkeypatch):
    monkeypatch.setattr(registration, "STRIP_BYTES", 2000)  # some rows at a time
    tokens = np.random.default_rng(0).standard_normal((23, 17, 4)).astype(np.float32)
    moved = np.empty_like(tokens)
    registration.move(tokens, np.ones((23, 17), bool), np.array(place), moved)
    wanted = ndimage.shift(tokens, (-place[0], -place[1], 0), order=1, mode="nearest")
    np.testing.assert_allclose(moved, wanted, atol=1e-5)


def test_glass_is_not_mixed_into_tissue():
    tokens = np.zeros((6, 6, 1), np.float32)
    tissue = np.zeros((6, 6), bool)
    tissue[:, :3] = True
    tokens[tissue] = 8
    moved = registration.move(tokens, tissue, np.array([0, 0.5]), np.empty_like(tokens))
    np.testing.assert_allclose(moved[:, :3], 8, rtol=0.002)
    assert (moved[:, 3:] == 0).all()


def test_moved_back_the_image_lies_in_place(tmp_path, capsys):
    section = moved_section((2, -1))
    told = registration.register(section, tmp_path)
    assert told["undone"]
    assert (told["down_um"], told["right_um"]) == pytest.approx((16, -8), abs=2)
    said = capsys.readouterr().out
    assert "um below and" in said
    assert "um left of the spots" in said
    assert "moved back" in said
    assert section.tokens.dtype == np.float16
    assert [*tmp_path.iterdir()] == []  # what was written is gone with the process
    again = registration.register(section, tmp_path)
    assert not again["undone"]
    assert abs(again["down_um"]) + abs(again["right_um"]) < 3
    assert "the image fits the spots, as far as" in capsys.readouterr().out


def test_what_is_in_place_or_too_far_is_left_where_it_is(tmp_path, capsys):
    for place, words in (((0, 0), "fits"), ((0, 5.6), "too far to be moved back")):
        section = moved_section(place)
        before = section.tokens
        assert not registration.register(section, tmp_path)["undone"]
        assert section.tokens is before
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("without", ["counts", "tokens", "tissue beyond the spots"])
def test_a_section_that_tells_nothing_stays(tmp_path, without, capsys):
    section = moved_section((2, -1))
    if without == "counts":
        section.counts[:] = 0
    elif without == "tokens":
        section.tokens[:] = 3
    else:  # glass all around a narrow strip
        section.tissue[:, 30:] = False
        section.tissue[:, :10] = False
        section.usable = section.spots[:, 1] < 30
        section.spots = np.repeat(section.spots[section.usable], 4, axis=0)
        section.counts = np.repeat(section.counts[section.usable], 4, axis=0)
        section.usable = np.ones(len(section.spots), bool)
    told = registration.register(section, tmp_path)
    assert told is None or all(map(math.isfinite, (told["down_um"], told["gain"])))
    assert without.startswith("tissue") or not told["undone"]
    if not without.startswith("tissue"):
        assert "the spots cannot tell how well the image fits" in capsys.readouterr().out


def test_few_spots_are_not_asked(tmp_path, capsys):
    assert registration.register(moved_section((2, -1), n=81), tmp_path) is None
    assert "fewer than 100 cannot tell" in capsys.readouterr().out


def test_only_what_is_rare_sure_and_likely_is_clear():
    sd = np.array([0.1, 0.1])
    assert Offset(np.array([0.6, 0.4]), sd, 1e-4, 11, 51).clear
    assert not Offset(np.array([0.6, 0.4]), sd, 1e-4, 9, 51).clear
    assert not Offset(np.array([0.6, 0.4]), sd, 1e-4, 11, 49).clear
    assert not Offset(np.array([2.0, 0.0]), sd, 0.02, 11, 51).clear
    assert not Offset(np.array([2.0, 0.0]), np.array([0.1, 0.6]), 1e-4, 11, 51).clear
    assert not Offset(np.array([0.0, -5.0]), sd, 1e-4, 11, 51).within_reach


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_a_truth_tells_where_its_image_lies(tmp_path, capsys, kind):
    (tmp_path / "kidney").mkdir()
    (tokens, rates), stage = moved_image((1, -2)), make_stage(tmp_path / "kidney")
    counts = np.random.default_rng(0).poisson(rates)[:80].astype(kind)  # of fewer rows than tokens
    tissue = np.zeros((SIDE, SIDE), bool)
    tissue[2:80, 3:] = True
    truth = inputs.Truth(counts, tissue[:80], [f"g{i}" for i in range(GENES)])
    moved, told = lessons.put_in_place(stage, tokens, tissue, truth, tmp_path)
    assert told["undone"]
    assert (told["down_um"], told["right_um"]) == pytest.approx((8, -16), abs=1)
    assert "kidney: the image lies" in (said := capsys.readouterr().out)
    assert "of its truth.npz" in said
    inner = np.s_[4:76, 5:-5]
    assert np.abs(moved[inner] - np.roll(tokens, (-1, 2), axis=(0, 1))[inner]).mean() < 0.1
    tissue[:, 30:] = False
    tissue[40:] = False
    same, told = lessons.put_in_place(stage, tokens, tissue, truth, tmp_path)
    assert same is tokens
    assert told is None
    assert "too small to tell" in capsys.readouterr().out


def test_presets_and_the_option():
    parse = HISTEX.options.parser("").parse_args
    given = ["--directory", "x"]
    assert HISTEX.find_preset(parse(given)).registers
    assert not HISTEX.find_preset(parse([*given, "--no-registration"])).registers
    assert not HISTEX.find_preset(parse([*given, "--preset", "published"])).registers


def test_the_record_tells_that_too_few_spots_were_not_asked(finished):
    record = json.loads((finished / "HISTEX.json").read_text())
    assert record["image_beside_spots"] is None


def test_a_run_is_trained_on_moved_tokens_and_says_so(finished, capsys, monkeypatch):
    found = Offset(np.array([1.0, -0.5]), np.array([0.1, 0.1]), 1e-5, 50.0, 100.0)
    monkeypatch.setattr(registration, "find_offset", lambda section: found)
    options = ("--epochs", "1", "--n-states", "1", "--n-plots", "0", "--device", "cpu", "--force")

    def results(*more):
        assert run("HISTEX.py", finished, *options, *more) == 0
        record = json.loads((finished / "HISTEX.json").read_text())
        files = sorted((finished / "cnts-super").glob("*.pickle"))
        return record["image_beside_spots"], files[0].read_bytes(), capsys.readouterr().out

    told, moved, said = results()
    assert told["undone"]
    assert (told["down_um"], told["right_um"]) == (8.0, -4.0)
    assert "8.0 um below and 4.0 um left of the spots" in said
    told, still, said = results("--no-registration")
    assert told is None
    assert "beside" not in said
    assert "trained anew, since options or the preset have changed" in said
    assert moved != still
