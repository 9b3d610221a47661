"""analysis/segment.py: known regions found again, marker genes against scipy, and bad inputs."""

import json
import pickle
import shlex
import shutil
import sys
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from conftest import run_as_main
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_array
from test_regions import (
    GENES,
    GRID,
    RATES,
    add_to_record,
    lattice,
    snapshot,
    true_labels,
    write_section,
)

from analysis import regions, segment
from writing import disk

METHODS = list(segment.CUTS)
EVERY = slice(None)
OUTPUTS = [
    "segment-markers.csv", "segment.json", "segments.csv", "segments.npy", "segments.png",
]  # fmt: skip


def run_segment(directory, *options):
    return segment.run(["--directory", str(directory), "--no-plot", *options])


def result(directory):
    """Labels, regions, markers, record."""
    text = {"dtype": {"gene": str}, "keep_default_na": False}
    return (
        np.load(directory / "segments.npy"),
        pd.read_csv(directory / "segments.csv"),
        pd.read_csv(directory / "segment-markers.csv", **text),
        json.loads((directory / "segment.json").read_text()),
    )


def agreement(labels, true):
    return regions.adjusted_rand(labels[true > 0], true[true > 0])


# ----- known regions -----
@pytest.mark.parametrize("method", METHODS)
def test_known_regions_are_found(labelled, method, capsys):
    options = ("--method", method, "--n-regions", "3", "--truth", "--smoothing-um", "0")
    assert run_segment(labelled, *options) == 0
    labels, table, markers, record = result(labelled)
    true = true_labels()
    assert labels.shape == GRID
    assert labels.dtype == np.uint8
    assert ((labels > 0) == (true > 0)).all()
    assert agreement(labels, true) == 1
    assert record["truth"]["ARI"] == 1
    assert record["truth"]["regions"] == 3
    assert 0.2 < record["truth"]["ARI of interpolated spots"] < 1
    assert record["stability"] == {"halves": 5, "mean ARI": 1.0, "lowest ARI": 1.0}
    assert "truth: regions 3, ARI 1.0, ARI of interpolated spots" in capsys.readouterr().out
    assert table["region"].tolist() == [1, 2, 3]
    areas = np.sort(np.bincount(true.ravel())[1:])[::-1]
    assert table["superpixels"].tolist() == areas.tolist()
    np.testing.assert_allclose(table["mm2"], areas * 64e-6, rtol=1e-4)
    np.testing.assert_allclose(table["share_of_tissue"], areas / areas.sum(), rtol=1e-4)
    assert table["colour"].tolist() == regions.label_colours(3)
    assert (table["spots"] >= segment.MIN_SPOTS).all()
    for region in (1, 2, 3):  # the gene of RATES that is high in it, and none of the constant ones
        kind = true[labels == region][0]
        top = markers[(markers["region"] == region) & markers["higher"]].iloc[0]
        assert top["gene"] == GENES[kind - 1]
        assert top["log2_fold"] > 1
        assert top["auc"] > 0.9
    assert len(markers) == 3 * len(GENES)


@pytest.mark.parametrize("method", METHODS)
def test_smoothing_finds_regions_in_noise(tmp_path, method):
    """Noise of three times the distance between regions; only smoothing brings them out."""
    rng, true = np.random.default_rng(0), true_labels()
    directory = write_section(tmp_path / "section N", true, rng)
    image = np.eye(4, 4)[true] + rng.normal(0, 1.5, (*GRID, 4))
    write_embedding(directory, np.where(true > 0, image.transpose(2, 0, 1), np.nan))
    found = {}
    for um in ("0", "24"):
        options = ("--method", method, "--n-regions", "3", "--smoothing-um", um, "--n-halves", "1")
        assert run_segment(directory, *options, "--min-region-mm2", "0") == 0
        found[um] = agreement(result(directory)[0], true)
    assert found["24"] > 0.75
    assert found["0"] < 0.4


def write_embedding(directory, image):
    with (directory / "embeddings-gene.pickle").open("wb") as file:
        pickle.dump({"cls": np.array(image, np.float32, order="C")}, file, protocol=5)


