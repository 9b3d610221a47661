"""analysis/regions.py: labels against loops, and the synthetic section of segment and patterns."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_evaluate import write_maps

import utils
from analysis import files, regions
from analysis.spots import disc_weights
from reading import cli
from writing import disk

GRID = (56, 70)  # superpixels: whole tiles
PITCH, RADIUS = 5.0, 1.8  # superpixels
GENES = ["NA", "A", "B,1", "nan", "C", "1e5"]  # names that tables like to mistake
RATES = np.array(  # counts per spot of the genes in regions 1, 2, 3
    [[40, 5, 5, 10, 10, 20], [5, 40, 5, 10, 10, 20], [5, 5, 40, 10, 10, 20]], float
)
NAMES = ["", "left", "right", "disc"]


# ----- a finished section, without the five scripts -----
def true_labels(grid=GRID):
    """Left, right and a disc between them: 1, 2, 3; 0 outside of an ellipse."""
    row, column = np.mgrid[: grid[0], : grid[1]] + 0.5
    y, x = row / grid[0] - 0.5, column / grid[1] - 0.5
    labels = np.where(x < 0.1, 1, 2)
    labels[(y * grid[0]) ** 2 + (x * grid[1] - 7) ** 2 < (0.2 * grid[1]) ** 2] = 3
    labels[y**2 + x**2 > 0.48**2] = 0
    return labels


def lattice(grid=GRID, pitch=PITCH):
    """Spot centres (N, 2), row and column in superpixels, hexagonal."""
    rows = np.arange(3.1, grid[0] - 3, pitch * np.sqrt(3) / 2)
    starts = [3 + i % 2 * pitch / 2 for i in range(len(rows))]
    lines = [np.arange(start, grid[1] - 2, pitch) for start in starts]
    return np.array([(y, x) for y, line in zip(rows, lines, strict=True) for x in line])


def write_section(directory, labels, rng, maps=None, counts=None, genes=GENES, held_out_r=None):
    """Files of a finished sample whose regions are ``labels``; spots on the tissue are held out.

    ``maps`` (rows, columns, genes) are expected counts per superpixel, ``counts`` (spots, genes)
    those of the spots; without them both follow RATES.
    """
    directory.mkdir(parents=True)
    tissue, centres = labels > 0, lattice(labels.shape)
    discs = disc_weights(centres, RADIUS, labels.shape)
    if maps is None:
        maps = np.vstack([np.zeros(RATES.shape[1]), RATES])[labels] / (np.pi * RADIUS**2)
    if counts is None:
        counts = rng.poisson(discs @ maps.reshape(-1, maps.shape[2]))
    maps = np.where(tissue[..., None], maps, np.nan)
    Image.new("RGB", (labels.shape[1] * 16, labels.shape[0] * 16)).save(directory / "he.jpg")
    ids = [f"{i:03d}" for i in range(len(centres))]  # numbers that must stay text
    pd.DataFrame(centres[:, ::-1] * 16, ids, ["x", "y"]).to_csv(directory / "locs.csv")
    (directory / "radius.txt").write_text(f"{RADIUS * 16}\n")
    pd.DataFrame(counts, ids, genes).iloc[::-1].to_csv(directory / "cnts.csv")
    Image.fromarray(tissue.astype(np.uint8) * 255).save(directory / "mask.png")
    write_maps(directory, maps, genes)
    centre = rng.normal(0, 1, (4, 6))
    embedding = centre[labels] + rng.normal(0, 0.2, (*labels.shape, 6))
    embedding = np.where(tissue[..., None], embedding, np.nan).transpose(2, 0, 1)
    with (directory / "embeddings-gene.pickle").open("wb") as file:
        pickle.dump({"cls": np.array(embedding, np.float32, order="C")}, file, protocol=5)
    r = np.linspace(0.9, -0.1, len(genes)) if held_out_r is None else held_out_r
    pd.DataFrame({"gene": genes, "held_out_r": r}).to_csv(directory / "held-out-r.csv", index=False)
    np.save(directory / "Histology_rgb.npy", np.full((*labels.shape, 3), 200, np.uint8))
    np.savez(directory / "truth.npz", regions=labels.astype(np.uint8), region_names=NAMES)
    size = [16 * side for side in labels.shape]
    write_record(directory, utils.CALIBRATION, [], ["he.jpg", "locs.csv", "radius.txt"], size=size)
    write_record(directory, utils.EXTRACTOR, ["he.jpg"], ["Histology_rgb.npy"])
    outputs = ["cnts-super", "embeddings-gene.pickle", "held-out-r.csv"]
    write_record(directory, utils.HISTEX, ["he.jpg", "mask.png", "cnts.csv"], outputs)
    share = discs @ tissue.ravel() / (np.pi * RADIUS**2)
    held_out = [ids[i] for i in np.flatnonzero(share > 0.3)[::2]]
    add_to_record(directory, held_out_spots=held_out)
    return directory


def add_to_record(directory, **facts):
    path = directory / "HISTEX.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def snapshot(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def stage_of(directory, **arguments):
    arguments = {"allow_stale": False, "force": False} | arguments
    return utils.Stage("analysis/x.py", argparse.Namespace(directory=directory, **arguments))


# ----- smoothing -----
def test_smoothing_is_the_gaussian_mean_over_the_tissue():
    """A direct sum over all superpixels; what lies outside the tissue has no say."""
    rng = np.random.default_rng(0)
    image, tissue = rng.normal(3, 1, (17, 23)), rng.random((17, 23)) < 0.7
    sigma = 1.3  # superpixels
    places = np.argwhere(tissue)
    expected = np.zeros(image.shape)
    for place in places:
        weight = np.exp(-((places - place) ** 2).sum(1) / (2 * sigma**2))
        expected[tuple(place)] = weight @ image[tissue] / weight.sum()
    image[~tissue] = np.nan
    found = regions.smooth(image, tissue, sigma * utils.SUPERPIXEL_UM)
    np.testing.assert_allclose(found, expected, atol=4e-3)
    assert (found[~tissue] == 0).all()


@pytest.mark.parametrize("um", [0, 0.5, 16, 500])
def test_smoothing_leaves_a_constant_alone(um):
    tissue = np.random.default_rng(1).random((30, 20)) < 0.3
    found = regions.smooth(np.where(tissue, 7, np.nan), tissue, um)
    np.testing.assert_allclose(found, np.where(tissue, 7, 0), rtol=1e-5)


def test_no_smoothing_is_none():
    image = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    assert (regions.smooth(image, image > 0, 0) == np.where(image > 0, image, 0)).all()


# ----- labels -----
def loop_over_pairs(tissue):
    pairs = set()
    for row, column in np.argwhere(tissue):
        for down, right in ((1, 0), (0, 1)):
            other = row + down, column + right
            if other[0] < tissue.shape[0] and other[1] < tissue.shape[1] and tissue[other]:
                pairs.add((row * tissue.shape[1] + column, other[0] * tissue.shape[1] + other[1]))
    return pairs


IMAGES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=50, deadline=None)
@given(tissue=arrays(bool, IMAGES))
def test_neighbours_share_a_side(tissue):
    found = regions.neighbour_pairs(tissue)
    assert len(found) == len({*map(tuple, found)})
    assert {*map(tuple, found)} == loop_over_pairs(tissue)


def flood(labels):
    """Pieces as lists of places, by label and then in reading order."""
    seen, pieces = np.zeros(labels.shape, bool), []
    for row, column in np.argwhere(labels > 0):
        if seen[row, column]:
            continue
        piece, todo = [], [(row, column)]
        seen[row, column] = True
        while todo:
            r, c = todo.pop()
            piece.append((r, c))
            for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                inside = 0 <= near[0] < labels.shape[0] and 0 <= near[1] < labels.shape[1]
                if inside and not seen[near] and labels[near] == labels[r, c]:
                    seen[near] = True
                    todo.append(near)
        pieces.append(piece)
    return sorted(pieces, key=lambda piece: (labels[piece[0]], min(piece)))


def merge_one_by_one(labels, smallest):
    """The smallest piece first, until none is too small or all that are have no neighbour."""
    labels = labels.copy()
    while True:
        for piece in sorted(flood(labels), key=len):
            border = np.zeros(labels.max() + 1, int)
            for r, c in piece:
                for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                    inside = 0 <= near[0] < labels.shape[0] and 0 <= near[1] < labels.shape[1]
                    if inside and labels[near] and labels[near] != labels[r, c]:
                        border[labels[near]] += 1
            if len(piece) < smallest and border.any():
                labels[tuple(np.transpose(piece))] = border.argmax()
                break
        else:
            return labels


@settings(max_examples=150, deadline=None)
@given(labels=arrays(np.int64, IMAGES, elements=st.integers(0, 4)), smallest=st.integers(0, 30))
def test_small_pieces_are_merged_as_one_by_one(labels, smallest):
    before = labels.copy()
    found = regions.merge_small(labels, smallest)
    assert (labels == before).all()
    np.testing.assert_array_equal(found, merge_one_by_one(labels, smallest))
    assert ((found > 0) == (labels > 0)).all()


def test_a_merger_by_hand():
    labels = np.array([[1, 1, 1, 2, 2, 2],
                       [1, 3, 3, 2, 2, 2],
                       [1, 1, 1, 2, 4, 2],
                       [0, 0, 0, 0, 0, 0],
                       [3, 0, 2, 2, 0, 1]])  # fmt: skip
    expected = labels.copy()
    expected[1, 1:3], expected[2, 4] = 1, 2
    assert (regions.merge_small(labels, 3) == expected).all()  # islands stay what they are


@settings(max_examples=40, deadline=None)
@given(labels=arrays(np.int64, IMAGES, elements=st.integers(0, 5)))
def test_pieces_are_those_of_a_flood(labels):
    found, of_piece = regions.label_pieces(labels)
    pieces = flood(labels)
    assert len(of_piece) == len(pieces) + 1
    for piece in pieces:
        numbers = {int(found[place]) for place in piece}
        assert len(numbers) == 1
        assert of_piece[numbers.pop()] == labels[piece[0]]
    assert ((found > 0) == (labels > 0)).all()


@settings(max_examples=60, deadline=None)
@given(labels=arrays(np.int64, IMAGES, elements=st.integers(0, 12)))
def test_regions_are_numbered_by_area(labels):
    found = regions.by_size(labels)
    assert found.dtype == np.uint8
    assert ((found == 0) == (labels == 0)).all()
    area = np.bincount(found.ravel())[1:]
    assert (area > 0).all()
    assert (np.diff(area) <= 0).all()
    pairs = {*zip(labels.ravel().tolist(), found.ravel().tolist(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize(("n", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_many_regions_need_two_bytes(n, dtype):
    found = regions.by_size(np.arange(n + 1).reshape(1, -1) * 7)
    assert found.dtype == dtype
    assert found.tolist() == [[*range(n + 1)]]


def test_a_spot_has_the_region_under_most_of_its_disc():
    labels = np.array([[1, 1, 2, 0], [1, 1, 2, 0], [1, 1, 2, 0]])
    discs = np.zeros((4, *labels.shape))
    discs[0, :, 1:3] = [0.3, 0.4]  # 0.9 in region 1 and 1.2 in region 2
    discs[1, 0, :2] = 1
    discs[2, :, 3] = 1  # outside
    discs[3, 0] = [0.5, 0, 0, 1]
    found, share = regions.spot_labels(labels, regions.csr_array(discs.reshape(4, -1)))
    assert found.tolist() == [2, 1, 0, 1]
    np.testing.assert_allclose(share, [1.2 / 2.1, 1, 0, 1 / 3])


# ----- agreement of partitions -----
def rand_by_pairs(a, b):
    """Hubert and Arabie's index by counting every pair of members."""
    both = first = second = 0
    n = len(a)
    for i in range(n):
        for j in range(i + 1, n):
            first += a[i] == a[j]
            second += b[i] == b[j]
            both += a[i] == a[j] and b[i] == b[j]
    expected = first * second / (n * (n - 1) / 2)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(-2, 4), st.sampled_from([0, 7, 1000])),
                   min_size=2, max_size=25),
)  # fmt: skip
def test_the_rand_index_counts_pairs(pairs):
    a, b = np.transpose(pairs)
    assert regions.adjusted_rand(a, b) == pytest.approx(rand_by_pairs(a, b), abs=1e-12)
    assert regions.adjusted_rand(b, a) == pytest.approx(regions.adjusted_rand(a, b), abs=1e-12)
    assert regions.adjusted_rand(a, 5 - a) == pytest.approx(1)


