"""method/linear.py against solutions of its formulas, spot by spot and superpixel by superpixel."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.interpolate import RegularGridInterpolator
from test_HISTEX import default_network, make_section
from test_registration import GENES, SIDE, moved_image, moved_section

import HISTEX
from method import linear, prediction
from method.section import standardised_rows, token_statistics

CPU = torch.device("cpu")
EVERY = slice(0, GENES)


def log_maps(section, shown=None, at_once=1000):
    """The model's logarithms (G, M)."""
    shown = section.tissue if shown is None else shown
    model = linear.of_section(section, shown, CPU)
    starts = range(0, int(shown.sum()), at_once)
    genes = model.of_genes(slice(0, section.counts.shape[1]))
    parts = [model.log_counts(slice(i, i + at_once), genes) for i in starts]
    return torch.cat(parts).T.numpy()


# ----- the formulas -----
def test_shares_and_noises_are_weighted_by_the_likelihood_of_the_values():
    rng = np.random.default_rng(0)
    n, genes = 30, 4
    tokens = rng.normal(size=(n, 5)) / math.sqrt(5)
    places = rng.uniform(0, 20, (n, 2))
    kernels = tokens @ tokens.T, linear.covariance(places, places, 4.0)
    y = np.column_stack([
        tokens[:, 0] * 2, np.sin(places[:, 0] / 5), rng.normal(size=n), tokens[:, 1] + 1
    ])  # fmt: skip
    y += rng.normal(size=y.shape) * 0.3
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    got = linear.posterior(*kernels, y)
    for gene in range(genes):
        wanted, likelihoods = [], []
        for share in linear.SHARES:
            for noise in linear.NOISES:
                covariance = 1 + share * kernels[0] + (1 - share) * kernels[1]
                covariance = covariance + noise * np.eye(n)
                solved = np.linalg.solve(covariance, y[:, gene])
                scale = y[:, gene] @ solved / n  # the likeliest
                normal = stats.multivariate_normal(np.zeros(n), scale * covariance)
                likelihoods.append(normal.logpdf(y[:, gene]))
                wanted.append([share * solved, (1 - share) * solved, solved.sum()])
        chance = np.exp(np.array(likelihoods) - max(likelihoods))
        chance /= chance.sum()
        for part, parts in zip(got, zip(*wanted, strict=True), strict=True):
            mean = sum(p * x for p, x in zip(chance, parts, strict=True))
            np.testing.assert_allclose(part[..., gene], mean, rtol=1e-4, atol=1e-8)


def test_genes_of_tokens_follow_tokens_and_genes_of_the_place_the_place():
    rng = np.random.default_rng(1)
    tokens, places = rng.normal(size=(80, 2)), rng.uniform(0, 40, (80, 2))
    y = np.column_stack([tokens[:, 0], np.sin(places[:, 0] / 9)])
    kernels = tokens @ tokens.T / 2, linear.covariance(places, places, 4.0)
    by_tokens, by_place, _ = linear.posterior(*kernels, y / y.std(axis=0))
    sizes = np.stack([np.abs(by_tokens).sum(axis=0), np.abs(by_place).sum(axis=0)])
    assert sizes[0, 0] > 2 * sizes[1, 0]
    assert sizes[1, 1] > 2 * sizes[0, 1]


def test_the_covariance_over_the_place_is_maternes_of_order_3_2():
    places = np.array([[0.0, 0.0], [3.0, 4.0]])
    x = math.sqrt(3) * 5 / (linear.LENGTH * 2.5)
    want = [[1, (1 + x) * math.exp(-x)], [(1 + x) * math.exp(-x), 1]]
    np.testing.assert_allclose(linear.covariance(places, places, 2.5), want)