@pytest.mark.parametrize("method", METHODS)
def test_stability_tells_regions_from_none(labelled, method):
    """Noise as smooth as regions: k-means finds the same again from any seed, not from halves."""
    options = ("--n-regions", "6", "--method", method)
    noise = np.random.default_rng(0).normal(0, 1, (5, *GRID))
    write_embedding(labelled, np.where(true_labels() > 0, noise, np.nan))
    assert run_segment(labelled, *options) == 0
    assert result(labelled)[3]["stability"]["mean ARI"] < 0.7
    first = result(labelled)[0]
    assert run_segment(labelled, *options, "--n-halves", "1") == 0
    assert result(labelled)[3]["stability"] is None
    assert (result(labelled)[0] == first).all()


def test_halves_are_of_squares():
    tissue = np.zeros((60, 110), bool)
    tissue[3:55, 20:] = True
    tissue[0, 0] = True
    half = np.full(tissue.shape, -1)
    half[tissue] = segment.half_of(tissue, 0)
    squares = [half[r : r + 25, c : c + 25] for r in range(0, 60, 25) for c in range(0, 110, 25)]
    inside = [{*np.unique(square[square >= 0]).tolist()} for square in squares]
    inside = [found for found in inside if found]
    assert all(len(found) == 1 for found in inside)
    assert sum(found == {1} for found in inside) == -(-len(inside) // 2)
    other = segment.half_of(tissue, 1)
    assert (other != half[tissue]).any()
    assert segment.half_of(tissue[:20, 20:40], 5).all()  # of one square, all


def test_a_part_decides_for_all():
    """Regions that only one half shows are not known to the other; the rest is as it was."""
    rng = np.random.default_rng(0)
    true = np.arange(3).repeat(500)
    x = (np.eye(3)[true] * 5 + rng.normal(0, 0.2, (1500, 3))).astype(np.float32)
    tissue = np.ones((30, 50), bool)
    fitted = np.arange(1500) % 2 == 0
    for method, cut in segment.CUTS.items():
        assert regions.adjusted_rand(cut(x, tissue, 3, 0, fitted), true) == 1, method
        blind = cut(x, tissue, 2, 0, fitted & (true < 2))
        assert regions.adjusted_rand(blind[true < 2], true[true < 2]) == 1, method
        assert {*blind.tolist()} == {0, 1}
        few = cut(x, tissue, 9, 0, np.arange(1500) % 300 == 0)  # fewer than regions
        assert len(few) == 1500
        assert few.max() < 5 or method == "leiden"


def test_a_tree_of_regions_nests(labelled):
    options = ("--method", "hierarchical", "--min-region-mm2", "0", "--n-halves", "1")
    found = {}
    for n in (3, 5, 9):
        assert run_segment(labelled, *options, "--n-regions", str(n)) == 0
        found[n] = result(labelled)[0]
        assert found[n].max() == n
    for coarse, fine in ((3, 5), (5, 9)):
        for label in range(1, fine + 1):
            assert len(np.unique(found[coarse][found[fine] == label])) == 1


def test_pieces_are_as_large_as_asked(labelled):
    options = ("--n-regions", "6", "--smoothing-um", "0", "--n-halves", "1")
    for mm2 in ("0", "0.01"):
        assert run_segment(labelled, *options, "--min-region-mm2", mm2) == 0
        labels = result(labelled)[0]
        pieces, _ = regions.label_pieces(labels.astype(int))
        smallest = np.bincount(pieces.ravel())[1:].min() * regions.SUPERPIXEL_MM2
        assert (smallest >= 0.01) == (mm2 == "0.01")


def test_fewer_regions_than_asked_for_are_said(labelled, capsys):
    assert run_segment(labelled, "--n-regions", "4", "--min-region-mm2", "0.05") == 0
    labels, _, _, record = result(labelled)
    assert labels.max() < 4
    assert "regions in place of 4" in capsys.readouterr().out
    assert any("regions in place of 4" in note for note in record["warnings"])


# ----- components -----
def test_components_are_those_of_a_decomposition():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (7, 11, 13)) * np.array([9, 5, 3, 1, 0.5, 0.1, 0.1])[:, None, None]
    image += rng.normal(0, 1, (11, 13)) * 4 + 50
    tissue = rng.random((11, 13)) < 0.8
    x = image[:, tissue].T - image[:, tissue].mean(1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    share = np.cumsum(s**2) / (s**2).sum()
    n = int((share < segment.VARIANCE_KEPT).sum()) + 1
    before = image.copy()
    found, explained = segment.principal_components(image, tissue, 0)
    assert (image == before).all()
    assert found.shape == (tissue.sum(), n)
    assert explained == pytest.approx(share[n - 1], abs=1e-4)
    np.testing.assert_allclose(np.abs(found), np.abs(u * s)[:, :n], atol=2e-3)


def test_constant_maps_are_one_region(labelled, capsys):
    write_embedding(labelled, np.where(true_labels() > 0, np.ones((3, 1, 1)), np.nan))
    for method in METHODS:
        assert (
            run_segment(
                labelled, "--n-regions", "3", "--method", method, "--truth", "--n-halves", "1"
            )
            == 0
        )
        out = capsys.readouterr().out
        assert "1 regions in place of 3" in out, method
        assert "no markers of region 1" in out
        labels, table, markers, record = result(labelled)
        assert (labels == (true_labels() > 0)).all()
        assert (len(table), len(markers)) == (1, 0)
        assert record["truth"]["ARI"] == 0


# ----- partitions -----
def test_k_means_is_a_minimum_of_its_own(monkeypatch):
    """Every centre is the mean of its own, and no other partition of few points is better."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (12, 2)).astype(np.float32)
    centres = segment.k_means(x, 2, 0)
    nearest = ((x[:, None] - centres) ** 2).sum(2).argmin(1)
    distance = ((x - centres[nearest]) ** 2).sum(1)
    for i in range(2):
        np.testing.assert_allclose(centres[i], x[nearest == i].mean(0), atol=1e-4)
    every = [np.array([n >> i & 1 for i in range(12)]) for n in range(1, 2**11)]
    least = min(sum(((x[p == i] - x[p == i].mean(0)) ** 2).sum() for i in (0, 1)) for p in every)
    assert distance.sum() == pytest.approx(least, rel=1e-4)
    monkeypatch.setattr(segment, "FITTED", 200)  # of many, some are enough
    many = np.concatenate([rng.normal(m, 0.1, (2000, 2)) for m in (0, 5, 9)]).astype(np.float32)
    found = segment.by_k_means(many, None, 3, 1, EVERY)
    assert regions.adjusted_rand(found, np.arange(3).repeat(2000)) == 1


def test_ward_of_few_is_scipys():
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    expected = fcluster(linkage(x, "ward"), 7, "maxclust")
    assert regions.adjusted_rand(segment.by_ward(x, None, 7, 0, EVERY), expected) == 1


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 9999))
def test_the_graph_is_of_shared_neighbours(n, seed):
    x = np.random.default_rng(seed).normal(size=(n, 3))
    k = min(segment.NEIGHBOURS, n - 1)
    near = [{*np.argsort(((x - a) ** 2).sum(1))[: k + 1].tolist()} for a in x]
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and (j in near[i] or i in near[j]):
                expected[i, j] = len(near[i] & near[j]) / len(near[i] | near[j])
    found = segment.shared_neighbours(x)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-12)
    assert (found.data > 0).all()


def test_leiden_on_blocks(monkeypatch):
    """Few nodes for many superpixels; every superpixel has the region of its block."""
    monkeypatch.setattr(segment, "NODES", 300)
    labels = np.where(np.arange(80) < 40, 1, 2)[None].repeat(60, 0)
    labels[:4] = 0
    tissue = labels > 0
    rng = np.random.default_rng(0)
    x = (labels[tissue][:, None] * [3, -3] + rng.normal(0, 0.3, (tissue.sum(), 2))).astype("f4")
    found = segment.by_leiden(x, tissue, 2, 0, np.ones(len(x), bool))
    assert regions.adjusted_rand(found, labels[tissue]) == 1
    image = np.full(tissue.shape, -1)
    image[tissue] = segment.by_leiden(x, tissue, 9, 0, np.ones(len(x), bool))
    side = int(np.ceil(np.sqrt(tissue.sum() / 300)))
    assert side == 4
    assert len(np.unique(image[tissue])) == 9
    for row in range(0, 60, side):
        for column in range(0, 80, side):
            assert len(np.unique(image[row : row + side, column : column + side])) == 1
    assert (segment.by_leiden(x, tissue, 9, 0, np.ones(len(x), bool)) == image[tissue]).all()


# ----- marker genes -----
@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float64, st.tuples(st.integers(3, 30), st.integers(1, 4)),
                  elements=st.integers(0, 5)),
    data=st.data(),
)  # fmt: skip
def test_rank_tests_are_scipys(values, data):
    region = data.draw(arrays(np.int64, len(values), elements=st.integers(0, 2)))
    kept = [i for i in range(3) if 0 < (region == i).sum() < len(region)]
    inside = region[:, None] == kept
    auc, p = segment.rank_tests(values, inside)
    assert auc.shape == p.shape == (len(kept), values.shape[1])
    for i in range(len(kept)):
        a, b = values[inside[:, i]], values[~inside[:, i]]
        for gene in range(values.shape[1]):
            pairs = a[:, gene][:, None] - b[:, gene]
            assert auc[i, gene] == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
            if np.ptp(values[:, gene]) == 0:
                assert p[i, gene] == 1
                continue
            expected = stats.mannwhitneyu(a[:, gene], b[:, gene], method="asymptotic")
            assert p[i, gene] == pytest.approx(min(expected.pvalue, 1), rel=1e-9)
            assert auc[i, gene] == pytest.approx(expected.statistic / pairs.size)


def naive_markers(counts, genes, region):
    """A loop over regions and genes."""
    counts, region = counts[region > 0].astype(float), region[region > 0]
    total = counts.sum(1)
    values = np.zeros(counts.shape)
    for i, j in np.argwhere(counts):  # the same share is the same number
        values[i, j] = Fraction(int(counts[i, j]), int(total[i])) * Fraction(np.median(total))
    rows = []
    for r in np.unique(region):
        inside = region == r
        if min(inside.sum(), (~inside).sum()) < segment.MIN_SPOTS:
            continue
        for j, gene in enumerate(genes):
            a, b = values[inside, j], values[~inside, j]
            fold = np.log2((a.mean() + 0.05) / (b.mean() + 0.05))
            raw = counts[inside, j], counts[~inside, j]
            tests = [stats.mannwhitneyu(*x, method="asymptotic") for x in ((a, b), raw)]
            tested = [x for t in tests for x in (t.statistic / len(a) / len(b), t.pvalue)]
            rows.append((r, gene, a.mean(), b.mean(), fold, *tested))
    columns = ["region", "gene", "mean_within", "mean_without", "log2_fold", "auc", "p",
               "auc_counts", "p_counts"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns).set_index(["region", "gene"])
    q, q_counts = (benjamini_hochberg(table[name].to_numpy()) for name in ("p", "p_counts"))
    more = (table["auc"] > 0.5) & (table["auc_counts"] > 0.5)
    table = table.assign(q=q, q_counts=q_counts, higher=more & (q < 0.05) & (q_counts < 0.05))
    return table.drop(columns="p_counts")


def benjamini_hochberg(p):
    ranked = np.argsort(p)
    q, lowest = np.empty(len(p)), 1.0
    for rank in range(len(p), 0, -1):  # from the largest p down
        lowest = min(lowest, p[ranked[rank - 1]] * len(p) / rank)
        q[ranked[rank - 1]] = lowest
    return q


def test_markers_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(segment, "GENES_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    region = rng.permutation(np.repeat([0, 1, 2, 3, 4], [9, 20, 30, 15, 4]))  # 4 has too few
    counts = rng.poisson(rng.gamma(1, 2, (78, 1)) * rng.gamma(0.5, 1, 8), (78, 8))
    counts[region == 2, 3] += 30
    counts[(region == 1).argmax()] = 0
    genes = pd.Index(["NA", *"abcdefg"])
    found = segment.find_markers(csr_array(counts), genes, region)
    expected = naive_markers(counts, genes, region)
    assert len(found) == 24
    both = found.set_index(["region", "gene"])
    assert {*both.columns} == {*expected.columns}
    assert 0 < found["higher"].sum() < len(found)
    for name in expected.columns:
        wanted = expected.loc[both.index, name]
        np.testing.assert_allclose(both[name], wanted, rtol=1e-9, err_msg=name)
    for _, part in found.groupby("region"):
        assert (np.diff(part["auc"]) <= 0).all()
    assert found["region"].is_monotonic_increasing


def test_no_region_has_enough_spots():
    counts = csr_array(np.ones((9, 2)))
    found = segment.find_markers(counts, pd.Index(["a", "b"]), np.array([1] * 8 + [2]))
    assert len(found) == 0
    assert list(found) == segment.MARKER_COLUMNS


def test_a_gene_that_is_the_same_everywhere_is_no_marker_of_fat():
    """In a region of few counts its share is high."""
    rng = np.random.default_rng(0)
    region = np.repeat([1, 2], 60)
    depth = np.where(region == 1, 1, 8)[:, None]
    rate = np.column_stack([depth * [4, 4, 4, 4], np.full((120, 1), 6), 12 / depth])
    counts = rng.poisson(rate)
    names = ["TISSUE1", "TISSUE2", "TISSUE3", "TISSUE4", "NOISE", "FAT"]
    table = segment.find_markers(csr_array(counts), pd.Index(names), region)
    noise = table[(table["gene"] == "NOISE") & (table["region"] == 1)].iloc[0]
    assert noise["q"] < 1e-6
    assert noise["auc"] > 0.9
    found = table[table["higher"]]
    assert found[found["region"] == 1]["gene"].tolist() == ["FAT"]
    assert sorted(found[found["region"] == 2]["gene"]) == names[:4]


def test_genes_without_regions_are_no_markers():
    """Constant genes in regions drawn at random: at q < 0.05 hardly ever one."""
    rng = np.random.default_rng(0)
    found = np.zeros(2, int)
    for _ in range(40):
        region = rng.integers(1, 4, 90)
        counts = rng.poisson(rng.gamma(1, 3, 50), (90, 50))
        table = segment.find_markers(csr_array(counts), pd.Index(map(str, range(50))), region)
        found += np.array([(table["q"] < 0.05).any(), (table["q_counts"] < 0.05).any()])
    assert (found <= 5).all()  # 2 of 40 by chance


def test_spots_belong_to_the_region_of_their_disc(labelled):
    assert run_segment(labelled, "--n-regions", "3", "--smoothing-um", "0") == 0
    labels, table, _, record = result(labelled)
    centres = lattice()
    row, column = np.mgrid[: GRID[0], : GRID[1]] + 0.5
    counted, beyond = np.zeros(4, int), 0
    for y, x in centres:
        near = (row - y) ** 2 + (column - x) ** 2 <= 1.8**2
        votes = np.bincount(labels[near], minlength=4)
        if votes[1:].sum() < 0.25 * np.pi * 1.8**2:
            beyond += 1
            continue
        counted[1 + votes[1:].argmax()] += 1
    np.testing.assert_allclose(table["spots"], counted[1:], atol=2)  # discs cut superpixels
    assert record["spots"] == table["spots"].sum()
    assert beyond > 5


# ----- files, pictures, reruns -----
def results_of(directory):
    """Bytes of all files but the record, which holds the time of the run."""
    return {name: kept for name, kept in snapshot(directory).items() if name != "segment.json"}


def test_a_rerun_overwrites_and_is_the_same(labelled, tmp_path, capsys):
    assert segment.run(["--directory", str(labelled)]) == 0
    out = capsys.readouterr().out
    assert all(f"wrote {name}" in out for name in OUTPUTS if not name.endswith(".json"))
    first = results_of(labelled)
    assert segment.run(["--directory", str(labelled), "--force"]) == 0
    assert results_of(labelled) == first
    assert first["segments.png"][:4] == b"\x89PNG"
    assert run_segment(labelled, "--n-regions", "3") == 0
    again = results_of(labelled)
    assert np.load(labelled / "segments.npy").max() == 3
    assert {*first} - {*again} == {"segments.png"}  # it showed the regions of before
    changed = {name for name in again if again[name] != first[name]}
    assert changed == {*OUTPUTS} - {"segments.png", "segment.json"}
    options = ["--directory", str(labelled), "--output", str(tmp_path / "new" / "folder")]
    assert segment.run(options) == 0
    assert results_of(labelled) == again
    assert sorted(snapshot(tmp_path / "new" / "folder")) == OUTPUTS
    same = snapshot(tmp_path / "new" / "folder")
    assert same["segments.npy"] == first["segments.npy"]


@pytest.mark.parametrize("name", ["segments.npy", "segments.csv", "segment-markers.csv"])
def test_files_of_the_user_are_kept(labelled, name, capsys):
    """Those brought without a record, and those edited after a run; --force replaces them."""
    (labelled / "markers.csv").write_text("gene,label\nA,mine\n")  # as the README has it
    (labelled / name).write_text("brought")
    before = snapshot(labelled)
    assert run_segment(labelled, "--n-regions", "3") == 2
    error = capsys.readouterr().err
    assert f"{labelled / name} was not written by analysis/segment.py, which would" in error
    place = shlex.quote(str(labelled))
    assert f"--directory {place} --no-plot --n-regions 3 --force" in error
    assert snapshot(labelled) == before
    assert run_segment(labelled, "--n-regions", "3", "--force") == 0
    assert (labelled / "markers.csv").read_bytes() == before["markers.csv"]
    with (labelled / name).open("ab") as file:
        file.write(b"edited")
    edited = snapshot(labelled)
    capsys.readouterr()
    assert run_segment(labelled, "--n-regions", "3") == 0
    assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
    assert snapshot(labelled) == edited
    assert run_segment(labelled, "--n-regions", "2") == 2
    error = capsys.readouterr().err
    assert f"{labelled / name} was edited by hand, and other options were given" in error
    assert error.endswith("--no-plot --n-regions 2 --force\n")
    assert snapshot(labelled) == edited
    assert run_segment(labelled, "--n-regions", "2", "--force") == 0
    assert result(labelled)[0].max() == 2


def test_a_picture_of_the_user_is_neither_replaced_nor_removed(labelled, capsys):
    (labelled / "segments.png").write_bytes(b"mine")
    assert segment.run(["--directory", str(labelled), "--n-regions", "3"]) == 2
    error = capsys.readouterr().err
    assert "segments.png was not written by analysis/segment.py, which would" in error
    assert not (labelled / "segments.npy").exists()
    assert run_segment(labelled, "--n-regions", "3") == 0  # this writes no picture
    assert (labelled / "segments.png").read_bytes() == b"mine"


def test_results_of_before_are_refused_with_a_command_that_works(labelled, capsys):
    """The record was segments.json, without outputs."""
    (labelled / "segments.json").write_text('{"script": "analysis/segment.py", "inputs": {}}')
    np.save(labelled / "segments.npy", true_labels().astype(np.uint8))
    assert run_segment(labelled, "--n-regions", "3") == 2
    assert "--n-regions 3 --force" in capsys.readouterr().err
    assert run_segment(labelled, "--n-regions", "3", "--force") == 0
    assert run_segment(labelled, "--n-regions", "3") == 0


def test_the_old_name_of_an_option_works(labelled, capsys):
    assert run_segment(labelled, "--n-regions", "3", "--seeds", "2") == 0
    assert result(labelled)[3]["stability"]["halves"] == 2
    assert result(labelled)[3]["options"][-2:] == ["--n-halves", "2"]
    with pytest.raises(SystemExit):
        segment.run(["--help"])
    assert "--seeds" not in capsys.readouterr().out


def test_the_record_names_what_was_read(labelled):
    assert run_segment(labelled, "--truth", "--n-regions", "3", "--seed", "7") == 0
    record = result(labelled)[3]
    assert record["options"] == ["--no-plot", "--n-regions", "3", "--seed", "7", "--truth"]
    assert {*record["inputs"]} == {
        "embeddings-gene.pickle", "locs.csv", "radius.txt", "cnts.csv", "mask.png", "truth.npz",
    }  # fmt: skip
    for name, known in record["inputs"].items():
        assert known["sha256"] == disk.sha256(labelled / name)


def test_as_a_user(labelled, capsys):
    shutil.rmtree(labelled / "cnts-super")  # not needed, and no longer whole
    assert run_as_main("analysis/segment.py", "--directory", labelled, "--n-regions", 3) == 0
    assert "edited since HISTEX.py" not in capsys.readouterr().out
    assert sorted(p.name for p in labelled.glob("*seg*")) == OUTPUTS


def test_without_a_mask_and_an_image(labelled):
    (labelled / "mask.png").unlink()
    add_to_record(labelled, inputs={})
    (labelled / "Histology_rgb.npy").unlink()
    assert segment.run(["--directory", str(labelled), "--n-regions", "3"]) == 0
    assert agreement(result(labelled)[0], true_labels()) > 0.9


# ----- bad inputs -----
def change_counts(directory, change):
    table = pd.read_csv(directory / "cnts.csv", index_col=0, dtype={0: str}, keep_default_na=False)
    change(table).to_csv(directory / "cnts.csv")


BAD_INPUTS = {
    "no embedding": (lambda d: (d / "embeddings-gene.pickle").unlink(),
                     "embeddings-gene.pickle is missing"),
    "a text": (lambda d: (d / "embeddings-gene.pickle").write_text("x"), "is not a pickled numpy"),
    "no dict": (lambda d: (d / "embeddings-gene.pickle").write_bytes(pickle.dumps(np.ones(3))),
                "does not hold dict(cls="),
    "another key": (lambda d: (d / "embeddings-gene.pickle").write_bytes(
        pickle.dumps({"his": np.ones((2, *GRID))})), "does not hold dict(cls="),
    "whole numbers": (lambda d: (d / "embeddings-gene.pickle").write_bytes(
        pickle.dumps({"cls": np.ones((2, *GRID), int)})), "does not hold dict(cls="),
    "another size": (lambda d: write_embedding(d, np.ones((2, 9, 70))),
                     "holds maps of (9, 70); expected (56, 70), the grid of he.jpg"),
    "no dims": (lambda d: write_embedding(d, np.ones((0, *GRID))), "does not hold dict(cls="),
    "nothing": (lambda d: write_embedding(d, np.full((2, *GRID), np.nan)),
                "no superpixel in common"),
    "no mask": (lambda d: ((d / "mask.png").write_text("x"), add_to_record(d, inputs={})),
                "is not a readable image"),
    "no record": (lambda d: (d / "HISTEX.json").unlink(), "has no record HISTEX.json"),
    "stale": (lambda d: change_counts(d, lambda t: t + 1), "is out of date"),
    "no radius": (lambda d: (d / "radius.txt").write_text("-3"), "expected one number between"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(labelled, case, capsys):
    change, message = BAD_INPUTS[case]
    assert run_segment(labelled, "--n-regions", "3", "--n-halves", "1") == 0
    change(labelled)
    before = snapshot(labelled)
    capsys.readouterr()
    assert run_segment(labelled, "--n-regions", "4") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Run: " in error or "Name " in error or "Do not open" in error
    assert snapshot(labelled) == before


def test_latent_maps_of_another_grid_are_made_anew_by_their_own_script(labelled, capsys):
    """The mask fits the section: whoever makes it anew comes back to the same message."""
    write_embedding(labelled, np.ones((2, 9, 70)))
    assert run_segment(labelled) == 2
    *_, remedy = capsys.readouterr().err.splitlines()
    assert remedy.startswith("It is written by HISTEX.py. Run: python HISTEX.py --directory ")
    assert remedy.endswith("--force (this replaces your embeddings-gene.pickle)")


def test_stale_inputs_are_used_if_told_so(labelled, capsys):
    change_counts(labelled, lambda table: table + 1)
    assert run_segment(labelled, "--allow-stale", "--n-regions", "3") == 0
    assert "out of date" in capsys.readouterr().out


BAD_OPTIONS = {
    "more regions than superpixels": (["--n-regions", "99999"], "--n-regions is 99999; the tissue"),
    "a file": (
        ["--output", "cnts.csv"],
        "cnts.csv is a file; analysis/segment.py writes into a folder",
    ),
    "no truth": (["--truth"], "does not tell the true regions"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(labelled, case, capsys, monkeypatch):
    options, message = BAD_OPTIONS[case]
    monkeypatch.chdir(labelled)
    (labelled / "truth.npz").unlink()
    before = snapshot(labelled)
    assert run_segment(labelled, *options) == 2
    assert message in capsys.readouterr().err
    assert snapshot(labelled) == before


@pytest.mark.parametrize(
    "option",
    [("--n-regions", "0"), ("--smoothing-um", "-1"), ("--min-region-mm2", "nan"),
     ("--n-halves", "0"), ("--seed", "-1"), ("--method", "magic")],
)  # fmt: skip
def test_options_out_of_range(labelled, option, capsys):
    with pytest.raises(SystemExit):
        run_segment(labelled, *option)
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_true_regions_off_the_tissue(labelled, capsys):
    empty = np.where(true_labels() > 0, 0, 1)
    np.savez(labelled / "truth.npz", regions=empty, region_names=["", "slide"])
    assert run_segment(labelled, "--truth") == 2
    assert "has no true region on the tissue" in capsys.readouterr().err


def test_spots_on_a_line_have_no_interpolation(tmp_path, capsys):
    directory = write_section(tmp_path / "section L", true_labels(), np.random.default_rng(0))
    locs = pd.read_csv(directory / "locs.csv", index_col=0, dtype={0: str})
    locs["y"], locs["x"] = 450.0, 40.0 + 8 * np.arange(len(locs))
    locs.to_csv(directory / "locs.csv")
    assert run_segment(directory, "--allow-stale", "--n-regions", "3") == 0
    assert run_segment(directory, "--allow-stale", "--n-regions", "3", "--truth") == 2
    assert "lie on a line" in capsys.readouterr().err


def test_what_is_not_installed(labelled, capsys, monkeypatch):
    before = snapshot(labelled)
    monkeypatch.setitem(sys.modules, "graspologic_native", None)
    assert run_segment(labelled, "--method", "leiden") == 2
    assert "needs graspologic-native" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert segment.run(["--directory", str(labelled)]) == 2
    error = capsys.readouterr().err
    assert "The picture needs matplotlib" in error
    assert "--no-plot" in error
    assert snapshot(labelled) == before
    assert run_segment(labelled) == 0


def test_few_spots_give_no_markers(tmp_path, capsys):
    directory = write_section(tmp_path / "section F", true_labels(), np.random.default_rng(0))
    for name in ("locs.csv", "cnts.csv"):
        table = pd.read_csv(directory / name, index_col=0, dtype={0: str}, keep_default_na=False)
        table.sort_index().iloc[70:74].to_csv(directory / name)
    assert run_segment(directory, "--allow-stale", "--n-regions", "3") == 0
    assert "no markers of region 1, 2, 3: under 5 spots" in capsys.readouterr().out
    assert (directory / "segment-markers.csv").read_text() == ",".join(
        segment.MARKER_COLUMNS
    ) + "\n"
    assert RATES.shape == (3, len(GENES))
