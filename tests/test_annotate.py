"""analysis/annotate.py: scores and chance by enumeration, known sections, tables good and bad."""

import json
import shutil
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA, run_as_main, write_record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.stats import pearson3, skew
from test_evaluate import write_maps
from test_regions import snapshot

import utils
from analysis import annotate, regions
from analysis import markers as builtin

GRID, OFF = (24, 36), 3  # superpixels; columns off the tissue
REGIONS = ("", "nest", "Stroma", "fat")
MARKED, OTHERS = 8, 24  # genes of each region, and of none
GENES = [f"{name.upper()}{i}" for name in REGIONS[1:] for i in range(MARKED)]
GENES += [f"OTHER{i}" for i in range(OTHERS)]
NAMES = ["nest", "stroma", "fat"]
OUTPUTS = [
    "annotation.npy", "annotation-confidence.npy", "annotation-scores.npy", "annotation.csv",
    "annotation.png", "annotation-scores.png",
]  # fmt: skip


def true_regions():
    image = np.zeros(GRID, np.uint8)
    image[:, OFF:14], image[:, 14:27], image[:, 27:] = 1, 2, 3
    return image


@pytest.fixture(scope="module")
def _section(tmp_path_factory):
    """Three regions side by side, each with eight genes that are higher in it."""
    directory = tmp_path_factory.mktemp("annotate") / "section A"
    directory.mkdir()
    rng, region = np.random.default_rng(0), true_regions()
    maps = np.empty((*GRID, len(GENES)))
    for i in range(len(GENES)):
        own = i // MARKED + 1
        mean = np.where(region == own, 3.0, 0.6) if own <= 3 else np.full(GRID, 1.5)
        maps[..., i] = rng.gamma(6, mean / 6) * 10.0 ** rng.uniform(-1, 1)
    maps[:, :OFF] = np.nan
    write_maps(directory, maps, GENES)
    y, x = (a.ravel() for a in np.mgrid[2:24:5, OFF + 2 : 36 : 5])
    ids = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
    locs = pd.DataFrame({"x": (x + 0.5) * 16.0, "y": (y + 0.5) * 16.0}, index=ids)
    locs.to_csv(directory / "locs.csv")
    (directory / "radius.txt").write_text("24\n")
    counts = rng.poisson(np.nan_to_num(maps)[y, x] * 7)
    pd.DataFrame(counts, ids, GENES).to_csv(directory / "cnts.csv")
    np.savez(directory / "truth.npz", regions=region, region_names=np.array(REGIONS))
    Image.new("RGB", (8, 8)).save(directory / "he.jpg")
    size = [16 * side for side in GRID]
    write_record(directory, utils.CALIBRATION, [], ["he.jpg", "locs.csv", "radius.txt"], size=size)
    write_record(directory, utils.HISTEX, ["he.jpg"], ["cnts-super"])
    return directory


@pytest.fixture
def section(_section, tmp_path):
    return shutil.copytree(_section, tmp_path / "section A")


def write_markers(path, table=None, weights=None):
    table = table or {name: [f"{name.upper()}{i}" for i in range(MARKED)] for name in NAMES}
    rows = [(gene, label) for label, genes in table.items() for gene in genes]
    frame = pd.DataFrame(rows, columns=["gene", "label"])
    if weights is not None:
        frame["weight"] = weights
    frame.to_csv(path, index=False)
    return path


def run(directory, *options, table=None):
    markers = write_markers(directory / "markers.csv", table)
    return annotate.run(["--directory", str(directory), "--markers", str(markers), *options])


def record(directory):
    return json.loads((directory / "annotate.json").read_text())


def stack(values, shape=(1, -1)):
    """Images (rows, columns) of values (genes, superpixels) that ``scaled`` leaves as they are."""
    return [row.reshape(shape) for row in values]


@pytest.fixture
def unscaled(monkeypatch):
    monkeypatch.setattr(annotate, "scaled", lambda image, tissue, _: image[tissue])


# ----- scores -----
@settings(max_examples=50, deadline=None)
@given(
    counts=arrays(np.float32, st.tuples(st.integers(4, 9), st.integers(4, 9)),
                  elements=st.floats(0, 100, width=32)),
    times=st.sampled_from([0.01, 1, 300]),
)  # fmt: skip
def test_a_map_is_scaled_by_its_own_quantiles(counts, times):
    tissue = np.ones(counts.shape, bool)
    tissue[0, 0] = False
    values = annotate.scaled(counts, tissue, 0)
    inside = counts[tissue].astype(float)
    low, high = (np.quantile(np.sqrt(inside), q) for q in (0.05, 0.95))
    if high - low < 1e-3:  # about constant: nothing to compare
        assert values is None or np.isfinite(values).all()
        return
    expected = [min(max((c**0.5 - low) / (high - low), 0), 1) for c in inside]
    np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_allclose(annotate.scaled(counts * times, tissue, 0), values, atol=2e-3)


