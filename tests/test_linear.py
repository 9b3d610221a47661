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
from scipy.ndimage import uniform_filter
from test_HISTEX import default_network, make_section
from test_registration import GENES, SIDE, moved_image, moved_section

import HISTEX
from method import linear, prediction
from method.layers import neighbourhoods
from method.section import standardised_rows, token_statistics

CPU = torch.device("cpu")
EVERY = slice(0, GENES)


def model_of(section, shown):
    return linear.Linear(linear.fit(section), section, shown, CPU)


def log_maps(section, shown=None, at_once=1000):
    """The model's logarithms (G, M)."""
    shown = section.tissue if shown is None else shown
    model = model_of(section, shown)
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
    means = rng.normal(size=(n, 3)) / math.sqrt(3)
    kernels = tokens @ tokens.T, means @ means.T, linear.covariance(places, places, 4.0)
    y = np.column_stack([
        tokens[:, 0] * 2, np.sin(places[:, 0] / 5), rng.normal(size=n), means[:, 1] + 1
    ])  # fmt: skip
    y += rng.normal(size=y.shape) * 0.3
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    fits = linear.fits_of(kernels)
    got, by_views = linear.posterior(fits, y), linear.explained(fits, y)
    shares = [(a, 0, 1 - a) for a in linear.SHARES] + [(0, a, 1 - a) for a in linear.SHARES]
    odds = [50.0] * 4 + [1.0] * 4 + [51.0]
    for gene in range(genes):
        solutions, likelihoods = [], []
        for share, before in zip([*shares, (0, 0, 1)], odds, strict=True):
            for noise in linear.NOISES:
                covariance = 1 + sum(s * kernel for s, kernel in zip(share, kernels, strict=True))
                covariance = covariance + noise * np.eye(n)
                solved = np.linalg.solve(covariance, y[:, gene])
                scale = y[:, gene] @ solved / n  # the likeliest
                normal = stats.multivariate_normal(np.zeros(n), scale * covariance)
                likelihoods.append(math.log(before) + normal.logpdf(y[:, gene]))
                solutions.append((share, solved, 1 / (1 + noise)))
        chance = np.exp(np.array(likelihoods) - max(likelihoods))
        chance /= chance.sum()
        every = list(zip(chance, solutions, strict=True))
        for i in range(3):
            mean = sum(p * share[i] * solved for p, (share, solved, _) in every)
            np.testing.assert_allclose(got.weights[i, :, gene], mean, rtol=1e-4, atol=1e-8)
        constant = sum(p * solved.sum() for p, (_, solved, _) in every)
        np.testing.assert_allclose(got.constant[gene], constant, rtol=1e-4, atol=1e-8)
        for i in range(2):
            explained = sum(p * share[i] * signal for p, (share, _, signal) in every)
            np.testing.assert_allclose(by_views[i, gene], explained, rtol=1e-4, atol=1e-8)


def test_genes_follow_what_their_counts_say_tokens_means_or_the_place():
    rng = np.random.default_rng(1)
    tokens, means, places = *rng.normal(size=(2, 80, 2)), rng.uniform(0, 40, (80, 2))
    y = np.column_stack([tokens[:, 0], means[:, 0], np.sin(places[:, 0] / 9)])
    kernels = tokens @ tokens.T / 2, means @ means.T / 2, linear.covariance(places, places, 4.0)
    fits, y = linear.fits_of(kernels), y / y.std(axis=0)
    found, by_views = linear.posterior(fits, y), linear.explained(fits, y)
    sizes = np.abs(found.weights).sum(axis=1)  # (3, G)
    for gene in range(3):
        assert sizes[gene, gene] > 2 * np.delete(sizes[:, gene], gene).max()
    assert by_views[0, 0] > 0.5 > 10 * by_views[1, 0]
    assert by_views[1, 1] > 0.5 > 10 * by_views[0, 1]
    assert by_views[:, 2].sum() < 0.3


def test_fineness_is_half_the_log_of_what_both_explain_within_the_odds_before_any_count():
    assert linear.fineness(4.0, 1.0) == pytest.approx(math.log(4) / 2, abs=1e-4)
    most = math.log(50) / 2
    assert linear.fineness(0.0, 0.0) == pytest.approx(most)  # no gene follows tokens
    assert linear.fineness(1.0, 0.0) == pytest.approx(most)
    assert linear.fineness(0.0, 1.0) == pytest.approx(-most)


@pytest.mark.parametrize(("spots", "genes"), [(30, 8), (9, 20)])
def test_patterns_and_loadings_are_the_genes(spots, genes):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(spots, 3)) @ rng.normal(size=(3, genes)) + rng.normal(size=(spots, genes))
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    y[:, 0] = 0  # a gene without counts
    found = linear.patterns([y[:, :5], y[:, 5:]])
    assert found.shape == (spots, min(spots - 1, genes - 1))
    np.testing.assert_allclose(found.T @ found / spots, np.eye(found.shape[1]), atol=1e-9)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(found @ (found.T @ y) / spots, y, atol=1e-9)
    values = np.linalg.svd(y, compute_uv=False)[: found.shape[1]]
    sizes = np.linalg.norm(found.T @ y, axis=1) / math.sqrt(spots)
    np.testing.assert_allclose(sizes[::-1], values, rtol=1e-6)
    assert linear.patterns([np.zeros((spots, 2))]).shape == (spots, 0)


