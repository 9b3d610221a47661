"""get_HR.py: the lattice against brute force over all pairs, HR values, genes and reruns."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from conftest import GENES, REAL_DATA, run, run_as_main, write_record
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import Delaunay

import get_HR
import utils

SCRIPT = utils.HIGH_RESOLUTION
OUTPUTS = ("HRlocs.csv", "HRcnts.npy", "gene-names.txt", "get_HR.json")


# ----- a lattice by its definition, and its neighbours by looking at all pairs -----
def lattice(shape: str, rows: int, columns: int, degrees: float = 0.0, pitch: float = 200.0):
    row, col = (index.ravel().astype(float) for index in np.mgrid[:rows, :columns])
    if shape == "hexagonal":
        row, col = row * np.sqrt(3) / 2, col + 0.5 * (row % 2)
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return pitch * np.column_stack([col, row]) @ turn + (3000.0, 700.0)


def jitter(xy: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform in a disc."""
    length, angle = radius * np.sqrt(rng.random(len(xy))), rng.uniform(0, 2 * np.pi, len(xy))
    return xy + np.column_stack([length * np.cos(angle), length * np.sin(angle)])


def pairs_at(xy: np.ndarray, pitch: float = 200.0) -> set[tuple[int, int]]:
    """All pairs of undisturbed spots one pitch apart."""
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    return {(int(a), int(b)) for a, b in np.argwhere(np.abs(apart - pitch) < 1e-3) if a < b}


def found_pairs(xy: np.ndarray, shape: str | None = None) -> set[tuple[int, int]]:
    fitted = get_HR.fit_lattice(xy)
    assert fitted is not None
    assert shape in (None, fitted.shape)
    pairs = get_HR.lattice_pairs(fitted)
    as_set = {(int(a), int(b)) for a, b in pairs}
    assert len(as_set) == len(pairs)
    assert pairs.tolist() == sorted(pairs.tolist())
    return as_set


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(["hexagonal", "square"]),
    degrees=st.one_of(st.sampled_from([0.0, 15.0, 30.0, 45.0, 60.0, 90.0]), st.floats(0, 360)),
    missing=st.sampled_from([0.0, 0.1, 0.3]),
    amount=st.sampled_from([0.0, 0.1, 0.25]),
    pitch=st.floats(20, 1000),
    seed=st.integers(0, 2**31),
)
def test_neighbours_equal_brute_force(shape, degrees, missing, amount, pitch, seed):
    rng = np.random.default_rng(seed)
    true = lattice(shape, 14, 12, degrees, pitch)
    true = rng.permutation(true[rng.random(len(true)) >= missing])
    xy = jitter(true, amount * pitch, rng)
    assert found_pairs(xy, shape) == pairs_at(true, pitch)


@pytest.mark.parametrize("shape", ["hexagonal", "square"])
@pytest.mark.parametrize("size", [(5, 5), (2, 40), (3, 30), (40, 45)])
def test_neighbours_of_small_narrow_and_large_sections(shape, size):
    rng = np.random.default_rng(1)
    true = lattice(shape, *size, degrees=23.0)
    assert found_pairs(jitter(true, 50.0, rng)) == pairs_at(true)


@pytest.mark.parametrize("shape", ["hexagonal", "square"])
def test_neighbours_with_a_hole_and_in_two_pieces(shape):
    rng = np.random.default_rng(2)
    true = lattice(shape, 45, 40, degrees=71.0)
    steps = np.linalg.norm(true - np.median(true, axis=0), axis=1) / 200
    for keep in (steps > 12, (steps < 6) | (np.linalg.norm(true - true[0], axis=1) < 8 * 200)):
        kept = true[keep]
        assert found_pairs(jitter(kept, 50.0, rng)) == pairs_at(kept)