def test_a_constant_map_has_no_scale():
    tissue = np.ones((3, 4), bool)
    assert annotate.scaled(np.full((3, 4), 2.5), tissue, 0) is None
    assert annotate.scaled(np.zeros((3, 4)), tissue, 0) is None


def test_smoothing_comes_after_scaling_and_stays_within_the_tissue():
    rng = np.random.default_rng(0)
    image, tissue = rng.gamma(1, 2, (12, 15)), rng.random((12, 15)) < 0.8
    sharp = np.zeros(tissue.shape)
    sharp[tissue] = annotate.scaled(image, tissue, 0)
    expected = regions.smooth(sharp, tissue, 16.0)[tissue]
    np.testing.assert_allclose(annotate.scaled(image, tissue, 16.0), expected, atol=1e-6)
    image[~tissue] = np.nan
    np.testing.assert_allclose(annotate.scaled(image, tissue, 16.0), expected, atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [1, 1, 1], [1], [2, 1], [1, 1, -1], [3, -0.5, -1, 1]],
)
@pytest.mark.usefixtures("unscaled")
def test_chance_is_that_of_all_draws_of_genes(weights):
    """Every way to give the weights to genes, in turn, is a table of markers."""
    rng = np.random.default_rng(1)
    values = rng.random((6, 5)) + rng.random(5)  # genes, superpixels
    tissue = np.ones((1, 5), bool)
    draws = []
    for genes in permutations(range(6), len(weights)):
        table = np.zeros((1, 6))
        table[0, list(genes)] = weights
        found = annotate.annotate(stack(values), table, tissue, 0)
        draws.append((found.scores[0], found.confidence))
    scores, confidence = (np.array(part) for part in zip(*draws, strict=True))
    size = np.abs(weights).sum()
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-6)
    expected = pearson3.cdf(scores / scores.std(0), skew(scores, axis=0))
    np.testing.assert_allclose(confidence, expected, atol=1e-4)
    by_hand = sum(w * values[g] for g, w in zip(range(len(weights)), weights, strict=True))
    by_hand = (by_hand - sum(weights) * values.mean(0)) / size
    np.testing.assert_allclose(scores[0], by_hand, atol=1e-6)


@pytest.mark.usefixtures("unscaled")
def test_the_winner_and_its_confidence_by_drawing():
    rng = np.random.default_rng(2)
    values, tissue = rng.random((30, 40)), np.ones((1, 40), bool)
    weights = np.zeros((3, 30))
    weights[0, :4], weights[1, 3:9], weights[2, [10, 12]] = 1, 1, (1, 2)
    found = annotate.annotate(stack(values), weights, tissue, 0)
    for at in range(40):
        x = values[:, at]
        scores = [np.average(x, weights=w) - x.mean() for w in weights]
        best = int(np.argmax(scores))
        assert found.best[at] == best
        np.testing.assert_allclose(found.scores[:, at], scores, atol=1e-6)
        drawn = np.array([rng.permutation(x) for _ in range(4000)]) @ weights[best]
        drawn = drawn / weights[best].sum() - x.mean()
        below = pearson3.cdf(scores[best] / drawn.std(), skew(drawn)) ** 3
        assert found.confidence[at] == pytest.approx(below, abs=0.03)


@pytest.mark.usefixtures("unscaled")
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_markers_without_meaning_name_about_the_level(level):
    """Though half of the genes go together and the values are skewed, as those of maps are."""
    rng = np.random.default_rng(3)
    values = rng.random((96, 60))
    values[:48] = (values[:48] + 2 * rng.random((6, 60)).repeat(8, 0)) / 3
    images, tissue, named = stack(values**4), np.ones((1, 60), bool), []
    for _ in range(200):
        weights = np.zeros((5, len(values)))
        for row, k in zip(weights, (3, 5, 6, 8, 10), strict=True):
            row[rng.choice(len(values), k, replace=False)] = 1
        found = annotate.annotate(images, weights, tissue, 0)
        named.append((annotate.label_image(found, tissue, level) <= 5).mean())
    assert 0.6 * level < np.mean(named) < 1.1 * level  # by the normal distribution, 1.3 to 1.9
    weights = np.kron(np.eye(5, 12), np.ones(8))  # those that go together
    found = annotate.annotate(images, weights, tissue, 0)
    assert (annotate.label_image(found, tissue, level) <= 5).mean() > 0.3