def test_the_views_of_a_disc_are_means_by_area_of_tokens_and_of_their_squares():
    section = moved_section((0.0, 0.0))
    section.spots = section.spots.copy()
    section.spots[0] = 2.0, 3.0  # the disc and the squares reach beyond the border
    section = replace(section)
    mean, std = section.token_statistics
    got = linear.disc_views(section, np.array([0, 7]))
    for spot, row in zip((0, 7), got, strict=True):
        total, weight = 0.0, 0.0
        row_of, col_of = section.patches(np.floor(section.spots[[spot]]).astype(int))
        for r, c, area in zip(row_of[0], col_of[0], section.areas[spot], strict=True):
            views = []
            for side, factor in zip((1, *linear.SCALES), linear.WEIGHTS, strict=True):
                steps = np.arange(-(side // 2), side // 2 + 1)
                rows, columns = ((x + steps).clip(0, SIDE - 1) for x in (r, c))
                square = (section.tokens[np.ix_(rows, columns)] - mean) / std
                views.append(factor * square.mean(axis=(0, 1)))
            total, weight = total + area * np.concatenate(views), weight + area
        np.testing.assert_allclose(row, total / weight, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(2, 6),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))),
)
def test_between_nodes_values_are_bilinear(rows, columns, parts):
    table = np.random.default_rng(0).normal(size=(rows, columns))
    places = np.array(parts).reshape(-1, 2) * [rows - 1, columns - 1]
    near, shares = linear.between(places, columns)
    exact = RegularGridInterpolator((np.arange(rows), np.arange(columns)), table)
    got = (table.ravel()[near] * shares).sum(axis=1)
    np.testing.assert_allclose(got, exact(places) if len(places) else [], atol=1e-5)


def test_tokens_go_by_in_strips_with_their_halo(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.normal(3, 2, (17, 5, 3)).astype(np.float16)
    mean, std = token_statistics(tokens, np.ones((17, 5), bool))
    monkeypatch.setattr("method.section.STRIP_BYTES", 4 * 9 * 3 * 4 * 6)  # six rows
    parts = list(standardised_rows(tokens, (mean, std), 2, 2, CPU))
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 6), (6, 12), (12, 17)]
    whole = np.pad((tokens - mean) / std, ((2, 2), (2, 2), (0, 0)), mode="edge")
    for rows, x in parts:
        np.testing.assert_allclose(x[0], whole[rows.start : rows.stop + 4], atol=2e-6)


# ----- on a section -----
def test_maps_are_what_the_spots_tell_each_superpixel(monkeypatch):
    """Every superpixel by its own covariances with the spots."""
    monkeypatch.setattr(linear, "NODE", 0.1)
    monkeypatch.setattr(linear, "COMPONENTS", 1000)
    section = moved_section((0.0, 0.0))
    spots = np.arange(len(section.spots))
    views = linear.disc_views(section, spots)
    middle = views.mean(axis=0)
    size2 = ((views - middle) ** 2).sum(axis=1).mean()
    pitch = np.median(np.sort(np.linalg.norm(
        section.spots[:, None] - section.spots, axis=2), axis=1)[:, 1])  # fmt: skip
    kernels = (
        (views - middle) @ (views - middle).T / size2,
        linear.covariance(section.spots, section.spots, pitch),
    )
    share = section.areas.sum(axis=1) / (math.pi * section.radius**2)
    counts = section.counts / share.clip(max=1)[:, None]
    roots = np.sqrt(counts)
    mean, sd = roots.mean(axis=0), roots.std(axis=0)
    by_tokens, by_place, constant = linear.posterior(*kernels, (roots - mean) / sd)
    x = (section.tokens.astype(np.float32) - section.token_statistics[0]) / (
        section.token_statistics[1]
    )
    padded = torch.from_numpy(np.pad(x, ((4, 4), (4, 4), (0, 0)), mode="edge"))[None]
    seen = linear.weighted_views(padded)[0].numpy()
    got = log_maps(section, at_once=777).reshape(GENES, SIDE, SIDE)
    for place in ((0, 0), (40, 41), (87, 3), (60, 87)):
        of_tokens = (seen[place] - middle) @ (views - middle).T / size2
        of_place = linear.covariance(np.array([place]) + 0.5, section.spots, pitch)[0]
        root = mean + sd * (of_tokens @ by_tokens + of_place @ by_place + constant)
        root = root.clip(linear.LOWEST * mean, linear.HIGHEST * roots.max(axis=0))
        level = counts.mean(axis=0) / mean**2 / (math.pi * section.radius**2)
        np.testing.assert_allclose(got[:, *place], np.log(root**2 * level), atol=0.02)