@pytest.mark.parametrize("shape", ["hexagonal", "square"])
def test_stretched_and_sheared_lattice(shape):
    rng = np.random.default_rng(3)
    true = lattice(shape, 20, 20, degrees=10.0)
    stretched = true @ np.array([[1.06, 0.03], [0.0, 0.97]])
    assert found_pairs(jitter(stretched, 20.0, rng)) == pairs_at(true)


def test_fit_gives_pitch_rotation_and_residual():
    fitted = get_HR.fit_lattice(lattice("hexagonal", 12, 12, degrees=-17.0, pitch=187.0))
    assert fitted.pitch == pytest.approx(187.0)
    assert fitted.degrees == pytest.approx(-17.0)
    assert fitted.residuals(lattice("hexagonal", 12, 12, -17.0, 187.0)).max() < 1e-9
    xy = lattice("square", 20, 20, degrees=33.0)
    rng = np.random.default_rng(4)
    moved = jitter(xy, 50.0, rng)
    fitted = get_HR.fit_lattice(moved)
    assert fitted.pitch == pytest.approx(200.0, rel=0.01)
    assert fitted.degrees == pytest.approx(33.0, abs=0.6)
    true_rms = np.sqrt(((moved - xy) ** 2).sum(axis=1).mean()) / 200
    assert np.sqrt((fitted.residuals(moved) ** 2).mean()) == pytest.approx(true_rms, rel=0.03)


def test_no_lattice_in_random_places():
    rng = np.random.default_rng(5)
    for n in (16, 40, 150, 400):
        assert get_HR.fit_lattice(rng.uniform(0, 200 * np.sqrt(n), (n, 2))) is None
    two_grids = [
        lattice("square", 12, 12),
        lattice("square", 12, 12, degrees=20.0) + np.array([4000, 0]),
    ]
    assert get_HR.fit_lattice(np.concatenate(two_grids)) is None
    for longer in (1.3, 1.5, 1.73, 2.0):  # 1.5: every second row of a hexagonal one, nearly
        oblong = jitter(lattice("square", 15, 15) * (1.0, longer), 5.0, rng)
        assert get_HR.fit_lattice(oblong) is None


def test_a_stray_may_lie_on_a_free_node_but_not_on_anothers():
    xy = lattice("square", 10, 10)
    outside, between = xy[9] + (280.0, 0.0), xy[44] + (60.0, 60.0)  # 0.4 pitches from their nodes
    assert get_HR.fit_lattice(np.vstack([xy, outside])) is not None
    assert get_HR.fit_lattice(np.vstack([xy, between])) is None


def test_real_legacy_st_spots_have_the_neighbours_their_ids_name():
    path = REAL_DATA / "dev_her2st_C2" / "locs-raw.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    locs = pd.read_csv(path, index_col=0)
    place = np.array([[int(part) for part in spot.split("x")] for spot in locs.index])
    assert found_pairs(locs.to_numpy()) == pairs_at(200.0 * place)


def test_pairs_by_hand():
    nodes = np.array([(0, 0), (0, 1), (1, 0), (1, 1), (5, 7)])
    square = get_HR.Lattice("square", np.zeros(2), np.eye(2), nodes)
    assert get_HR.lattice_pairs(square).tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    hexagonal = get_HR.Lattice("hexagonal", np.zeros(2), np.eye(2), nodes)
    assert get_HR.lattice_pairs(hexagonal).tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]


def test_last_node_of_a_row_is_no_neighbour_of_the_next_row():
    nodes = np.array([(0, 4), (1, 0), (1, 4), (2, 0), (0, 5)])
    fitted = get_HR.Lattice("hexagonal", np.zeros(2), np.eye(2), nodes)
    assert get_HR.lattice_pairs(fitted).tolist() == [[0, 2], [0, 4], [1, 3], [2, 4]]