@pytest.mark.usefixtures("unscaled")
def test_genes_that_are_all_alike_name_nothing():
    values, tissue = np.ones((6, 4)), np.ones((1, 4), bool)
    found = annotate.annotate(stack(values), np.eye(2, 6), tissue, 0)
    assert (annotate.label_image(found, tissue, 0.05) == 3).all()
    np.testing.assert_allclose(found.confidence, 0.25)
    assert (found.best == 0).all()  # of equal scores, the first label's


def test_labels_are_numbered_from_one_and_the_last_is_none():
    tissue = np.array([[True, False, True, True]])
    found = annotate.Annotation(np.array([1, 0, 1]), np.array([0.96, 0.95, 0.94]), np.zeros((2, 3)))
    assert annotate.label_image(found, tissue, 0.05).tolist() == [[2, 0, 1, 3]]
    assert annotate.label_image(found, tissue, 1).tolist() == [[2, 0, 1, 2]]
    assert annotate.label_image(found, tissue, 0.05).dtype == np.uint8


@pytest.mark.usefixtures("unscaled")
def test_marker_correlations_are_those_of_pairs():
    rng = np.random.default_rng(4)
    values = rng.random((7, 50)) * np.arange(1, 8)[:, None] + rng.random(50)
    weights = np.zeros((3, 7))
    weights[0, :3], weights[1, 2:4], weights[2, 5] = 1, (1, -2), 1
    sums = annotate.add_up(stack(values), weights, np.ones((1, 50), bool), 0)
    found, overall = annotate.marker_correlations(sums, weights)

    def by_pairs(row):
        covariance = np.cov(values, ddof=0)
        top = bottom = 0.0
        for i in np.flatnonzero(row):
            for j in np.flatnonzero(row):
                if i != j:
                    top += row[i] * row[j] * covariance[i, j]
                    bottom += abs(row[i] * row[j]) * values[i].std() * values[j].std()
        return top / bottom

    assert found[:2] == pytest.approx([by_pairs(weights[0]), by_pairs(weights[1])], abs=1e-5)
    assert np.isnan(found[2])
    assert overall == pytest.approx(by_pairs(np.ones(7)), abs=1e-5)


