"""The benchmark: baselines against brute force, simulated sections, scores, resuming, the table."""

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import GENES, PIPELINE
from PIL import Image
from scipy.sparse import csr_array

import utils
from analysis import inputs, spots
from benchmarks import accuracy, baselines, measure, simulate_sections
from benchmarks.simulate_sections import Design
from demo.tissue import TYPES, Layout

SMALL = Design("mucosa", (320, 400), False, 70.0, 22.0, 11.0, 0.5, 150.0, 0.5)


# ----- ridge -----
def ridge_by_hand(x, y, penalty):
    """Weights and intercept by the normal equations; the intercept is not penalised."""
    ones = np.column_stack([x, np.ones(len(x))])
    penalties = np.diag([penalty] * x.shape[1] + [0.0])
    return np.linalg.solve(ones.T @ ones + penalties, ones.T @ y)


@pytest.mark.parametrize(("n", "f"), [(25, 4), (9, 14)])
def test_leave_one_out_is_what_refitting_without_each_spot_gives(n, f):
    rng = np.random.default_rng(n)
    x, y = rng.normal(3, 2, (n, f)), rng.normal(5, 1, (n, 3)) * [1, 10, 0.1]
    penalties = np.array([0.3, 3.0, 30.0])
    by_hand = []
    for penalty in penalties:
        errors = np.empty_like(y)
        for i in range(n):
            kept = np.arange(n) != i
            weights = ridge_by_hand(x[kept], y[kept], penalty)
            errors[i] = y[i] - np.append(x[i], 1) @ weights
        by_hand.append((errors**2 / y.var(0)).mean())
    model = baselines.fit_ridge(x, y, penalties)
    np.testing.assert_allclose(model.errors, by_hand)
    assert model.penalty == penalties[np.argmin(by_hand)]
    new = rng.normal(3, 2, (5, f))
    expected = np.column_stack([new, np.ones(5)]) @ ridge_by_hand(x, y, model.penalty)
    np.testing.assert_allclose(model.predict(new), expected)


# ----- what the predictors see -----
def make_section(seed=0, side=36, n_features=5, radius=2.2, pitch=6.0, tissue=None):
    """Tokens that vary from superpixel to superpixel, and spots on a square lattice."""
    rng = np.random.default_rng(seed)
    steps = np.arange(3.3, side - 3, pitch)
    centres = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    tokens = rng.standard_normal((side, side, n_features)).astype(np.float32)
    tissue = np.ones((side, side), bool) if tissue is None else tissue
    return baselines.SpotSection(
        tokens, tissue, centres, np.ones((len(centres), 2), np.float32), radius
    )


def observe(section, maps):
    """The counts that the spots would have, without noise, if the maps were true."""
    totals = section.areas @ maps.reshape(-1, maps.shape[2])
    return baselines.SpotSection(
        section.tokens, section.tissue, section.centres, totals.astype(np.float32), section.radius
    )


def test_discs_are_weighted_by_area_and_tissue():
    tissue = np.ones((36, 36), bool)
    tissue[:, :4] = False  # cuts through the first column of spots
    tissue[20:] = False
    section = make_section(tissue=tissue)
    fine = 40  # points per superpixel and axis, independent of spots.py's subsampling
    axis = (np.arange(36 * fine) + 0.5) / fine
    usable = np.zeros(len(section.centres), bool)
    means, shares = [], []
    for i, (row, col) in enumerate(section.centres):
        inside = (axis[:, None] - row) ** 2 + (axis - col) ** 2 <= section.radius**2
        area = inside.reshape(36, fine, 36, fine).mean((1, 3)) * tissue
        usable[i] = area.sum() >= 0.25 * np.pi * section.radius**2
        if usable[i]:
            means.append((section.tokens * area[..., None]).sum((0, 1)) / area.sum())
            shares.append(area.sum() / (np.pi * section.radius**2))
    assert 0 < usable.sum() < len(usable)
    assert min(shares) < 0.8
    np.testing.assert_array_equal(section.usable, usable)
    np.testing.assert_allclose(baselines.disc_means(section), means, atol=0.03)
    np.testing.assert_allclose(
        baselines.full_disc_counts(section)[:, 0], 1 / np.array(shares), rtol=0.02
    )