# ----- spots on no lattice -----
def test_delaunay_edges_equal_their_definition():
    """An edge is Delaunay if some circle through both ends and a third spot holds no other spot."""
    xy = np.random.default_rng(6).uniform(0, 2000, (25, 2))
    edges = set()
    for triple in itertools.combinations(range(len(xy)), 3):
        a, b, c = xy[list(triple)]
        matrix = 2 * np.array([b - a, c - a])
        centre = np.linalg.solve(matrix, [b @ b - a @ a, c @ c - a @ a])
        others = np.delete(xy, triple, axis=0)
        if np.linalg.norm(others - centre, axis=1).min() > np.linalg.norm(a - centre):
            edges |= set(itertools.combinations(triple, 2))
    length = {pair: np.linalg.norm(xy[pair[0]] - xy[pair[1]]) for pair in edges}
    limit = get_HR.MAX_EDGE * np.median(list(length.values()))
    expected = sorted(list(pair) for pair in edges if length[pair] <= limit)
    assert 0 < len(expected) < len(edges)
    assert get_HR.delaunay_pairs(xy).tolist() == expected


@pytest.mark.parametrize(
    ("xy", "expected"),
    [
        ([(5, 5)], []),
        ([(5, 5), (300, 9)], [[0, 1]]),
        ([(0, 0), (200, 0), (100, 173)], [[0, 1], [0, 2], [1, 2]]),
        ([(0, 0), (400, 0), (200, 0)], [[0, 2], [1, 2]]),  # a row, not in order
        ([(0, 9), (200, -9), (400, 5), (600, 0)], [[0, 1], [1, 2], [2, 3]]),  # nearly a row
        ([(0, 0), (0, 200), (0, 400), (0, 1400)], [[0, 1], [1, 2]]),  # a gap in a row
        ([(0, 0), (200, 0), (0, 200), (200, 200)], [[0, 1], [0, 2], [1, 3], [2, 3]]),
    ],
)
def test_few_spots_by_hand(xy, expected):
    xy = np.array(xy, float)
    assert get_HR.fit_lattice(xy) is None
    assert get_HR.delaunay_pairs(xy).tolist() == expected


def test_a_ragged_row_joins_each_spot_with_the_next():
    rng = np.random.default_rng(10)
    xy = jitter(lattice("square", 1, 15, degrees=40.0), 50.0, rng)
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    near = np.flatnonzero(steps <= get_HR.MAX_EDGE * np.median(steps))
    assert get_HR.delaunay_pairs(xy).tolist() == [[i, i + 1] for i in near]


def test_fallback_bridges_no_gap():
    rng = np.random.default_rng(7)
    left, right = rng.uniform(0, 1500, (60, 2)), rng.uniform((5000, 0), (6500, 1500), (60, 2))
    pairs = get_HR.delaunay_pairs(np.concatenate([left, right]))
    assert len(pairs) > 120
    assert ((pairs < 60).all(axis=1) | (pairs >= 60).all(axis=1)).all()
    bridges = Delaunay(np.concatenate([left, right])).simplices < 60
    assert (bridges.any(axis=1) & ~bridges.all(axis=1)).any()  # there were some to leave out


def test_fallback_agrees_with_the_lattice_on_small_ones():
    for shape in ("hexagonal", "square"):
        xy = lattice(shape, 3, 4, degrees=31.0)
        assert {tuple(pair) for pair in get_HR.delaunay_pairs(xy).tolist()} == pairs_at(xy)


# ----- the stage -----
@pytest.fixture
def ready(sample):
    """A sample as image_calibration.py leaves it: at 0.5 um/px the coordinates stay as they are."""
    (sample / "locs.csv").write_bytes((sample / "locs-raw.csv").read_bytes())
    write_record(sample, utils.CALIBRATION, ["locs-raw.csv"], ["locs.csv"])
    return sample


def place(directory, xy, spots=None, counts=None):
    """Replace the spots (and counts) of a sample."""
    spots = [f"s{i}" for i in range(len(xy))] if spots is None else spots
    pd.DataFrame(np.array(xy, float), spots, ["x", "y"]).to_csv(directory / "locs.csv")
    write_record(directory, utils.CALIBRATION, ["locs-raw.csv"], ["locs.csv"])
    if counts is None:
        counts = np.random.default_rng(0).poisson(5, (len(xy), len(GENES)))
    pd.DataFrame(counts, spots, GENES[: np.shape(counts)[1]]).to_csv(directory / "cnts.csv")