# ----- a known section -----
def test_a_known_section_is_named(section, capsys):
    assert run(section) == 0
    labels, true = np.load(section / "annotation.npy"), true_regions()
    assert labels.dtype == np.uint8
    assert labels.shape == GRID
    assert (labels[true == 0] == 0).all()
    assert (labels[true > 0] > 0).all()
    named = (true > 0) & (labels < 4)
    assert named.sum() > 0.8 * (true > 0).sum()
    assert (labels == true)[named].mean() > 0.97
    table = pd.read_csv(section / "annotation.csv")
    assert table["name"].tolist() == [*NAMES, "unclassified"]
    assert table["label"].tolist() == [1, 2, 3, 4]
    assert table["superpixels"].tolist() == [(labels == i).sum() for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(table["mm2"], table["superpixels"] * 64e-6, rtol=1e-3)
    assert table["markers"].tolist() == [8, 8, 8, 0]
    assert (table["marker_correlation"][:3] > 0.5).all()
    assert table["colour"].is_unique
    scores = np.load(section / "annotation-scores.npy")
    confidence = np.load(section / "annotation-confidence.npy")
    assert scores.dtype == confidence.dtype == np.float16
    assert scores.shape == (3, *GRID)
    assert (np.isnan(scores) == (true == 0)).all()
    assert (np.isnan(confidence) == (true == 0)).all()
    assert (confidence[named] >= 0.949).all()
    assert (confidence[labels == 4] <= 0.951).all()
    best = np.where(true > 0, np.nan_to_num(scores, nan=-1).argmax(0) + 1, 0)
    assert (best == labels)[named].mean() > 0.99  # but for the rounding of float16
    facts = record(section)
    assert facts["unclassified"] == pytest.approx((labels == 4).sum() / (true > 0).sum(), abs=1e-4)
    assert {"cnts-super", "markers.csv"} <= set(facts["inputs"])
    for name in ("annotation.png", "annotation-scores.png"):
        with Image.open(section / name) as picture:
            assert min(picture.size) > 300
    assert "nest" in capsys.readouterr().out


def test_mixed_up_markers_name_little(section):
    mixed = {name: [f"{other.upper()}{i}" for i, other in enumerate(NAMES)] for name in NAMES}
    assert run(section, "--no-plot", table=mixed) == 0
    assert record(section)["unclassified"] > 0.9
    assert run(section, "--no-plot", table={"a": [f"OTHER{i}" for i in range(4)]}) == 0
    assert record(section)["unclassified"] > 0.85


def test_level_one_names_everything(section):
    assert run(section, "--no-plot", "--chance-share", "1") == 0
    labels = np.load(section / "annotation.npy")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert (labels == true_regions()).mean() > 0.93


def test_weights_count(section):
    """A label that must lack the nest's genes is found less in the nest, and as much elsewhere."""
    table, shares = {"any": ["NEST0", "STROMA0", "NEST1", "STROMA1"], "fat": ["FAT0", "FAT1"]}, []
    for weight in (1, -1):
        markers = write_markers(section / "m.csv", table, [weight, 1, weight, 1, 1, 1])
        options = ["--markers", str(markers), "--chance-share", "1", "--no-plot"]
        assert annotate.run(["--directory", str(section), *options]) == 0
        labels, true = np.load(section / "annotation.npy"), true_regions()
        shares.append([(labels[true == i] == 1).mean() for i in (1, 2)])
    (nest, stroma), (without_nest, still_stroma) = shares
    assert nest > 0.9 > 0.7 > without_nest
    assert min(stroma, still_stroma) > 0.9


def test_output_folder_and_no_plot(section, tmp_path):
    before = sorted(path.name for path in section.iterdir())
    assert run(section, "--output", str(tmp_path / "a" / "b"), "--no-plot") == 0
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(
        [name for name in OUTPUTS if not name.endswith(".png")] + ["annotate.json"]
    )
    assert sorted(p.name for p in section.iterdir()) == sorted([*before, "markers.csv"])


def test_the_mask_is_obeyed(section):
    mask = np.full(GRID, 255, np.uint8)
    mask[:, 20:] = 0
    Image.fromarray(mask).save(section / "mask.png")
    assert run(section, "--no-plot") == 0
    labels = np.load(section / "annotation.npy")
    assert (labels[:, 20:] == 0).all()
    assert (labels[:, OFF:20] > 0).all()


def test_the_same_run_gives_the_same_bytes_and_an_error_changes_nothing(section, capsys):
    assert run(section) == 0
    first = {name: (section / name).read_bytes() for name in OUTPUTS}
    assert run(section, "--force") == 0
    assert {name: (section / name).read_bytes() for name in OUTPUTS} == first
    assert run(section, table={"a": ["NOTHERE", "NEST0"], "b": ["NOR"]}) == 2
    assert {name: (section / name).read_bytes() for name in OUTPUTS} == first
    assert not list(section.glob(".*partial*"))
    capsys.readouterr()


@pytest.mark.parametrize("name", [*OUTPUTS, "annotation-truth.csv"])
def test_files_of_the_user_are_kept(section, name, capsys):
    (section / name).write_text("mine")
    write_markers(section / "markers.csv")
    before = snapshot(section)
    assert run(section, "--truth") == 2
    error = capsys.readouterr().err
    assert f"{section / name} was not written by analysis/annotate.py, which would" in error
    assert error.endswith("--truth --force\n")
    assert snapshot(section) == before
    if name == "annotation.npy":
        assert run(section, "--truth", "--force") == 0
        made = (section / name).read_bytes()
        np.save(section / name, 3 - np.load(section / name))
        edited = snapshot(section)
        capsys.readouterr()
        assert run(section, "--truth") == 0
        assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
        assert snapshot(section) == edited
        assert run(section, "--truth", "--chance-share", "0.5") == 2
        error = capsys.readouterr().err
        assert f"{section / name} was edited by hand, and other options were given" in error
        assert error.endswith("--truth --force\n")
        assert snapshot(section) == edited
        assert run(section, "--truth", "--force") == 0
        assert (section / name).read_bytes() == made
    if name == "annotation-truth.csv":  # without the option it is not in the way
        assert run(section, "--no-plot") == 0
        assert (section / name).read_text() == "mine"


def test_what_belongs_to_an_earlier_run_goes_with_it(section):
    assert run(section, "--truth") == 0
    assert run(section, "--no-plot") == 0
    for name in ("annotation-truth.csv", "annotation.png", "annotation-scores.png"):
        assert not (section / name).exists()
    assert run(section, "--truth") == 0
    assert {*record(section)["outputs"]} == {*OUTPUTS, "annotation-truth.csv"}


def test_the_old_name_of_an_option_works(section):
    assert run(section, "--no-plot", "--level", "1") == 0
    assert record(section)["chance share"] == 1
    assert record(section)["options"][-2:] == ["--chance-share", "1.0"]


def test_as_a_user(section, capsys):
    markers = write_markers(section / "markers.csv")
    options = ("--directory", section, "--markers")
    assert run_as_main("analysis/annotate.py", *options, markers, "--truth") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "truth:\n  maps: n 792, ARI" in said.out
    assert run_as_main("analysis/annotate.py", *options, "nowhere.csv") == 2
    assert capsys.readouterr().err.startswith("error: nowhere.csv cannot be read as text")


# ----- tables of markers -----
@pytest.mark.parametrize(
    "text",
    [
        "gene,label\nA,x\nB,y y\n",
        "﻿label\tgene\nx\tA\ny y\tB\n",
        'label;notes;gene\nx;"a;b";A\n\n y y ;; B \n',
    ],
)
def test_tables_in_many_hands(tmp_path, text):
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    markers = annotate.read_markers(tmp_path / "m.csv")
    assert markers.to_dict("list") == {
        "gene": ["A", "B"], "label": ["x", "y y"], "weight": [1.0, 1.0],
    }  # fmt: skip


def test_r_leaves_out_the_name_of_the_first_column(tmp_path):
    (tmp_path / "m.csv").write_text('"gene","label"\n"1","A","x"\n"2","B","y"\n')
    assert annotate.read_markers(tmp_path / "m.csv")["gene"].tolist() == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no row below its header."),
        ("gene,label\n\n", "holds no row below its header."),
        ("gene,cell\nA,x\n", "has the columns gene, cell. It lacks label."),
        ("gene,label\nA,x\nB\n", "has 1 fields in line 3; its header has 2."),
        ("gene,label\nA,x\n\n,x\n", "lacks a gene or a label in line 4."),
        ("gene,label\nA,\n", "lacks a gene or a label in line 2."),
        ("gene,label\nA,x\nA,y\nA,x\n", "gives x the gene A in lines 2 and 4."),
        (
            "gene,label,weight\nA,x,0\n",
            "has the weight '0' in line 2; it must be a number and not 0.",
        ),
        (
            "gene,label,weight\nA,x,\n",
            "has the weight '' in line 2; it must be a number and not 0.",
        ),
        (
            "gene,label,weight\nA,x,inf\n",
            "has the weight 'inf' in line 2; it must be a number and not 0.",
        ),
        (
            "gene,label,weight\nA,x,nan\n",
            "has the weight 'nan' in line 2; it must be a number and not 0.",
        ),
        (
            "gene,label\nA,T cell\nB,t Cell\n",
            "has labels that differ in capitals alone, or are the name 'unclassified': t cell.",
        ),
        (
            "gene,label\nA,Unclassified\n",
            "has labels that differ in capitals alone, or are the name 'unclassified': "
            "unclassified.",
        ),
        (
            "gene,label,weight\nA,x,1\nB,y,-1\n",
            "has no gene that marks y (with a weight above 0).",
        ),
        ('gene,label\n"A,x\n', "is not a table: line 2: unexpected end of data."),
        (
            "gene,label\n" + "".join(f"G{i},L{i}\n" for i in range(255)),
            "has 255 labels; expected 254 at most.",
        ),
    ],
)
def test_bad_tables_of_markers(tmp_path, text, problem):
    path = tmp_path / "m.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(utils.StageError) as error:
        annotate.read_markers(path)
    assert str(error.value).splitlines()[0] == f"{path} {problem}"