def test_the_rand_index_by_hand_and_by_chance():
    assert regions.adjusted_rand(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])) == pytest.approx(
        4 / 7
    )  # pairs: 1 in both; 1 and 2 in one; expected 1 * 2 / 6
    rng = np.random.default_rng(0)
    chance = [regions.adjusted_rand(*rng.integers(0, 5, (2, 200))) for _ in range(200)]
    assert abs(np.mean(chance)) < 0.003
    many = rng.integers(0, 8, 700_000)  # pairs beyond 32 bits
    assert regions.adjusted_rand(many, many) == 1


# ----- true regions -----
def test_true_regions_are_cut_or_padded(labelled):
    stage, true = stage_of(labelled), true_labels()
    found, names = regions.read_true_regions(stage, (60, 50))
    assert names == NAMES
    assert (found[:56] == true[:, :50]).all()
    assert (found[56:] == 0).all()


BAD_TRUTH = {
    "none": (None, "does not tell the true regions"),
    "no regions": ({"region_names": NAMES}, "does not tell the true regions"),
    "no names": ({"regions": np.ones(GRID, int)}, "does not tell the true regions"),
    "pickled": ({"regions": np.ones(GRID, int), "region_names": np.array(NAMES, object)},
                "does not tell the true regions"),
    "fractions": ({"regions": np.ones(GRID), "region_names": NAMES}, "regions are float64"),
    "flat": ({"regions": np.ones(9, int), "region_names": NAMES}, "regions are int64 (9,)"),
    "a number without a name": ({"regions": np.full(GRID, 4), "region_names": NAMES},
                                "for 4 names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRUTH)
def test_bad_true_regions(labelled, case):
    content, message = BAD_TRUTH[case]
    (labelled / "truth.npz").unlink()
    if content is not None:
        np.savez(labelled / "truth.npz", **content, allow_pickle=True)
    with pytest.raises(utils.StageError) as error:
        regions.read_true_regions(stage_of(labelled), GRID)
    assert message in str(error.value)
    assert "truth.npz" in str(error.value)


def test_a_damaged_truth(labelled):
    (labelled / "truth.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(utils.StageError, match="does not tell the true regions"):
        regions.read_true_regions(stage_of(labelled), GRID)


# ----- tissue -----
def test_tissue_is_where_maps_and_mask_agree(labelled):
    known = np.zeros(GRID, bool)
    known[20:30] = True
    stage = stage_of(labelled)
    expected = known & (true_labels() > 0)
    assert (regions.tissue_of(stage, known) == expected).all()
    assert stage.inputs["mask.png"]["sha256"] == disk.sha256(labelled / "mask.png")
    known[:] = False
    known[0, 0] = True
    with pytest.raises(utils.StageError, match=r"mask\.png .*no superpixel in common"):
        regions.tissue_of(stage, known)
    (labelled / "mask.png").unlink()
    assert (regions.tissue_of(stage, known) == known).all()


# ----- pictures -----
def test_colours_differ_and_none_is_grey():
    colours = regions.label_colours(20)
    assert len({*colours}) == 20
    assert regions.label_colours(3) == colours[:3]
    assert regions.label_colours(4, grey=2) == [colours[0], "#dddddd", colours[1], colours[2]]


@settings(max_examples=30, deadline=None)
@given(region=arrays(bool, IMAGES).filter(np.any))
def test_the_number_stands_furthest_inside(region):
    row, column = regions.innermost(region)
    assert region[row, column]
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded) - 1
    depth = [np.linalg.norm(outside - place, axis=1).min() for place in np.argwhere(region)]
    own = np.linalg.norm(outside - (row, column), axis=1).min()
    assert own >= max(depth) - 0.5  # distances of the transform are those of a chamfer


@pytest.mark.parametrize(
    ("columns", "um"), [(14, 50), (28, 50), (70, 100), (240, 500), (812, 1000)]
)
def test_the_scale_bar_has_its_length(columns, um):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    ax.imshow(np.zeros((columns, columns)))
    regions.add_scale_bar(ax, (columns, columns))
    (line,) = ax.lines
    assert np.ptp(line.get_xdata()) == um / 8
    assert [text.get_text() for text in ax.texts] == ["1 mm" if um == 1000 else f"{um} µm"]


def test_the_picture_has_the_colours_of_the_regions(labelled):
    labels = true_labels()
    rgb = regions.read_colours(stage_of(labelled), GRID)
    assert (rgb == 200).all()
    names = ["one", "two", "none of them"]
    extra = (np.where(labels > 0, 0.5, np.nan), "certainty")
    figure = regions.draw_labels(labels, names, "title", rgb, extra, grey=3)
    pictures = [ax.images[0].get_array() for ax in figure.axes[:3]]
    colours = ["#ffffff", *regions.label_colours(3, 3)]
    for i, colour in enumerate(colours):
        assert "#" + bytes(pictures[1][labels == i][0].tolist()).hex() == colour
        assert np.ptp(pictures[1][labels == i], axis=0).max() == 0
    assert [text.get_text() for text in figure.legends[0].texts] == [
        f"{i}  {name}: {(labels == i).sum() * 64e-6:.3g} mm²" for i, name in enumerate(names, 1)
    ]
    assert len({ax.get_ylim() for ax in figure.axes[:3]}) == 1  # one scale: rows are level
    (labelled / "Histology_rgb.npy").unlink()
    assert regions.read_colours(stage_of(labelled), GRID) is None


# ----- files -----
def test_contents_are_written_by_their_kind_and_appear_together(labelled):
    class Torn:
        def savefig(self, path):
            Path(path).write_text("half")
            raise OSError(28, "no space left", str(path))

    before = snapshot(labelled)
    stage, table = stage_of(labelled), pd.DataFrame({"a": [1.5], "b": ["x"]})
    contents = {files.SEGMENTS: np.arange(3), files.SEGMENT_TABLE: table}
    regions.save(stage, contents)
    assert not {"segments.npy", "segments.csv"} & {*snapshot(labelled)}
    with pytest.raises(OSError, match="no space"):
        regions.save(stage, {files.SEGMENT_PICTURE: Torn()})
    stage.discard()
    assert snapshot(labelled) == before
    stage = stage_of(labelled)
    regions.save(stage, contents)
    stage.finish(n=2)
    assert np.load(labelled / "segments.npy").tolist() == [0, 1, 2]
    assert (labelled / "segments.csv").read_bytes() == b"a,b\n1.5,x\n"
    assert json.loads((labelled / "x.json").read_text())["n"] == 2


def test_facts_are_printed_line_by_line(capsys):
    truth = {"maps": {"n": 3, "ARI": None}, "spots": {"n": 2, "ARI": 0.5}}
    regions.print_facts({"genes": 5, "stability": None, "medians": {"r": 0.1}, "truth": truth})
    regions.print_table(pd.DataFrame({"a": [1.23456, np.nan], "colour": "#ffffff"}))
    regions.print_table(pd.DataFrame({"a": []}), "nothing")
    assert capsys.readouterr().out.splitlines() == [
        "genes: 5", "stability: unknown", "medians: r 0.1", "truth:", "  maps: n 3, ARI unknown",
        "  spots: n 2, ARI 0.5", "   a", "1.23", "    ", "nothing",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", ""])
def test_numbers_of_the_command_line(text):
    with pytest.raises(argparse.ArgumentTypeError, match="of 0 or more"):
        cli.from_0(text)
    assert cli.from_0("0") == 0