def test_a_gene_of_few_counts_learns_from_those_that_it_goes_with():
    """Its map is nearer to the truth than one from its own counts alone."""
    section, (_, rates) = moved_section((0.0, 0.0)), moved_image((0.0, 0.0))
    rng = np.random.default_rng(0)
    rich = np.repeat(section.counts[:, :1], 12, axis=1)
    section = replace(section, counts=rng.poisson(np.hstack([rich[:, :1] / 40, rich])).astype("f4"))
    alone = replace(section, counts=section.counts[:, :1])
    truth = np.log(rates[..., 0]).ravel()
    r = [np.corrcoef(log_maps(some)[0], truth)[0, 1] for some in (alone, section)]
    assert r[1] > r[0] + 0.05


def test_genes_without_counts_or_of_noise_have_no_say_in_the_fineness():
    section = blurred(moved_section((0.0, 0.0)), 9)
    want = linear.fit(section).fineness
    assert want < 0
    rng = np.random.default_rng(0)
    noise = rng.poisson(0.1, (len(section.spots), 20)).astype(np.float32)
    for more in (np.zeros_like(noise), noise):
        counts = np.hstack([section.counts, more])
        assert linear.fit(replace(section, counts=counts)).fineness == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize("most", [1000, 2])
def test_components_span_the_tokens_and_their_means_apart(most, monkeypatch):
    monkeypatch.setattr(linear, "COMPONENTS", most)
    x = np.random.default_rng(0).normal(size=(40, 9)) * [1, 2, 3, 1, 1, 1, 0.1, 0.1, 0.1]
    x -= x.mean(axis=0)
    single, means = ((x @ axes) for axes in linear.component_axes(x))
    for part in (single, means):
        assert part.shape[1] <= most
        assert (part**2).sum(axis=1).mean() == pytest.approx(1)
    if most == 1000:
        parts = np.split(x, 3, axis=1)
        first, second, third = (part / math.sqrt((part**2).sum() / 40) for part in parts)
        np.testing.assert_allclose(single @ single.T, first @ first.T, atol=1e-9)
        alike = (second @ second.T + third @ third.T) / 2
        np.testing.assert_allclose(means @ means.T, alike, atol=1e-9)


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
            for side in (1, *linear.SCALES):
                steps = np.arange(-(side // 2), side // 2 + 1)
                rows, columns = ((x + steps).clip(0, SIDE - 1) for x in (r, c))
                square = (section.tokens[np.ix_(rows, columns)] - mean) / std
                views.append(square.mean(axis=(0, 1)))
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
    parts = np.split(views - middle, 3, axis=1)
    size_of = [math.sqrt((part**2).sum(axis=1).mean()) for part in parts]
    parts = [part / size for part, size in zip(parts, size_of, strict=True)]
    pitch = np.median(np.sort(np.linalg.norm(
        section.spots[:, None] - section.spots, axis=2), axis=1)[:, 1])  # fmt: skip
    kernels = (
        parts[0] @ parts[0].T,
        (parts[1] @ parts[1].T + parts[2] @ parts[2].T) / 2,
        linear.covariance(section.spots, section.spots, pitch),
    )
    share = section.areas.sum(axis=1) / (math.pi * section.radius**2)
    counts = section.counts / share.clip(max=1)[:, None]
    roots = np.sqrt(counts)
    mean, sd = roots.mean(axis=0), roots.std(axis=0)
    fits, y = linear.fits_of(kernels), (roots - mean) / sd
    left, sizes, right = np.linalg.svd(y, full_matrices=False)
    found = linear.posterior(fits, left)
    loadings = sizes[:, None] * right
    x = (section.tokens.astype(np.float32) - section.token_statistics[0]) / (
        section.token_statistics[1]
    )
    padded = torch.from_numpy(np.pad(x, ((4, 4), (4, 4), (0, 0)), mode="edge"))[None]
    seen = neighbourhoods(padded, linear.SCALES, linear.HALO)[0].numpy()
    got = log_maps(section, at_once=777).reshape(GENES, SIDE, SIDE)
    for place in ((0, 0), (40, 41), (87, 3), (60, 87)):
        here = np.split(seen[place] - middle, 3)
        one, two, three = (a @ b.T / size for a, b, size in zip(here, parts, size_of, strict=True))
        of_place = linear.covariance(np.array([place]) + 0.5, section.spots, pitch)[0]
        each = (one, (two + three) / 2, of_place)
        told = sum(a @ b for a, b in zip(each, found.weights, strict=True))
        root = mean + sd * ((told + found.constant) @ loadings)
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
    np.testing.assert_allclose(told, section.counts.sum(axis=0), rtol=0.5)


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
    model = model_of(section, shown)
    step = linear.NODE * model.fitted.pitch
    assert len(model.nodes) < (6 / step + 2) * (10 / step + 2)
    assert (model.nodes >= [30.5 - step, 50.5 - step]).all()
    assert (model.nodes <= [36.5 + step, 60.5 + step]).all()
    np.testing.assert_allclose(
        log_maps(section, shown), log_maps(section)[:, shown.ravel()], atol=1e-3
    )
    monkeypatch.setattr(linear, "MOST_NODES", 100)
    assert len(model_of(section, section.tissue).nodes) <= (math.sqrt(100) + 2) ** 2


def test_genes_and_spots_in_parts_give_the_same_model(monkeypatch):
    section = moved_section((0.0, 0.0))
    whole = log_maps(section)
    monkeypatch.setattr(linear, "GENES_AT_ONCE", 5)
    monkeypatch.setattr(linear, "STRIP_BYTES", 1)  # a spot at a time
    np.testing.assert_allclose(log_maps(section), whole, atol=1e-3)


def test_too_few_spots_have_no_model(capsys):
    section = make_section()
    assert linear.fit(section) is None
    assert "no linear model: it takes 50 spots, and 16 are on tissue" in capsys.readouterr().out


# ----- in the maps -----
def decoded(section, share, networks, shown=None, prior=None):
    shown = section.tissue if shown is None else shown
    section = replace(section, linear=linear.fit(section))
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
    assert HISTEX.PRESETS["default"].linear_share == 0.3
    assert HISTEX.PRESETS["default"].weighs_scales
    assert HISTEX.PRESETS["published"].linear_share == 0
    assert not HISTEX.PRESETS["published"].weighs_scales


# ----- what it tells the networks -----
def join(section, preset):
    linear.join(section, preset.linear_share > 0, preset.weighs_scales)


def blurred(section, side):
    """The section with counts that follow the first token's mean over squares of this side."""
    seen = section.tokens[..., 0].astype(float)
    seen = (seen - seen.mean()) / seen.std()
    seen = uniform_filter(seen, side, mode="nearest")
    row, col = section.patches(np.floor(section.spots).astype(int))
    mean = (section.areas * seen[row.clip(0, SIDE - 1), col.clip(0, SIDE - 1)]).sum(axis=1)
    rate = 50 * np.exp((mean - mean.mean()) / mean.std() / 2)
    counts = np.random.default_rng(0).poisson(rate[:, None] * np.ones(GENES))
    return replace(section, counts=counts.astype(np.float32))


def test_single_tokens_weigh_less_where_counts_follow_their_means(capsys):
    section, preset = moved_section((0.0, 0.0)), HISTEX.PRESETS["default"]
    found = []
    for side in (1, 9):
        some = blurred(section, side)
        join(some, preset)
        assert some.fineness == some.linear.fineness
        assert f"single tokens {math.exp(some.fineness):.2f}, their" in capsys.readouterr().out
        found.append(some.fineness)
    assert found[0] > 1
    assert found[1] < 0


def test_views_are_weighed_from_single_tokens_to_the_widest_mean():
    section = replace(moved_section((0.0, 0.0)), fineness=0.7)
    network = default_network(section)
    n_features = section.tokens.shape[2]
    want = np.repeat(np.exp([0.7, 0, -0.7]), n_features)
    np.testing.assert_allclose(network.view_weights, want, rtol=1e-6)
    views = torch.randn(4, 3 * n_features)
    with torch.inference_mode():
        got, plain = network.embed_histology(views), default_network(replace(section, fineness=0.0))
        weighed = plain.embed_histology(views * torch.from_numpy(want).float())
    np.testing.assert_allclose(got, weighed, atol=1e-5)
    again = default_network(section, seed=1)
    again.load_state_dict(network.state_dict())  # the weights belong to the state
    np.testing.assert_array_equal(again.view_weights, network.view_weights)


@pytest.mark.parametrize(
    ("change", "fitted", "weighed"),
    [
        ({}, True, True),
        ({"weighs_scales": False}, True, False),
        ({"linear_share": 0.0}, True, True),
        ({"linear_share": 0.0, "weighs_scales": False}, False, False),
    ],
)
def test_a_preset_may_do_without(change, fitted, weighed):
    section = replace(moved_section((0.0, 0.0)), fineness=9.0)
    join(section, replace(HISTEX.PRESETS["default"], **change))
    assert (section.linear is not None) == fitted
    assert (section.fineness != 0) == weighed
    assert section.fineness < 2


def test_of_too_few_spots_all_scales_weigh_alike():
    section = make_section()
    join(section, HISTEX.PRESETS["default"])
    assert section.linear is None
    assert section.fineness == 0