def test_bytes_are_no_table(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"gene,label\n\xff\xfe,x\n")
    with pytest.raises(utils.StageError, match="cannot be read as text"):
        annotate.read_markers(tmp_path / "m.csv")


# ----- genes that are not there -----
def test_absent_genes_are_named_with_other_spellings(section, capsys):
    table = {"nest": ["NEST0", "Nest1", "GONE"], "fat": ["FAT0", "FAT1", "GONE"], "s": ["STROMA0"]}
    assert run(section, "--no-plot", table=table) == 0
    out = capsys.readouterr().out
    assert (
        "warning: 2 of 6 markers have no map and are left out: Nest1, GONE. With other capitals, "
        "there are Nest1 as NEST1\n" in out
    )
    assert "warning: a single marker seldom exceeds chance; these labels have one: nest, s\n" in out
    assert pd.read_csv(section / "annotation.csv")["markers"].tolist() == [1, 2, 1, 0]
    assert len(record(section)["warnings"]) == 2


def test_a_label_without_any_gene_is_an_error(section, capsys):
    assert run(section, table={"nest": ["NEST0"], "b": ["GONE"], "c": ["GONE", "nest0"]}) == 2
    error = capsys.readouterr().err
    assert "has, among the genes with a map, no gene that marks b, c (with a weight" in error
    assert "gene-names.txt" in error
    assert not (section / "annotation.npy").exists()


def change_map(section, gene, image):
    index = pd.read_csv(section / "cnts-super" / "index.csv").set_index("gene")["file"]
    path = section / "cnts-super" / index[gene]
    path.write_bytes(__import__("pickle").dumps(image.astype(np.float32)))
    write_record(section, utils.HISTEX, ["he.jpg"], ["cnts-super"])