def test_padded_discs_hold_the_same_shares():
    areas = csr_array(np.array([[0, 2.0, 0, 2, 4], [0, 0, 3.0, 0, 0]]))
    where, share = baselines.pad_discs(areas)
    dense = np.zeros((2, 5))
    for spot in range(2):
        np.add.at(dense[spot], where[spot], share[spot])
    np.testing.assert_allclose(dense, [[0, 0.25, 0, 0.25, 0.5], [0, 0, 1, 0, 0]])


def test_neighbourhoods_and_standardised_tokens():
    rng = np.random.default_rng(5)
    tokens = rng.normal(2, 3, (20, 24, 2)).astype(np.float32)
    tokens[..., 1] = 7
    wide = baselines.add_neighbourhoods(tokens)
    assert wide.shape == (20, 24, 6)
    np.testing.assert_array_equal(wide[..., :2], tokens)
    np.testing.assert_allclose(wide[6, 9, 2:4], tokens[5:8, 8:11].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(wide[6, 9, 4:], tokens[2:11, 5:14].mean((0, 1)), rtol=1e-5)
    tissue = rng.random((20, 24)) < 0.5
    seen = baselines.standardise(wide, tissue)
    np.testing.assert_allclose(seen[tissue].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(seen[tissue].std(0), [1, 0, 1, 0, 1, 0], atol=1e-5)


# ----- the predictors -----
def test_interpolation_keeps_a_plane_and_the_nearest_spot_its_value():
    section = make_section()
    row, col = np.mgrid[:36, :36] + 0.5
    plane = np.dstack([5 + 0.2 * row + 0.1 * col, np.full_like(row, 3.0)])
    section.counts = 5 + section.centres @ [[0.2, 0], [0.1, 0]] - [0, 2.0]
    hull = np.s_[4:27, 4:27]
    linear = baselines.linear_interpolation(section, 0) * section.disc_area
    np.testing.assert_allclose(linear[hull], plane[hull], rtol=1e-6)
    nearest = baselines.nearest_spot(section, 0) * section.disc_area
    first = section.centres[0].astype(int)
    np.testing.assert_allclose(nearest[tuple(first)], section.counts[0])


def planted(section):
    """Two genes: one that the tokens tell, one that varies smoothly and is not in the tokens."""
    row, _ = np.mgrid[:36, :36]
    told = np.exp(0.9 * section.tokens[..., 0])
    return np.dstack([told, 2 + np.sin(row / 36 * np.pi)])


def r(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_ridge_reads_the_tokens_and_its_residual_what_they_do_not_tell():
    section = make_section(seed=1, pitch=3.0)
    truth = planted(section)
    section = observe(section, truth)
    plain, with_residual = baselines.ridge(section, 0), baselines.ridge_residual(section, 0)
    assert r(plain[..., 0], truth[..., 0]) > 0.6
    assert r(with_residual[..., 0], truth[..., 0]) > 0.6
    smooth = [r(maps[..., 1], truth[..., 1]) for maps in (plain, with_residual)]
    assert smooth[0] < 0.4
    assert smooth[1] > 0.75
    scale = with_residual.sum((0, 1)) / truth.sum((0, 1))  # counts per superpixel
    np.testing.assert_allclose(scale, 1, atol=0.2)


def test_mlp_finds_a_planted_signal_that_shuffled_spots_do_not_hold(monkeypatch):
    for name, value in {"MAX_EPOCHS": 40, "WIDTH": 32, "LEARNING_RATE": 5e-3}.items():
        monkeypatch.setattr(baselines, name, value)
    section = make_section(seed=2, side=48, pitch=4.0, n_features=10)
    truth = np.exp(0.9 * section.tokens[..., :1])
    section = observe(section, truth)
    maps = baselines.mlp(section, 0, n_states=2)
    assert maps.shape == truth.shape
    assert r(maps, truth) > 0.6
    assert maps.sum() / truth.sum() == pytest.approx(1, abs=0.2)
    np.testing.assert_array_equal(baselines.mlp(section, 0, n_states=2), maps)
    section.counts = np.random.default_rng(0).permutation(section.counts)
    assert abs(r(baselines.mlp(section, 0, n_states=2), truth)) < 0.3 < r(maps, truth) - 0.3


# ----- simulated sections -----
@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("simulated") / "section C"
    simulate_sections.simulate(directory, SMALL, seed=3)
    return directory


def digests(directory):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


def test_a_seed_is_a_section(simulated, tmp_path):
    for name, seed in (("same", 3), ("other", 6)):
        simulate_sections.simulate(tmp_path / name, SMALL, seed)
    first, same, other = (digests(d) for d in (simulated, tmp_path / "same", tmp_path / "other"))
    assert first == same
    for name in ("he-raw.jpg", "cnts.csv", "truth.npz"):
        assert first[name] != other[name]


def test_spots_hold_the_truth_under_their_discs_times_capture(simulated):
    truth = inputs.read_truth(simulated)
    counts = pd.read_csv(simulated / "cnts.csv", index_col=0)
    locs = pd.read_csv(simulated / "locs-raw.csv", index_col=0)
    with Image.open(simulated / "he-raw.jpg") as image:
        assert image.size == (800, 640)  # 400 x 320 um at 0.5 um a pixel
    assert truth.counts.shape == truth.mean.shape == (40, 50, counts.shape[1])
    assert list(counts.columns) == truth.genes
    assert sorted(set(truth.kinds)) == ["both", "field", "histology", "noise"]
    assert truth.capture == SMALL.capture
    radius = float((simulated / "radius-raw.txt").read_text()) * 0.5 / 8  # in superpixels
    centres = locs[["y", "x"]].to_numpy() * 0.5 / 8
    weights = spots.disc_weights(centres, radius, truth.tissue.shape)
    under = weights @ truth.counts.reshape(-1, len(truth.genes))
    assert counts.to_numpy().sum() / under.sum() == pytest.approx(truth.capture, rel=0.12)
    assert np.corrcoef(counts.to_numpy().ravel(), under.ravel())[0, 1] > 0.9
    # molecules scatter around their expectation
    assert truth.counts.sum() / truth.mean.sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("design", simulate_sections.DESIGNS, ids=lambda design: design.tissue)
def test_lattices_have_the_pitch_and_turn_of_their_design(design):
    layout = Layout(np.ones((max(design.size_um),) * 2, np.uint8), {})
    xy = simulate_sections.spot_lattice(layout, design)
    away = np.hypot(*(xy - xy.mean(0)).T)
    middle = xy[away.argmin()]
    offsets = xy - middle
    distance = np.hypot(*offsets.T)
    ring = offsets[(distance > 1) & (distance < 1.2 * design.pitch_um)]
    assert len(ring) == (4 if design.square else 6)
    np.testing.assert_allclose(np.hypot(*ring.T), design.pitch_um)
    step = 90 if design.square else 60
    angles = np.rad2deg(np.arctan2(ring[:, 1], ring[:, 0])) - design.turn_deg
    np.testing.assert_allclose((angles + step / 2) % step - step / 2, 0, atol=1e-6)
    rows, cols = design.size_um
    assert (xy.min(0) > design.radius_um).all()
    assert (xy < np.array([cols, rows]) - design.radius_um).all()
    # sides are whole superpixels, and whole pixels of the image
    assert all(side % 16 == 0 for side in design.size_um)
    pixels = np.array(design.size_um) / design.pixel_um
    np.testing.assert_allclose(pixels, pixels.round())


def test_kinds_of_genes_depend_on_what_they_should():
    rng = np.random.default_rng(0)
    side, n = 200, 600
    names = [f"hidden {i}" for i in range(simulate_sections.N_FIELDS)]
    fields = {name: rng.standard_normal((side, side)) for name in [*names, "visible border"]}
    layout = Layout(np.ones((side, side), np.uint8), fields)
    cells = pd.DataFrame(rng.uniform(0, side, (n, 2)), columns=["nx", "ny"])
    cells["type"] = rng.choice(TYPES, n)
    kinds = simulate_sections.gene_table().kind.to_numpy()

    def folds(layout, cells):
        return simulate_sections.log_folds(layout, cells, kinds, np.random.default_rng(1))

    before = folds(layout, cells)
    other_types = cells.assign(type=rng.permutation(cells.type))
    other_hidden = Layout(
        layout.compartment, {**fields, **{n: rng.permutation(fields[n]) for n in names}}
    )
    by_type = np.abs(folds(layout, other_types) - before).max(0) > 1e-6
    by_field = np.abs(folds(other_hidden, cells) - before).max(0) > 1e-6
    for kind, depends in {
        "histology": (True, False), "field": (False, True), "both": (True, True),
        "noise": (False, False),
    }.items():  # fmt: skip
        assert set(by_type[kinds == kind]) == {depends[0]}, kind
        assert set(by_field[kinds == kind]) == {depends[1]}, kind


def test_bursts_make_counts_over_dispersed_around_the_expectation():
    rng = np.random.default_rng(0)
    layout = Layout(
        np.ones((50, 50), np.uint8),
        {
            name: rng.standard_normal((50, 50))
            for name in (
                "visible border",
                *(f"hidden {i}" for i in range(simulate_sections.N_FIELDS)),
            )
        },
    )
    cells = pd.DataFrame(rng.uniform(0, 50, (4000, 2)), columns=["nx", "ny"])
    cells["type"] = "tumour"
    genes = simulate_sections.gene_table()
    expected, burst, ambient = simulate_sections.expression_rates(layout, cells, genes, 100.0, rng)
    noise = (genes.kind == "noise").to_numpy()
    assert not expected[:, noise].any()
    assert (ambient > 0).all()
    # 92 % of the molecules outside of noise genes come from cells
    assert expected.sum() + ambient.sum() == pytest.approx(100.0 * 4000, rel=1e-6)
    factor = burst[:, ~noise] / expected[:, ~noise]
    np.testing.assert_allclose(factor.mean(0), 1, atol=0.15)
    assert np.median(factor.var(0)) == pytest.approx(1 / simulate_sections.BURST_SHAPE, rel=0.3)


# ----- scores -----
def make_truth(shape=(27, 41), genes=tuple(GENES), seed=0):
    rng = np.random.default_rng(seed)
    mean = rng.gamma(2, 4, (*shape, len(genes)))
    tissue = rng.random(shape) < 0.8
    return inputs.Truth(rng.poisson(mean).astype(np.float32), tissue, list(genes)), mean


def test_shuffled_truth_collapses_the_scores():
    truth, mean = make_truth()
    scores = accuracy.score_maps(truth, mean)
    assert set(scores) == set(accuracy.SCORES)
    by_hand = [r(mean[truth.tissue][:, i], truth.counts[truth.tissue][:, i]) for i in range(8)]
    assert scores["r 1x"] == pytest.approx(np.median(by_hand), abs=1e-4)
    assert scores["r 1x"] > 0.85
    truth.counts[truth.tissue] = np.random.default_rng(1).permutation(truth.counts[truth.tissue])
    shuffled = accuracy.score_maps(truth, mean)
    for name in ("r 1x", "r 2x", "r 4x"):
        assert abs(shuffled[name]) < 0.15
    assert shuffled["SSIM 1x"] < 0.3 < scores["SSIM 1x"]
    assert shuffled["RMSE 4x"] > 1.5 * scores["RMSE 4x"]


def test_the_ceiling_is_about_that_of_the_known_mean():
    truth, mean = make_truth()
    found, best = accuracy.score_maps(truth, mean), accuracy.score_maps(truth, None)
    for name in ("r 1x", "r 2x", "r 4x"):
        assert best[name] == pytest.approx(found[name], abs=0.03)


# ----- running, resuming -----
@pytest.fixture
def source(sample):
    """The raw sample, with a truth."""
    truth, _ = make_truth()
    np.savez(
        sample / "truth.npz", counts=truth.counts, tissue=truth.tissue, genes=np.array(truth.genes)
    )
    return sample


class Scripts:
    """Stands in for run_script: outputs of a finished sample, constant maps of HISTEX."""

    def __init__(self, finished: Path) -> None:
        self.finished = finished
        self.calls: list[tuple[str, ...]] = []
        self.fail_at = ""

    def __call__(self, code, command, directory, log):
        self.calls.append(command)
        assert (code / command[0]).is_file()
        assert not (directory / "truth.npz").exists()
        if self.fail_at and self.fail_at in command:
            raise KeyboardInterrupt
        if command[0] == "HISTEX.py":
            seed = int(command[command.index("--seed") + 1])
            maps = np.random.default_rng(seed).random((len(GENES), 28, 42), np.float32)
            (directory / "cnts-super").mkdir(exist_ok=True)
            for gene, image in zip(GENES, maps, strict=True):
                (directory / "cnts-super" / f"{gene}.pickle").write_bytes(pickle.dumps(image))
            index = pd.DataFrame({"gene": GENES, "file": [f"{gene}.pickle" for gene in GENES]})
            index.to_csv(directory / "cnts-super" / "index.csv", index=False)
            return 5.0
        record = utils.record_name(command[0])
        for name in [record, *json.loads((self.finished / record).read_text())["outputs"]]:
            shutil.copy2(self.finished / name, directory / name)
        return 1.0

    @property
    def histex(self):
        return [command for command in self.calls if command[0] == "HISTEX.py"]


@pytest.fixture
def scripts(finished_sample, monkeypatch):
    scripts = Scripts(finished_sample)
    monkeypatch.setattr(accuracy, "run_script", scripts)
    return scripts


def benchmark(source, work, *options):
    methods = ("nearest", "linear", "ridge", "ridge+residual", "published", "default")
    return accuracy.run(
        ["--directory", str(source), "--keep", str(work), "--output", str(work / "R.md"),
         "--n-seeds", "2", "--methods", *methods, *options]
    )  # fmt: skip


def test_runs_once_and_goes_on_where_it_was_cut_off(source, scripts, tmp_path):
    work = tmp_path / "bench"
    scripts.fail_at = "1000"  # the second seed
    assert benchmark(source, work) == 130
    assert not (work / "R.md").exists()
    assert [c[0] for c in scripts.calls] == [*(c[0] for c in PIPELINE[:4]), *["HISTEX.py"] * 2]
    scripts.fail_at, scripts.calls = "", []
    assert benchmark(source, work) == 0
    seeds = [c[c.index("--seed") + 1] for c in scripts.calls]
    assert seeds == ["1000", "0", "1000"]  # the cut-off one again, then the other preset
    assert [c[c.index("--preset") + 1] for c in scripts.calls] == ["published"] + ["default"] * 2
    first = (work / "R.md").read_text()
    assert "| HISTEX, published preset | " in first
    assert "> 5.0 |" in first  # its seconds are those of the last part
    scripts.calls = []
    assert benchmark(source, work) == 0
    assert scripts.calls == []
    assert (work / "R.md").read_text() == first


def test_what_changed_is_run_again_and_nothing_else(source, scripts, tmp_path, monkeypatch):
    work, root = tmp_path / "bench", tmp_path / "checkout"
    root.mkdir()
    for script in accuracy.ROOT.glob("*.py"):
        shutil.copyfile(script, root / script.name)
    for room in ("method", "reading", "writing"):
        shutil.copytree(accuracy.ROOT / room, root / room)
    monkeypatch.setattr(accuracy, "ROOT", root)
    predicted = []
    for name in ("nearest", "ridge"):
        old = baselines.PREDICTORS[name]
        monkeypatch.setitem(
            baselines.PREDICTORS,
            name,
            lambda *given, old=old, name=name: predicted.append(name) or old(*given),
        )

    def rerun(*options):
        scripts.calls, predicted[:] = [], []
        assert benchmark(source, work, *options) == 0
        return [c[0] for c in scripts.calls], predicted.copy()

    everything = [c[0] for c in PIPELINE[:4]] + ["HISTEX.py"] * 4
    assert rerun() == (everything, ["nearest", "ridge"])
    assert rerun() == ([], [])
    with (root / "HISTEX.py").open("a") as file:
        file.write("# edited\n")
    assert rerun() == (["HISTEX.py"] * 4, [])
    assert rerun("--published-epochs", "7") == (["HISTEX.py"] * 2, [])
    assert "7" in scripts.histex[0]
    monkeypatch.setattr(accuracy, "SCORES", {"r 1x": ("r", 1), **accuracy.SCORES, "x": ("rho", 1)})
    assert rerun() == ([], ["nearest", "ridge"])  # scored again, from the maps that are there
    for path in ("get_HR.py", "reading/tables.py"):
        with (root / path).open("a") as file:
            file.write("# edited\n")
        assert rerun() == (everything, ["nearest", "ridge"])


def test_a_real_script_that_fails_is_reported(source, tmp_path, capsys):
    (source / "locs-raw.csv").write_text("id,x,y\na,nan,3\n")
    assert benchmark(source, tmp_path / "bench") == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "image_calibration.py" in error
    assert "stages.log" in error
    assert not (tmp_path / "bench" / "R.md").exists()


def test_options_and_seeds_of_the_runs():
    args = accuracy.build_parser().parse_args(
        ["--methods", "ridge", "mlp", "published", "default", "--seeds", "2",
         "--published-epochs", "50", "--published-states", "1", "--histex-options=--device cpu"]
    )  # fmt: skip
    runs = [(t.method, t.seed, t.options) for t in accuracy.tasks_of(args)]
    published = ("--epochs", "50", "--n-states", "1", "--device", "cpu")
    assert runs == [
        ("ridge", 0, ()), ("mlp", 0, ()), ("mlp", 1000, ()), ("published", 0, published),
        ("published", 1000, published), ("default", 0, ("--device", "cpu")),
        ("default", 1000, ("--device", "cpu")),
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["no section", "no truth", "no folder", "same name"])
def test_bad_input(case, source, tmp_path, capsys):
    output = tmp_path / "RESULTS.md"
    output.write_text("earlier")
    directories, said = {
        "no section": ([], "--simulated 3"),
        "no truth": ([source], "truth.npz is missing"),
        "no folder": ([tmp_path / "nowhere"], "nowhere"),
        "same name": ([source, shutil.copytree(source, tmp_path / "x" / source.name)], "Rename"),
    }[case]
    if case == "no truth":
        (source / "truth.npz").unlink()
    arguments = ["--output", str(output), "--keep", str(tmp_path / "work")]
    if directories:
        arguments += ["--directory", *map(str, directories)]
    assert accuracy.run(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert output.read_text() == "earlier"
    assert not (tmp_path / "work").exists()


# ----- the table -----
def run_result(method, r1, seconds, resumed=False):
    scores = {"r 1x": r1, "r 2x": 0.3, "r 4x": None}
    return {"method": method, "seed": 0, "scores": scores, "seconds": seconds, "resumed": resumed}


def test_table_gives_mean_and_spread():
    results = [
        {
            "name": "liver",
            "runs": [run_result("ridge", 0.1, 2.0)]
            + [run_result("mlp", r1, s) for r1, s in ((0.2, 10), (0.3, 20), (0.4, 1200))],
            "ceiling": {"r 1x": 0.5, "r 2x": 0.6, "r 4x": 0.7},
        },
        {
            "name": "gut",
            "runs": [run_result("ridge", 0.15, 3.0)]
            + [run_result("mlp", 0.2, s, resumed=s == 30) for s in (30, 40, 50)],
            "ceiling": {"r 1x": None, "r 2x": 0.6, "r 4x": 0.7},
        },
    ]
    lines = accuracy.table(results, ["ridge", "mlp"], ["r 1x", "r 2x", "r 4x"], timed=True)
    assert lines == [
        "| method | liver | gut | seconds |",
        "|---|---|---|---|",
        "| ridge on histology | 0.100 / 0.300 / unknown | 0.150 / 0.300 / unknown | 2.5 |",
        "| MLP on tokens (iStar-style) "
        "| 0.300 / 0.300 / unknown<br>± 0.100 / 0.000 / unknown "
        "| 0.200 / 0.300 / unknown<br>± 0.000 / 0.000 / unknown | > 225.0 |",
        "| ceiling | 0.500 / 0.600 / 0.700 | unknown / 0.600 / 0.700 |  |",
    ]


def test_report_names_machine_commit_and_command(source, scripts, tmp_path):
    work = tmp_path / "bench"
    assert benchmark(source, work) == 0
    text = (work / "R.md").read_text()
    default = "**HISTEX, default preset**"
    for row, n in (("nearest spot", 3), ("ridge + interpolated residual", 3), (default, 2)):
        assert text.count(f"| {row} | ") == n  # r, SSIM and RMSE, what the default is ahead by
    ahead = [line for line in text.splitlines() if line.startswith("| HISTEX, published")][-1]
    assert re.findall(r"[+-]\d\.\d{3}", ahead)[:3] == ["+0.000"] * 3  # the stub's maps are alike
    assert "MLP" not in text
    assert "* command: `python benchmarks/accuracy.py --directory " in text
    assert measure.commit() in text
    assert measure.processor() in text
    assert f"* {source.name}: " in text
    assert "8 genes" in text
    assert "500 epochs, 5 states" in text