def results(directory):
    points = pd.read_csv(
        directory / "HRlocs.csv", index_col=0, keep_default_na=False,
        dtype={"parent_1": str, "parent_2": str},
    )  # fmt: skip
    genes = (directory / "gene-names.txt").read_text().split()
    counts = np.load(directory / "HRcnts.npy", allow_pickle=False)
    assert counts.dtype == np.float32
    assert counts.shape == (len(points), len(genes))
    return points, counts, genes


def test_three_spots_by_hand(ready):
    place(
        ready, [(100, 100), (300, 100), (200, 273)], ["a,1", "NA", "007"], [(0, 5), (4, 7), (9, 1)]
    )
    assert run(SCRIPT, ready) == 0
    lines = (ready / "HRlocs.csv").read_text().splitlines()
    assert lines == [
        ",x,y,measured,parent_1,parent_2",
        '0,100.0,100.0,1,"a,1",',
        "1,300.0,100.0,1,NA,",
        "2,200.0,273.0,1,007,",
        '3,200.0,100.0,0,"a,1",NA',
        '4,150.0,186.5,0,"a,1",007',
        "5,250.0,186.5,0,NA,007",
    ]
    _, counts, genes = results(ready)
    assert genes == GENES[:2]
    assert counts.tolist() == [[0, 5], [4, 7], [9, 1], [2, 6], [4.5, 3], [6.5, 4]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(["hexagonal", "square"]))
def test_hr_counts_stay_within_the_measured_ones(seed, shape, tmp_path_factory):
    rng = np.random.default_rng(seed)
    xy = lattice(shape, 6, 7)
    parents = get_HR.hr_parents(len(xy), get_HR.lattice_pairs(get_HR.fit_lattice(xy)))
    counts = (rng.poisson(3, (len(xy), 5)) * rng.choice([1, 0.1, 1e6])).astype(np.float32)
    counts[:, 2] = 0.3
    path = tmp_path_factory.mktemp("hr") / "counts.npy"
    get_HR.write_hr_counts(counts, parents, path)
    hr = np.load(path)
    assert (hr >= counts.min(axis=0)).all()
    assert (hr <= counts.max(axis=0)).all()
    assert (hr[:, 2] == np.float32(0.3)).all()
    assert (hr[: len(xy)] == counts).all()
    two = counts[parents]
    assert (hr == (two[:, 0] + two[:, 1]) / 2).all()


def test_more_points_than_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(get_HR, "BLOCK_BYTES", 400)
    counts = np.arange(300, dtype=np.float32)[:, None]
    chain = np.arange(len(counts) - 1)
    parents = get_HR.hr_parents(len(counts), np.column_stack([chain, chain + 1]))
    get_HR.write_hr_counts(counts, parents, tmp_path / "counts.npy")
    expected = np.concatenate([counts[:, 0], chain + 0.5])
    assert (np.load(tmp_path / "counts.npy")[:, 0] == expected).all()