def test_the_model_finds_what_tokens_tell_between_the_spots():
    section, (_, rates) = moved_section((0.0, 0.0)), moved_image((0.0, 0.0))
    maps = log_maps(section)
    truth = np.log(rates).reshape(-1, GENES).T
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(maps, truth, strict=True)]
    assert np.median(r) > 0.8
    shuffled = replace(section, counts=np.random.default_rng(0).permutation(section.counts))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(log_maps(shuffled), truth, strict=True)]
    assert np.median(r) < 0.5


def test_its_sum_over_the_discs_is_about_that_of_the_counts():
    section = moved_section((0.0, 0.0))
    maps = np.exp(log_maps(section)).reshape(GENES, SIDE, SIDE)
    row, col = section.patches(np.floor(section.spots).astype(int))
    told = np.einsum("nt,gnt->g", section.areas, maps[:, row, col])
    np.testing.assert_allclose(told, section.counts.sum(axis=0), rtol=0.4)


@pytest.mark.parametrize("kind", ["constant", "one feature", "outlier", "no counts"])
def test_odd_tokens_and_counts_give_finite_maps(kind):
    section = moved_section((0.0, 0.0))
    tokens, counts = section.tokens.copy(), section.counts.copy()
    if kind == "constant":
        tokens[:] = 3
    if kind == "one feature":
        tokens[..., 1:] = 0
    if kind == "outlier":
        tokens[45, 45] = 6e4
    if kind == "no counts":
        counts[:, 0] = 0
    maps = log_maps(replace(section, tokens=tokens, counts=counts))
    assert np.isfinite(maps).all()
    if kind == "no counts":
        assert np.exp(maps[0]).max() < 1e-6


def test_spots_with_little_tissue_count_as_if_their_discs_were_full():
    section = moved_section((0.0, 0.0))
    tissue = section.tissue.copy()
    tissue[:, :8] = False  # half of the first column of discs
    half = replace(section, tissue=tissue)
    on_edge = half.spots[:, 1] < 9
    assert half.usable.all()
    halved = np.where(on_edge[:, None], section.counts / 2, section.counts).astype(np.float32)
    whole = np.exp(log_maps(section)).reshape(GENES, SIDE, SIDE)[:, tissue]
    got = np.exp(log_maps(replace(half, counts=halved)))
    np.testing.assert_allclose(got.mean(axis=1), whole.mean(axis=1), rtol=0.1)


def test_of_many_spots_some_are_drawn_and_always_the_same(monkeypatch):
    section = moved_section((0.0, 0.0))
    monkeypatch.setattr(linear, "MOST_SPOTS", 60)
    fitted = linear.fit(section)
    assert len(fitted.spots) == 60
    np.testing.assert_array_equal(fitted.spots, linear.fit(section).spots)
    assert np.isfinite(log_maps(section)).all()


def test_nodes_are_those_around_what_is_shown_and_not_too_many(monkeypatch):
    section = moved_section((0.0, 0.0))
    shown = np.zeros((SIDE, SIDE), bool)
    shown[30:36, 50:60] = True
    model = linear.of_section(section, shown, CPU)
    step = linear.NODE * model.fitted.pitch
    assert len(model.nodes) < (6 / step + 2) * (10 / step + 2)
    assert (model.nodes >= [30.5 - step, 50.5 - step]).all()
    assert (model.nodes <= [36.5 + step, 60.5 + step]).all()
    np.testing.assert_allclose(
        log_maps(section, shown), log_maps(section)[:, shown.ravel()], atol=1e-3
    )
    monkeypatch.setattr(linear, "MOST_NODES", 100)
    assert len(linear.of_section(section, section.tissue, CPU).nodes) <= (math.sqrt(100) + 2) ** 2