def test_constant_maps_are_left_out(section, capsys):
    flat = np.where(true_regions() > 0, 1.5, np.nan)
    change_map(section, "FAT2", flat)
    assert run(section, "--no-plot") == 0
    assert "left out, since their maps are the same everywhere: FAT2\n" in capsys.readouterr().out
    assert pd.read_csv(section / "annotation.csv")["markers"].tolist() == [8, 8, 7, 0]
    assert run(section, "--no-plot", table={"a": ["NEST0"], "b": ["FAT2"]}) == 2
    assert "among the genes whose map varies, no gene that marks b" in capsys.readouterr().err


def test_a_label_of_all_genes_has_nothing_to_compare_with(section, capsys):
    assert run(section, "--no-plot", table={"all": GENES, "nest": ["NEST0"]}) == 2
    error = capsys.readouterr().err
    assert f"gives all all {len(GENES)} genes whose map varies: there is no other gene" in error


@pytest.mark.parametrize("bad", ["hole", "negative", "shape"])
def test_bad_maps(section, capsys, bad):
    image = np.where(true_regions() > 0, 1.0, np.nan)
    image[3, 20] = np.nan if bad == "hole" else -1
    change_map(section, "FAT1", image[:-1] if bad == "shape" else image)
    assert run(section, "--no-plot") == 2
    assert "with a count of 0 or more for every superpixel" in capsys.readouterr().err
    assert not (section / "annotation.npy").exists()


def test_maps_out_of_date(section, capsys):
    Image.new("RGB", (9, 9)).save(section / "he.jpg")
    assert run(section, "--no-plot") == 2
    assert "out of date" in capsys.readouterr().err
    assert run(section, "--no-plot", "--allow-stale") == 0


@pytest.mark.parametrize("level", ["0", "1.1", "-1", "nan", "x"])
def test_bad_levels(section, capsys, level):
    with pytest.raises(SystemExit):
        run(section, "--chance-share", level)
    assert "argument --chance-share" in capsys.readouterr().err


# ----- labels of spots -----
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the tables of her2st are not at hand")
def test_her2st_labels_fit_the_spots_of_the_section():
    folder = REAL_DATA / "formats" / "legacy_st_her2"
    places = pd.read_csv(folder / "A1_selection.tsv", sep="\t")
    spots = pd.Index([f"{x}x{y}" for x, y in places[["x", "y"]].to_numpy(int)])
    labels, others = annotate.read_spot_labels(folder / "A1_labeled_coordinates.tsv", spots)
    assert others == 0
    assert len(labels) == len(spots) == labels.index.nunique()
    assert labels.value_counts()["invasive cancer"] == 284
    place = places[places["new_x"].sub(9.02).abs().lt(0.01) & places["new_y"].round().eq(21)]
    assert labels[f"{place['x'].item()}x{place['y'].item()}"] == "invasive cancer"


SPOTS = pd.Index(["10x3", "11x3", "12x4"])


@pytest.mark.parametrize(
    "text",
    [
        "spot,label\n11x3,b\n10x3,a\n99x9,c\n12x4,\n",
        ",label,who\n11x3,b,me\n10x3,a,me\n99x9,c,you\n",
        "Row.names\tx\ty\tpixel_x\tlabel\np\t11.02\t2.97\t5\tb\nq\t9.6\t3.4\t5\ta\nr\t99\t9\t5\tc\n",
        '"x";"y";"label"\n"11.02";"2.97";"b"\n"9.6";"3.4";"a"\n"99";"9";"c"\n',
    ],
)
def test_spot_labels_of_several_kinds(tmp_path, text):
    (tmp_path / "l.csv").write_text(text)
    labels, others = annotate.read_spot_labels(tmp_path / "l.csv", SPOTS)
    assert labels.to_dict() == {"11x3": "b", "10x3": "a"}
    assert others == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("spot,name\n10x3,a\n", "has the columns spot, name. It lacks label."),
        ("spot,label\nA,a\nB,b\n", "labels the spots A, B; locs.csv has 10x3, 11x3, 12x4."),
        ("spot,label\n10x3,a\n10x3,b\n", "labels the spots 10x3 more than once."),
        ("spot,label\n", "holds no row below its header."),
        ("n,x,y,label\n1,ten,3,a\n", "holds 'ten' for x in line 2; expected a number"),
    ],
)
def test_bad_labels_of_spots(tmp_path, text, problem):
    path = tmp_path / "l.csv"
    path.write_text(text)
    with pytest.raises(utils.StageError) as error:
        annotate.read_spot_labels(path, SPOTS)
    assert str(error.value).startswith(f"{path} {problem}")