def test_a_sample_as_a_user(ready, capsys):
    assert run_as_main(SCRIPT, "--directory", ready, "--n-genes", "5") == 0
    said = capsys.readouterr()
    assert "lattice: hexagonal, pitch 50.0 um, turned by 0.0 degrees" in said.out
    assert "pixel-size-raw.txt is wrong" in said.out  # half of Visium's pitch
    assert not said.err
    points, counts, genes = results(ready)
    locs = pd.read_csv(ready / "locs.csv", index_col=0)
    table = pd.read_csv(ready / "cnts.csv", index_col=0)
    assert genes == [gene for gene in table.columns if gene in table.var().nlargest(5).index]
    measured = points[points["measured"] == 1]
    assert list(measured.index) == list(range(len(locs)))
    assert list(measured["parent_1"]) == list(locs.index)
    assert (measured[["x", "y"]].to_numpy() == locs.to_numpy()).all()
    assert (counts[: len(locs)] == table.loc[locs.index, genes].to_numpy()).all()
    between = points[points["measured"] == 0]
    ends = {(a, b) for a, b in zip(between["parent_1"], between["parent_2"], strict=True)}
    assert ends == {tuple(locs.index[list(pair)]) for pair in pairs_at(locs.to_numpy(), 100.0)}
    middle = (locs.loc[between["parent_1"]].to_numpy() + locs.loc[between["parent_2"]]) / 2
    assert np.allclose(between[["x", "y"]], middle, rtol=0, atol=1e-9)
    mean = (
        table.loc[between["parent_1"], genes].to_numpy() + table.loc[between["parent_2"], genes]
    ) / 2
    assert (counts[len(locs) :] == mean.to_numpy()).all()
    record = json.loads((ready / "get_HR.json").read_text())
    assert record["lattice"] == "hexagonal"
    assert record["pitch_um"] == pytest.approx(50.0)
    assert (record["spots"], record["hr_points"]) == (len(locs), len(points))
    assert not list(ready.glob(".*partial*"))


def test_row_order_does_not_matter(ready):
    assert run(SCRIPT, ready) == 0
    points, counts, genes = results(ready)
    for name in ("locs.csv", "cnts.csv"):
        table = pd.read_csv(ready / name, index_col=0)
        table.sample(frac=1, random_state=1).to_csv(ready / name)
    assert run(SCRIPT, ready) == 0
    shuffled, shuffled_counts, shuffled_genes = results(ready)
    assert shuffled_genes == genes

    def by_parents(points, counts):
        return {
            frozenset((p.parent_1, p.parent_2)): (p.x, p.y, p.measured, *row)
            for p, row in zip(points.itertuples(), counts.tolist(), strict=True)
        }

    assert by_parents(shuffled, shuffled_counts) == by_parents(points, counts)
    assert list(shuffled["parent_1"]) != list(points["parent_1"])


def test_irregular_spots_say_so(ready, capsys):
    rng = np.random.default_rng(8)
    place(ready, rng.uniform(50, 600, (40, 2)))
    assert run(SCRIPT, ready) == 0
    assert (
        "lattice: none, the spots lie on none; neighbours are Delaunay" in capsys.readouterr().out
    )
    points, _, _ = results(ready)
    assert (points["measured"] == 1).sum() == 40
    assert len(points) > 80
    assert json.loads((ready / "get_HR.json").read_text())["lattice"] == "none"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_spots(ready, n, capsys):
    place(ready, [(100, 100), (300, 100), (500, 100)][:n])
    (ready / "gene-names.txt").write_text("GENE1\n")
    assert run(SCRIPT, ready) == 0
    assert f"only {n} spots" in capsys.readouterr().out
    points, _, _ = results(ready)
    assert len(points) == 2 * n - 1


# ----- gene-names.txt: whose list it is, over several runs -----
def test_own_list_is_used_in_its_order_and_never_replaced(ready, capsys):
    (ready / "gene-names.txt").write_bytes(b"GENE5\r\n\r\nGENE2\r\n")
    before = (ready / "gene-names.txt").stat()
    for options in ((), ("--n-genes", "3"), ("--force", "--n-genes", "3")):
        assert run(SCRIPT, ready, *options) == 0
        assert "your 2 genes" in capsys.readouterr().out
        _, counts, genes = results(ready)
        assert genes == ["GENE5", "GENE2"]
        table = pd.read_csv(ready / "cnts.csv", index_col=0)
        assert (counts[: len(table)] == table[genes].to_numpy()).all()
        after = (ready / "gene-names.txt").stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
        record = json.loads((ready / "get_HR.json").read_text())
        assert "gene-names.txt" in record["inputs"]
        assert "gene-names.txt" not in record["outputs"]