def test_genes_and_spots_in_parts_give_the_same_model(monkeypatch):
    section = moved_section((0.0, 0.0))
    whole = log_maps(section)
    monkeypatch.setattr(linear, "GENES_AT_ONCE", 5)
    monkeypatch.setattr(linear, "STRIP_BYTES", 1)  # a spot at a time
    np.testing.assert_allclose(log_maps(section), whole, atol=1e-3)


def test_too_few_spots_have_no_model(capsys):
    section = make_section()
    assert linear.of_section(section, section.tissue, CPU) is None
    assert "no linear model: it takes 50 spots, and 16 are on tissue" in capsys.readouterr().out


# ----- in the maps -----
def decoded(section, share, networks, shown=None, prior=None):
    shown = section.tissue if shown is None else shown
    file = io.BytesIO()
    prediction.embed_section(networks, section, shown, True, file, CPU)
    decoder = prediction.Decoder(networks, section, shown, prior, [file], CPU, share)
    return np.concatenate([decoder.maps(genes).copy() for genes in decoder.blocks()])


@pytest.mark.parametrize("n_states", [1, 2, 3])
def test_a_map_is_the_geometric_mean_of_networks_and_model(n_states, monkeypatch):
    section = moved_section((0.0, 0.0))
    section.expression = section.counts.copy()
    networks = [default_network(section, seed) for seed in range(n_states)]
    alone, model = decoded(section, 0.0, networks), np.exp(log_maps(section))
    monkeypatch.setattr(prediction, "GENES_BYTES", 5 * 4 * SIDE**2)  # in several blocks
    got = decoded(section, 0.3, networks)
    np.testing.assert_allclose(got, alone**0.7 * model**0.3, rtol=1e-3)


def test_it_also_tells_what_lies_beside_the_tissue():
    section = moved_section((0.0, 0.0))
    section.expression = section.counts.copy()
    section = replace(section, tissue=np.arange(SIDE)[:, None] + np.zeros(SIDE) < 70)
    maps = decoded(section, 0.5, [default_network(section)], np.ones((SIDE, SIDE), bool))
    assert maps.shape == (GENES, SIDE**2)
    assert np.isfinite(maps).all()
    inside = decoded(section, 0.5, [default_network(section)])
    np.testing.assert_allclose(maps[:, section.tissue.ravel()], inside, rtol=2e-3)


def test_networks_whose_output_is_no_logarithm_are_mixed_too_and_zeros_stay():
    class Counts(HISTEX.DefaultNetwork):
        counts_alike = False

        def to_counts(self, output, genes=slice(None)):
            return (output.exp() - 0.05).clamp(min=0)

    section = moved_section((0.0, 0.0))
    section.expression = section.counts.copy()
    torch.manual_seed(0)
    network = Counts(section, np.arange(len(section.spots))).eval()
    alone, model = decoded(section, 0.0, [network]), np.exp(log_maps(section))
    assert np.isfinite(decoded(section, 1.0, [network])).all()
    got = decoded(section, 0.25, [network])
    np.testing.assert_allclose(got, alone**0.75 * model**0.25, rtol=1e-3, atol=1e-7)
    assert (got[alone == 0] == 0).all()


def test_too_few_spots_leave_the_maps_to_the_networks():
    section = make_section()
    networks = [default_network(section)]
    np.testing.assert_array_equal(decoded(section, 0.2, networks), decoded(section, 0.0, networks))


def test_the_default_preset_has_the_model_and_the_published_one_has_not():
    assert HISTEX.PRESETS["default"].linear_share == 0.2
    assert HISTEX.PRESETS["published"].linear_share == 0