def test_agreement_by_hand():
    given = np.array(["Nest", "nest", "fat", "fat", "fat", "bone"])
    found = np.array([1, 2, 3, 3, 2, 1])  # of nest, fat, unclassified
    facts = annotate.agreement(given, found, ["nest", "fat"])
    assert facts["n"] == 6
    assert facts["of the labels"] == 5
    assert facts["accuracy"] == pytest.approx(2 / 5)
    assert facts["accuracy of the classified"] == pytest.approx(2 / 3, abs=1e-4)
    assert facts["unclassified"] == pytest.approx(2 / 5)
    assert facts["balanced accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2, abs=1e-4)
    assert facts["ARI"] == pytest.approx(regions.adjusted_rand(given, found), abs=1e-4)
    table = annotate.contingency(given, found, ["nest", "fat"])
    assert table.set_index("given").loc["fat"].to_dict() == {
        "nest": 0, "fat": 1, "unclassified": 2,
    }  # fmt: skip
    none = annotate.agreement(np.array(["a", "b"]), np.array([1, 2]), ["nest", "fat"])
    assert none == {"n": 2, "ARI": 1.0, "of the labels": 0}
    unsure = annotate.agreement(np.array(["nest"]), np.array([3]), ["nest", "fat"])
    assert unsure["accuracy"] == 0
    assert unsure["accuracy of the classified"] is None


def test_labels_of_spots_are_compared(section, capsys):
    locs = pd.read_csv(section / "locs.csv", index_col=0)
    region = true_regions()[(locs["y"] // 16).astype(int), (locs["x"] // 16).astype(int)]
    labels = pd.DataFrame({"label": np.array(REGIONS)[region]}, index=locs.index)
    labels.loc["elsewhere"] = "fat"
    labels.to_csv(section / "lbl.csv")
    assert run(section, "--no-plot", "--spot-labels", str(section / "lbl.csv")) == 0
    out = capsys.readouterr().out
    assert "1 labels are of spots that are not in locs.csv" in out
    facts = record(section)["spots"]
    assert facts["n"] == facts["of the labels"] == len(locs)
    assert facts["accuracy"] > 0.9
    assert facts["ARI"] > 0.8
    table = pd.read_csv(section / "annotation-spots.csv", index_col=0)
    assert table.columns.tolist() == [*NAMES, "unclassified"]
    assert table.sum(axis=1).to_dict() == labels["label"][:-1].value_counts().to_dict()
    assert "lbl.csv" in record(section)["inputs"]


def test_labels_of_spots_off_the_tissue(section, capsys):
    mask = np.zeros(GRID, np.uint8)
    mask[0, 4:] = 255
    Image.fromarray(mask).save(section / "mask.png")
    locs = pd.read_csv(section / "locs.csv", index_col=0)
    last = locs.index[locs["y"].argmax()]
    (section / "l.csv").write_text(f"spot,label\n{last},a\n")
    assert run(section, "--no-plot", "--spot-labels", str(section / "l.csv")) == 2
    assert "labels no spot on the tissue." in capsys.readouterr().err


# ----- truth -----
def test_truth_is_compared_beside_interpolated_spots(section):
    assert run(section, "--no-plot", "--truth", "--chance-share", "1") == 0
    facts, true = record(section)["truth"], true_regions()
    maps, linear = facts["maps"], facts["interpolated spots"]
    labels = np.load(section / "annotation.npy")
    assert maps["n"] == maps["of the labels"] == (true > 0).sum()
    assert maps["accuracy"] == pytest.approx((labels == true)[true > 0].mean(), abs=1e-4)
    assert maps["accuracy"] > linear["accuracy"] > 0.6
    table = pd.read_csv(section / "annotation-truth.csv")
    assert table["method"].tolist() == ["maps"] * 3 + ["interpolated spots"] * 3
    right = table[(table["method"] == "maps") & (table["given"] == "Stroma")]["stroma"]
    assert right.tolist() == [((labels == 2) & (true == 2)).sum()]
    assert table[[*NAMES, "unclassified"]].to_numpy().sum() == 2 * (true > 0).sum()


def test_every_name_has_a_panel_and_no_other_panel_is_drawn():
    names, scores = list("abcde"), np.ones((5, 4, 4), np.float16)
    axes = annotate.draw_scores(scores, names, [["G"]] * 5).axes
    shown = [ax.get_title().split("\n")[0] for ax in axes if ax.axison and ax.get_title()]
    assert shown == names
    assert sum(not ax.axison for ax in axes) == 3


def test_interpolation_is_that_of_segment(section):
    stage = utils.Stage(annotate.SCRIPT, annotate.build_parser().parse_args(
        ["--directory", str(section), "--markers", "x"]))  # fmt: skip
    tissue = true_regions() > 0
    image = next(iter(annotate.interpolated_maps(stage, ["FAT1"], tissue)))
    locs = pd.read_csv(section / "locs.csv", index_col=0)
    counts = pd.read_csv(section / "cnts.csv", index_col=0)["FAT1"]
    at = (locs["y"] // 16).astype(int), (locs["x"] // 16).astype(int)
    np.testing.assert_allclose(image[at], counts)
    assert image.min() >= counts.min()


def test_spots_on_a_line_have_no_interpolation(section, capsys):
    locs = pd.read_csv(section / "locs.csv", index_col=0)
    locs["y"] = 100.0
    locs["x"] = np.linspace(100, 500, len(locs))
    locs.to_csv(section / "locs.csv")
    assert run(section, "--no-plot", "--truth") == 2
    error = capsys.readouterr().err
    assert "locs.csv has spots that lie on a line" in error
    assert "Leave out --truth." in error
    assert not (section / "annotation.npy").exists()


def test_truth_without_the_same_names(section, capsys):
    table = {"a": ["NEST0", "NEST1"], "b": ["FAT0", "FAT1"]}
    assert run(section, "--no-plot", "--truth", table=table) == 2
    assert "is the name of a true region: Stroma, fat, nest." in capsys.readouterr().err


# ----- markers that HISTEX brings, and advice -----
def test_every_marker_that_comes_along_has_a_source():
    rows = builtin.rows_of()
    assert {"breast", "kidney", "pancreas", "brain", "lung", "liver", "colon"} <= {
        *builtin.tissues()
    }
    table = pd.DataFrame(rows)
    assert (table.map(str.strip) == table).all().all()
    assert not table.duplicated(["tissue", "label", "gene"]).any()
    assert table["gene"].str.fullmatch("[A-Z0-9]+").all()
    assert table["source"].str.contains(r" et al\. 20\d\d, .* \d+:D?\d+$").all()
    assert table.groupby(["tissue", "label"]).size().min() >= 2


def rename_genes(section, names):
    index = pd.read_csv(section / "cnts-super" / "index.csv")
    index["gene"] = index["gene"].replace(names)
    index.to_csv(section / "cnts-super" / "index.csv", index=False)


def test_markers_of_a_tissue_are_found_whatever_the_capitals(section, capsys):
    own = {"NEST0": "Epcam", "NEST1": "Krt8", "NEST2": "KRT18", "NEST3": "KRT19"}
    own |= {f"STROMA{i}": gene for i, gene in enumerate(("COL1A1", "COL1A2", "DCN", "LUM"))}
    rename_genes(section, own)
    options = ["--tissue", "breast", "--chance-share", "1", "--no-plot"]
    assert annotate.run(["--directory", str(section), *options]) == 0
    shown = capsys.readouterr().out
    assert "none of the markers of these labels has a map: basal epithelium, " in shown
    table = pd.read_csv(section / "annotation.csv")
    assert table["name"].tolist() == ["luminal epithelium", "fibroblast", "unclassified"]
    labels, truth = np.load(section / "annotation.npy"), true_regions()
    assert (labels[truth == 1] == 1).mean() > 0.9
    assert (labels[truth == 2] == 2).mean() > 0.9
    record = json.loads((section / "annotate.json").read_text())
    assert any("Nature Genetics 53:1334" in text for text in record["sources of markers"])
    assert str(builtin.TABLE) in record["inputs"]


def test_a_tissue_without_any_marker_is_refused(section, capsys):
    assert annotate.run(["--directory", str(section), "--tissue", "kidney"]) == 2
    assert "none of them is among the 48 genes with a map" in capsys.readouterr().err


def test_advice_comes_where_most_is_unclassified(section, tmp_path, capsys):
    markers = write_markers(tmp_path / "m.csv", {"nest": ["NEST0", "NEST1"], "fat": ["FAT0"]})
    options = ["--directory", str(section), "--markers", str(markers), "--no-plot"]
    assert annotate.run([*options, "--chance-share", "0.001"]) == 0
    shown = capsys.readouterr().out
    assert " of the tissue is unclassified. What to try:" in shown
    assert "labels that have fewer than 3: nest, fat" in shown
    assert "--chance-share 0.004" in shown
    assert "--smoothing-um 16" in shown
    assert annotate.run([*options, "--chance-share", "1"]) == 0
    assert "What to try" not in capsys.readouterr().out


@pytest.mark.parametrize(("chance", "centre"), [(0.05, 0.95), (1, None)])
def test_the_colours_of_confidence_part_at_its_threshold(section, chance, centre):
    parser = annotate.build_parser()
    options = ["--directory", str(section), "--markers", "m.csv", "--chance-share", str(chance)]
    stage = utils.Stage(annotate.SCRIPT, parser.parse_args(options))
    labels = true_regions()
    figure = annotate.draw_labels(stage, labels, np.where(labels, 0.5, np.nan), ["a", "b"])
    (image,) = figure.axes[-2].images
    assert getattr(image.norm, "vcenter", None) == (None if centre is None else 1 - chance)
    if centre:
        assert centre in figure.axes[-1].get_yticks()