def test_selected_list_is_selected_anew(ready):
    assert run(SCRIPT, ready) == 0
    assert results(ready)[2] == GENES
    assert run(SCRIPT, ready, "--n-genes", "3") == 0
    assert len(results(ready)[2]) == 3
    record = json.loads((ready / "get_HR.json").read_text())
    assert record["inputs"]["gene-names.txt"] == record["outputs"]["gene-names.txt"]


def test_edited_list_becomes_the_users(ready, capsys):
    assert run(SCRIPT, ready, "--n-genes", "3") == 0
    (ready / "gene-names.txt").write_text("GENE7\nGENE0\n")
    for n_genes in ("5", "6"):
        assert run(SCRIPT, ready, "--n-genes", n_genes) == 0
        assert "your 2 genes" in capsys.readouterr().out
        assert results(ready)[2] == ["GENE7", "GENE0"]
    (ready / "gene-names.txt").unlink()
    assert run(SCRIPT, ready, "--n-genes", "6") == 0
    assert len(results(ready)[2]) == 6


def test_list_is_kept_after_a_run_that_was_cut_off(ready):
    (ready / "gene-names.txt").write_text("GENE3\n")
    unfinished = {"finished": False, "script": SCRIPT, "written": [{}]}
    (ready / "get_HR.json").write_text(json.dumps(unfinished))
    assert run(SCRIPT, ready) == 0
    assert results(ready)[2] == ["GENE3"]


@pytest.mark.parametrize("mine", [True, False])
def test_later_edit_of_the_list_makes_the_hr_points_stale(ready, mine):
    if not mine:
        (ready / "gene-names.txt").write_text("GENE3\nGENE4\n")
    assert run(SCRIPT, ready) == 0
    args = get_HR.build_parser().parse_args(["--directory", str(ready)])
    utils.Stage(utils.HISTEX, args).require(utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS)
    (ready / "gene-names.txt").write_text("GENE1\n")
    for artifact in (utils.HR_LOCS, utils.HR_CNTS):
        with pytest.raises(utils.StageError, match=r"gene-names.txt has changed.*\n.*get_HR.py"):
            utils.Stage(utils.HISTEX, args).require(artifact)
    assert run(SCRIPT, ready) == 0
    utils.Stage(utils.HISTEX, args).require(utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS)


def test_hand_edited_hr_points_are_not_replaced(ready, capsys):
    assert run(SCRIPT, ready) == 0
    (ready / "HRlocs.csv").write_text("mine")
    assert run(SCRIPT, ready) == 0
    assert "kept your HRlocs.csv (--force makes a new one)" in capsys.readouterr().out
    assert (ready / "HRlocs.csv").read_text() == "mine"
    assert run(SCRIPT, ready, "--n-genes", "3") == 2
    assert "--force" in capsys.readouterr().err
    assert (ready / "HRlocs.csv").read_text() == "mine"
    assert run(SCRIPT, ready, "--force") == 0
    assert len(results(ready)[0]) > 30


def test_crash_before_the_end_changes_nothing(ready, monkeypatch):
    assert run(SCRIPT, ready, "--n-genes", "3") == 0
    before = {name: (ready / name).read_bytes() for name in OUTPUTS}

    def fail(*_):
        raise RuntimeError("cut off")

    monkeypatch.setattr(get_HR, "write_hr_counts", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        run(SCRIPT, ready, "--n-genes", "4")
    assert {name: (ready / name).read_bytes() for name in OUTPUTS} == before
    assert not list(ready.glob(".*partial*"))


# ----- bad input -----
def edit(name, old, new):
    def change(directory):
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return change


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def remove(name):
    return lambda directory: (directory / name).unlink()


def collide(directory):
    """spot009 comes to lie a tenth of a pitch from spot010, on the same node."""
    locs = pd.read_csv(directory / "locs.csv", index_col=0)
    locs.loc["spot009"] = locs.loc["spot010"] + np.array([6.0, 8.0])
    locs.to_csv(directory / "locs.csv")


def make_constant(directory):
    counts = pd.read_csv(directory / "cnts.csv", index_col=0)
    (counts * 0 + 3).to_csv(directory / "cnts.csv")


BAD = {
    "no locs": (remove("locs.csv"), ["locs.csv is missing", "image_calibration.py --directory"]),
    "no record": (remove("image_calibration.json"), ["locs.csv has no record", "did not finish"]),
    "stale": (edit("locs-raw.csv", "60.0", "61.0"), ["out of date", "locs-raw.csv has changed"]),
    "no counts": (remove("cnts.csv"), ["cnts.csv is missing", "cnts.csv.gz", "Add it, then run"]),
    "no spots": (write("locs.csv", ",x,y\n"), ["locs.csv", "no spot"]),
    "no x": (edit("locs.csv", ",x,y", ",u,y"), ["locs.csv", "u, y", "expected a column x"]),
    "text": (edit("locs.csv", "60.0", "abc"), ["locs.csv", "'abc'", "data row 1"]),
    "nan": (edit("locs.csv", "60.0", "nan"), ["locs.csv", "nan", "data row 1"]),
    "same id": (edit("locs.csv", "spot001", "spot002"), ["locs.csv", "spot002", "more than once"]),
    "collision": (collide, ["spot009 and spot010", "0.10 pitches", "image_calibration.py"]),
    "spot without counts": (
        edit("cnts.csv", "spot007", "other"), ["no counts for 1 of", "spot007"],
    ),
    "no header": (edit("cnts.csv", "," + ",".join(GENES), "a,1,2,3,4,5,6,7,8"), ["header line"]),
    "two genes of one name": (edit("cnts.csv", "GENE4", "GENE3"), ["GENE3", "more than once"]),
    "negative": (edit("cnts.csv", "spot000,", "spot000,-"), ["cnts.csv", "negative"]),
    "constant": (make_constant, ["no gene that varies", "gene-names.txt"]),
    "unknown genes": (
        write("gene-names.txt", "GENE1\nA1\nA2\nA3\nA4\nA5\nA6\n"),
        ["gene-names.txt", "6 of 7", "A1, A2, A3, A4, A5;", "GENE0", "mend it"],
    ),
    "gene twice": (write("gene-names.txt", "GENE1\nGENE1\n"), ["GENE1", "more than once"]),
    "empty list": (write("gene-names.txt", "\n\n"), ["gene-names.txt", "no gene"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(ready, case, capsys):
    assert run(SCRIPT, ready) == 0
    change, words = BAD[case]
    change(ready)
    before = {name: (ready / name).read_bytes() for name in OUTPUTS}
    capsys.readouterr()
    assert run(SCRIPT, ready) == 2
    message = capsys.readouterr().err
    for word in [*words, "error: ", "python "]:
        assert word in message
    assert {name: (ready / name).read_bytes() for name in OUTPUTS} == before
    assert not list(ready.glob(".*partial*"))


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_n_genes_must_be_positive(ready, number, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(SCRIPT, ready, "--n-genes", number)
    assert stopped.value.code == 2
    assert "--n-genes" in capsys.readouterr().err


def test_full_disk_is_found_ahead(ready, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda _: usage)
    assert run(SCRIPT, ready) == 2
    assert "HRcnts.npy: about" in capsys.readouterr().err
    assert not (ready / "HRcnts.npy").exists()


def test_time_grows_with_the_number_of_spots_not_its_square():
    """All distances between 100,000 spots would be 80 GB."""
    xy = jitter(lattice("hexagonal", 320, 320), 20.0, np.random.default_rng(9))
    fitted = get_HR.fit_lattice(xy)
    assert len(get_HR.lattice_pairs(fitted)) == 319 * 320 + 319 * (2 * 320 - 1)
