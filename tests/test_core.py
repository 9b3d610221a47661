"""The arithmetic of method/ by hand, where a changed character went unnoticed (mutants.py)."""

import functools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_stage, outcome, put
from PIL import Image
from test_HISTEX import CPU, RADIUS, SHAPE, F, G, default_network, key_named, make_section
from torch import nn

import HISTEX
import utils
from method import anchoring, devices, grid, network, prediction, progress, states, tiling
from method import section as sections
from writing import disk


# ----- tiles --------------------------------------------------------------------------------------
def shares(extent: int, *of: object) -> tuple[list[int], list[list[float]]]:
    made = tiling.Tiling(*of)
    return made.starts(extent), [
        np.round(part.astype(float), 4).tolist() for part in made.shares(extent)
    ]


def test_the_shares_of_tiles_by_hand():
    assert shares(8, 5, 2, True) == (
        [0, 3],
        [[1, 1, 1, 0.6667, 0.3333], [0.3333, 0.6667, 1, 1, 1]],
    )
    assert shares(8, 6, 2, False) == ([0, 3], [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    assert shares(4, 5, 2, True) == ([0], [[1, 1, 1, 1]])
    assert shares(5, 5, 2, False) == ([0], [[1] * 5])
    three = tiling.Tiling(4, 1, True)
    assert three.starts(10) == [0, 3, 6]
    assert [part.tolist() for part in three.shares(10)] == [
        [1, 1, 1, 0.5], [0.5, 1, 1, 0.5], [0.5, 1, 1, 1],
    ]  # fmt: skip
    assert tiling.Tiling(6, 2, False).side(6) == 6
    assert tiling.Tiling(6, 2, False).side(7) == 5  # two of 5 that share 3
    assert tiling.Tiling(6, 2, False).side(11) == 5  # three of 5
    assert tiling.VIT_TILING.tile * utils.TOKEN_PX == 224  # as it was trained


# ----- grid ---------------------------------------------------------------------------------------
def test_the_area_of_a_disc_in_four_superpixels():
    """Of radius 1 around a corner: a quarter of the circle in each, 13 of 16 points by hand."""
    row, col = np.array([[1, 1, 2, 2, 5]]), np.array([[2, 3, 2, 3, 5]])
    found = grid.disc_areas(np.array([[2.0, 3.0]]), row, col, 1.0, 4)
    assert found.tolist() == [[13 / 16] * 4 + [0]]
    assert grid.disc_areas(np.array([[2.0, 3.0]]), row, col, 1.0)[0, 0] == pytest.approx(
        math.pi / 4, abs=0.03
    )


def test_the_centroid_of_a_triangle_and_of_what_has_no_area():
    triangle = np.array([(10, 20), (13, 20), (10, 26.0)])
    line = np.array([(1, 1), (3, 3), (2, 2.0)])
    rings = grid.Rings(
        np.array([0, 2]), np.array([3, 3]), np.zeros(2, bool), np.concatenate([triangle, line])
    )
    area, centroid = grid.polygon_moments(rings, 3)
    assert area.tolist() == [9, 0, 0]
    assert centroid[0].tolist() == [11, 22]
    assert np.isfinite(centroid).all()
    found = grid.polygon_areas(rings)
    assert set(found.polygon) == {0}
    assert found.area.sum() == pytest.approx(9)
    moved = rings._replace(xy=rings.xy + np.array([1e6, -1e6]))
    np.testing.assert_allclose(grid.polygon_moments(moved, 3)[0], [9, 0, 0])


@pytest.mark.parametrize("squares", [2_000_000, 9, 1])
def test_the_first_polygon_may_have_any_number(squares, monkeypatch):
    monkeypatch.setattr(grid, "MAX_SQUARES", squares)  # 9: the first one has the block 1
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1.0)])
    for numbers in ((0, 1), (1, 2), (1, 5), (2, 3)):
        rings = grid.Rings(
            np.array(numbers), np.array([4, 4]), np.zeros(2, bool), np.vstack([square, square + 3])
        )
        found = grid.polygon_areas(rings)
        assert (found.polygon.tolist(), found.area.tolist()) == ([*numbers], [1, 1])
        assert (found.row.tolist(), found.col.tolist()) == ([0, 3], [0, 3])


# ----- the section --------------------------------------------------------------------------------
def test_patches_and_what_lies_on_the_map():
    section = make_section(radius=1.0)
    row, col = section.patches(np.array([[5, 8]]))
    assert row.tolist() == [[4, 4, 4, 5, 5, 5, 6, 6, 6]]
    assert col.tolist() == [[7, 8, 9, 7, 8, 9, 7, 8, 9]]
    assert section.patches(np.array([[5, 8]]), 1)[0].shape == (1, 25)
    rows, cols = np.array([-1, 0, 4, 5, 0, 0]), np.array([0, 0, 6, 0, -1, 7])
    on = [False, True, True, False, False, False]
    assert sections.on_map(rows, cols, 5, 7).tolist() == on


def test_the_published_disc_is_37_superpixels_and_ours_is_its_area():
    published, ours = make_section(by_area=False), make_section()
    assert published.half == 3
    assert published.areas.shape == (16, 49)
    assert (published.areas.sum(axis=1) == 37).all()
    assert published.usable.all()
    assert ours.half == 4
    assert ours.areas.sum(axis=1)[5] == pytest.approx(math.pi * RADIUS**2, rel=0.01)
    assert ours.spacing == grid.neighbour_distance(ours.points)


def test_what_sampling_finds_beyond_a_whole_disc_is_no_tissue():
    section = make_section()
    share = section.areas.sum(axis=1) / (math.pi * RADIUS**2)
    more = share > 1
    assert more.any()
    np.testing.assert_array_equal(section.expression[:16][more], section.counts[more])
    less = ~more
    wanted = section.counts[less] / share[less, None]
    np.testing.assert_allclose(section.expression[:16][less], wanted, rtol=1e-6)


def test_the_inputs_of_a_network_by_hand():
    section = make_section(radius=1.0)
    near = np.array([[3, 0]])
    tokens, expression, offsets = section.inputs(np.array([[0, 45]]), near, 1, CPU)
    assert tokens.shape == (1, 5, 5, F)
    border = section.tokens[np.ix_([0, 0, 0, 1, 2], [43, 44, 45, 45, 45])]
    np.testing.assert_array_equal(tokens[0].numpy(), border.astype(np.float32))
    np.testing.assert_array_equal(expression[0].numpy(), section.expression[[3, 0]])
    assert offsets.shape == (1, 9, 2, 2)
    wanted = np.array([-0.5, 45.5]) - section.points[0]  # of the superpixel (-1, 45)
    np.testing.assert_allclose(offsets[0, 1, 1].numpy(), wanted, rtol=1e-6)


def test_tokens_that_never_change_have_a_deviation_of_one():
    tokens = np.ones((3, 4, 2), np.float16)
    tokens[1, 2, 1] = 3
    mean, std = sections.token_statistics(tokens, np.ones((3, 4), bool))
    np.testing.assert_allclose(mean, [1, 14 / 12])
    np.testing.assert_allclose(std, [1, np.sqrt(20 / 12 - (14 / 12) ** 2)], rtol=1e-6)


@pytest.mark.parametrize("n", [4, 9, 10, 11, 16])
def test_every_spot_is_held_out_once_in_as_many_states_as_there_are_folds(n):
    whole = make_section()
    keep = (whole.parents < n).all(axis=1)
    section = make_section(
        spots=whole.spots[:n], counts=whole.counts[:n], points=whole.points[keep],
        expression=whole.expression[keep], parents=whole.parents[keep], context=2,
    )  # fmt: skip
    folds = min(10, n)
    splits = [sections.split_spots(section, True, 3, index) for index in range(folds + 1)]
    assert sorted(np.concatenate([s.held_out for s in splits[:folds]])) == list(range(n))
    assert max(len(s.held_out) for s in splits) - min(len(s.held_out) for s in splits) <= 1
    np.testing.assert_array_equal(splits[folds].held_out, splits[0].held_out)
    everyone = sections.split_spots(section, False, 3, 0)
    assert everyone.train.tolist() == list(range(n))
    assert everyone.held_out.tolist() == []
    assert (everyone.near[:, 0] == np.arange(n)).all()  # a spot is its own nearest point
    assert (splits[0].near[:, 0] != np.arange(n)).all()


POINTS = 14  # tokens of a side: he.jpg is one tile


@pytest.fixture
def ready(tmp_path):
    """A stage in a folder that holds all inputs of HISTEX.py: 4 spots, one midpoint, 2 genes."""
    stage = make_stage(tmp_path)
    Image.new("RGB", (224, 224)).save(tmp_path / "he.jpg")
    mask = np.full((POINTS, POINTS), 255, np.uint8)
    mask[0] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    put(stage, "radius.txt", "16\n")
    put(stage, "gene-names.txt", "A\nB\n")
    xy = [(40, 50), (100, 60), (48, 120), (120, 140)]
    spots = pd.DataFrame(xy, list("abcd"), ["x", "y"])
    spots.to_csv(tmp_path / "locs.csv")
    write_points(tmp_path, spots)
    np.save(tmp_path / "HRcnts.npy", np.array([[1, 2], [3, 4], [5, 6], [7, 8], [2, 3]], "f4"))
    np.save(tmp_path / "Histology_feature_map.npy", np.ones((POINTS, POINTS, 3), np.float16))
    return stage


def write_points(directory, spots, **changes) -> None:
    names = [*spots.index]
    points = {
        "x": [*spots.x, 70], "y": [*spots.y, 55], "measured": [1] * len(spots) + [0],
        "parent_1": [*names, "a"], "parent_2": [""] * len(spots) + ["b"],
    }  # fmt: skip
    pd.DataFrame(points | changes).to_csv(directory / "HRlocs.csv")


def test_a_section_is_read_as_it_was_written(ready, capsys):
    section, names, genes = sections.read_section(ready, 3, True)
    assert (names.tolist(), genes) == (list("abcd"), ["A", "B"])
    assert section.counts.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert section.spots[0].tolist() == [50 / 16, 40 / 16]
    assert section.points[4].tolist() == [55 / 16, 70 / 16]
    assert section.parents.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [0, 1]]
    assert section.radius == 1
    assert section.tissue.shape == (POINTS, POINTS)
    assert capsys.readouterr().out == ""
    sections.read_section(ready, 6, True)
    assert "only 5 HR points: the context is all of them, not 6" in capsys.readouterr().out


def test_spots_off_the_tissue_are_counted(ready, capsys):
    spots = pd.read_csv(ready.directory / "locs.csv", index_col=0)
    spots = pd.concat([spots, pd.DataFrame({"x": [8], "y": [8]}, ["e"])])
    spots.to_csv(ready.directory / "locs.csv")
    write_points(ready.directory, spots)
    np.save(ready.directory / "HRcnts.npy", np.ones((6, 2), np.float32))
    section, *_ = sections.read_section(ready, 3, True)
    said = capsys.readouterr().out
    assert "1 of 5 spots have less than 25% of their disc on tissue and are left out" in said
    assert section.usable.tolist() == [True] * 4 + [False]
    mask = np.zeros((POINTS, POINTS), np.uint8)
    mask[2:5] = 255
    Image.fromarray(mask).save(ready.directory / "mask.png")
    _, said = outcome(sections.read_section, ready, 3, True)
    assert "mask.png leaves 2 of 5 spots on tissue; at least 4 are needed" in said


def three_spots(stage) -> None:
    spots = pd.read_csv(stage.directory / "locs.csv", index_col=0)[:3]
    spots.to_csv(stage.directory / "locs.csv")


def points_that(**changes):
    def spoil(stage) -> None:
        spots = pd.read_csv(stage.directory / "locs.csv", index_col=0)
        write_points(stage.directory, spots, **changes)

    return spoil


def counts_that_are(value: float):
    def spoil(stage) -> None:
        counts = np.ones((5, 2), np.float32)
        counts[3, 1] = value
        np.save(stage.directory / "HRcnts.npy", counts)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (three_spots, "locs.csv lists 3 spots; at least 4 are needed"),
        (points_that(parent_1=list("abcdz")), "1 have a parent that is no spot and 0 have no"),
        (points_that(x=[1, 2, np.inf, 4, 5]), "0 have a parent that is no spot and 1 have no pl"),
        (points_that(y=["u"] * 5), "is not a table of HR points"),
        (points_that(parent_1=list("abcca")), "measures 4 spots; expected each of the 4 spots"),
        (counts_that_are(-1), "HRcnts.npy holds -1; counts cannot be negative"),
        (counts_that_are(2e9), "HRcnts.npy holds 2e+09; counts are 1e+09 at most"),
        (lambda stage: put(stage, "radius.txt", "15.9"), "between 16 and 1024 (px of he.jpg)"),
        (lambda stage: put(stage, "radius.txt", "1025"), "between 16 and 1024 (px of he.jpg)"),
        (lambda stage: put(stage, "gene-names.txt", "A\n"), "expected float32 (5, 1)"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_refused(ready, spoil, words):
    spoil(ready)
    assert words in outcome(sections.read_section, ready, 3, True)[1]


def test_the_largest_count_of_a_point_is_taken(ready):
    counts_that_are(1e9)(ready)
    assert sections.read_expression(ready, (5, 2)).max() == 1e9
    counts_that_are(0)(ready)
    assert sections.read_expression(ready, (5, 2)).min() == 0


# ----- networks -----------------------------------------------------------------------------------
class Plain(network.Network):
    """Gives every superpixel the sum of its tokens, plus a tenth of the mean context."""

    latent_size = 1

    def __init__(self) -> None:
        super().__init__(None, None)
        self.hide = nn.Dropout(0.5)

    def fuse(self, histology, context, offsets):
        return histology.sum(dim=2, keepdim=True) + 0.1 * context.mean(dim=(1, 2))[:, None, None]

    def decode(self, latent, interpolated, genes=network.ALL):
        return latent if not interpolated.numel() else latent + interpolated


class Interpolating(Plain):
    interpolates = True

    def interpolation(self, distance2):
        return 1 / (1 + distance2)


def test_all_steps_of_a_network_by_hand():
    tokens = torch.arange(18.0).reshape(1, 3, 3, 2)
    expression = torch.tensor([[[1.0], [3.0]]])
    offsets = torch.zeros(1, 9, 2, 2)
    offsets[0, 4, 1] = torch.tensor([1.0, 2.0])
    flat = tokens.sum(dim=3).reshape(1, 9, 1) + 0.2
    np.testing.assert_allclose(Plain()(tokens, expression, offsets), flat)
    wanted = flat + 4
    wanted[0, 4, 0] -= 3 - 3 / (1 + 5)  # the second point is root 5 away from the middle
    np.testing.assert_allclose(Interpolating()(tokens, expression, offsets), wanted)
    base = network.Network(None, None)
    one = torch.ones(1)
    for step in (base.fuse, base.loss):
        with pytest.raises(NotImplementedError):
            step(one, one, one)
    with pytest.raises(NotImplementedError):
        base.decode(one, one)
    with pytest.raises(NotImplementedError):
        base.interpolation(one)
    assert base.to_counts(one) is one
    assert base.halo == 0
    assert not base.interpolates


def test_sums_over_discs_and_the_batch_of_spots():
    maps = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    areas = torch.tensor([[0.5, 1.0]])
    assert network.disc_sums(maps, areas).tolist() == [[2.5, 25.0]]
    section = make_section()
    split = sections.split_spots(section, True, 0, 0)
    batch = np.array([5, 2])
    output, areas, counts = network.run_batch(Plain(), section, split, batch, CPU)
    np.testing.assert_array_equal(counts.numpy(), section.counts[batch])
    chosen = section.chosen[batch]
    np.testing.assert_array_equal(areas, np.take_along_axis(section.areas[batch], chosen, axis=1))
    row, col = section.patches(np.floor(section.spots[batch]).astype(int))
    row, col = (np.take_along_axis(x, chosen, axis=1) for x in (row, col))
    context = section.expression[split.near[batch]].mean(axis=(1, 2))
    wanted = section.tokens[row, col].astype(np.float32).sum(axis=2) + 0.1 * context[:, None]
    np.testing.assert_allclose(output[..., 0].numpy(), wanted, rtol=1e-4)


# ----- progress -----------------------------------------------------------------------------------
def test_one_held_out_spot_chooses_by_itself():
    selection, one = progress.Selection(), nn.Linear(1, 1)
    for epoch, loss in enumerate([3.0, 1.0, 1.0, 2.0], 1):
        nn.init.constant_(one.weight, epoch)
        selection.consider(epoch, np.array([loss]), np.full((1, 2), epoch, "f4"), one)
    assert (selection.epoch, selection.loss) == (2, 1.0)
    assert selection.weights["weight"].item() == 2
    assert selection.predicted().tolist() == [[2, 2]]


def test_an_odd_number_of_held_out_spots_keeps_its_order():
    selection = progress.Selection()
    predicted = np.arange(10, dtype=np.float32).reshape(5, 2)
    selection.consider(1, np.ones(5), predicted, nn.Linear(1, 1))
    np.testing.assert_array_equal(selection.predicted(), predicted)


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_a_checkpoint_holds_all_that_a_training_has_come_to(averaging):
    def made() -> progress.Progress:
        torch.manual_seed(0)
        one = nn.Linear(2, 1)
        return progress.Progress(one, torch.optim.Adam(one.parameters(), 0.1), averaging, 8)

    first, second = made(), made()
    assert (first.kept is first.network) == (averaging is None)
    first.network(torch.ones(1, 2)).sum().backward()
    first.optimizer.step()
    if first.average is not None:
        first.average.update_parameters(first.network)
    first.schedule.step()
    first.selection.consider(3, np.array([0.5, 1]), np.ones((2, 1), "f4"), first.network)
    first.history.append({"loss": 0.5})
    second.restore(first.content())
    names = ["network", *(["average"] if averaging else []), "optimizer", "schedule"]
    assert [*second.parts] == names
    for a, b in zip(first.parts.values(), second.parts.values(), strict=True):
        assert str(a.state_dict()) == str(b.state_dict())
    assert (second.selection.epoch, second.history) == (3, [{"loss": 0.5}])
    assert second.selection.half_loss == [0.5, 1]


@pytest.mark.parametrize(("n_steps", "wanted"), [
    (4, [0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5, 0]), (None, [0.8] * 5),
])  # fmt: skip
def test_the_step_size_falls_as_a_cosine(n_steps, wanted):
    one = nn.Linear(1, 1)
    run = progress.Progress(one, torch.optim.SGD(one.parameters(), 0.8), None, n_steps)
    rates = [run.optimizer.param_groups[0]["lr"]]
    for _ in range(4):
        run.optimizer.step()
        run.schedule.step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, wanted, atol=1e-12)


# ----- prediction ---------------------------------------------------------------------------------
def test_patches_share_superpixels_and_fade_there(monkeypatch):
    for shared, line in ((1, [1, 2, 2, 2, 2, 2, 2, 2, 1]), (2, [1, 2, 3, 3, 3, 3, 3, 2, 1])):
        monkeypatch.setattr(prediction, "OVERLAP", shared)
        stride, fade = prediction.blending(9, True)
        assert stride == 9 - shared
        assert fade.reshape(9, 9).tolist() == np.outer(line, line).tolist()
        for i in range(shared):  # two neighbours are one, wherever both are
            assert line[stride + i] + line[i] == shared + 1
    assert prediction.blending(3, True)[0] == 2
    stride, fade = prediction.blending(3, False)
    assert (stride, fade.tolist()) == (3, [1] * 9)
    assert prediction.patch_middles(4, 5, 11).tolist() == [0, 5, 10]
    assert prediction.patch_middles(4, 5, 12).tolist() == [0, 5, 10, 15]
    assert prediction.patch_middles(3, 7, 14).tolist() == [3, 10, 17]


def test_only_patches_that_reach_what_is_shown_are_made():
    section = make_section(radius=1.0, shape=(9, 9))
    shown = np.zeros((9, 9), bool)
    shown[4, 4] = True
    centres = prediction.patch_centres(section, 3, shown)
    assert centres.tolist() == [[4, 4]]
    shown[0, 8] = True
    assert prediction.patch_centres(section, 2, shown).tolist() == [[0, 8], [4, 4]]


def test_batches_are_halved_and_stay_so():
    sizes = []

    def compute(part: slice) -> int:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise RuntimeError("out of memory")
        return part.start

    batches = prediction.Batches(8)
    assert [(p.start, p.stop, r) for p, r in batches.over(5, compute)] == [
        (0, 2, 0), (2, 4, 2), (4, 5, 4),
    ]  # fmt: skip
    assert sizes == [5, 4, 2, 2, 1]
    assert batches.size == 2
    assert list(batches.over(0, compute)) == []


def test_blocks_of_genes_fit_the_memory_and_are_about_equal(monkeypatch):
    section = make_section()
    decoder = prediction.Decoder.__new__(prediction.Decoder)
    decoder.section, decoder.places = section, np.zeros((10, 2))
    for room, wanted in ((5, [5]), (3, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5), (0.5, [1] * 5)):
        monkeypatch.setattr(prediction, "GENES_BYTES", int(room * 4 * 10))
        blocks = decoder.blocks()
        assert [part.stop - part.start for part in blocks] == wanted
        assert [blocks[0].start, blocks[-1].stop] == [0, G]


# ----- anchoring ----------------------------------------------------------------------------------
def test_the_nearest_points_by_hand(monkeypatch):
    points = np.array([[0.5, 0.5], [0.5, 3.5], [9.5, 0.5]])
    places = np.array([[0, 0], [0, 2], [8, 0]])
    for at_once in (200_000, 2):
        monkeypatch.setattr(anchoring, "PLACES_AT_ONCE", at_once)
        near, distance2 = anchoring.nearest_points(points, places, 2)
        assert near.tolist() == [[0, 1], [1, 0], [2, 0]]
        assert distance2.tolist() == [[0, 9], [1, 4], [1, 64]]
        assert (near.dtype, distance2.dtype) == (np.int32, np.float32)
    near, _ = anchoring.nearest_points(points, places, 8)
    assert near.shape == (3, 3)


def test_how_superpixels_hang_together_with_spots():
    tissue = np.ones(SHAPE, bool)
    tissue[:, :12] = False
    section = make_section(tissue=tissue)
    places = np.argwhere(tissue)
    found = anchoring.find_anchors(section, places)
    usable = section.usable
    assert 4 < usable.sum() < 16
    assert found.discs.shape == (usable.sum(), len(places))
    whole = section.areas[usable].sum(axis=1)
    np.testing.assert_allclose(found.discs.sum(axis=1), whole, rtol=1e-6)
    np.testing.assert_allclose(found.shares.sum(dim=1).numpy(), 1, rtol=1e-5)
    assert found.near.shape == (len(places), anchoring.ANCHORS)
    first = np.floor(section.spots[usable][0]).astype(int)
    number = int(np.flatnonzero((places == first).all(axis=1))[0])
    assert found.discs[[0], [number]] == 1
    assert found.near[number, 0] == 0


def test_discs_at_the_borders_of_a_map_lie_where_they_are():
    section = make_section()
    section = make_section(spots=(section.spots - (6.2, 7.1)) * 1.33 + 1.5)
    discs = anchoring.find_anchors(section, np.argwhere(section.tissue)).discs.toarray()
    row, col = section.patches(np.floor(section.spots).astype(int))
    wanted = np.zeros((16, *SHAPE))
    for spot, y, x in np.argwhere(np.ones((16, *SHAPE))):
        here = (row[spot] == y) & (col[spot] == x)
        wanted[spot, y, x] = section.areas[spot][here].sum()
    assert all(wanted[:, edge].any() for edge in (0, -1))
    assert all(wanted[:, :, edge].any() for edge in (0, -1))
    np.testing.assert_array_equal(discs.reshape(16, *SHAPE)[section.usable], wanted)


def test_weighted_sums_by_hand():
    rows, weights = torch.tensor([[0, 1]]), torch.tensor([[0.25, 2.0]])
    table = torch.tensor([[4.0, 8.0], [1.0, 3.0]])
    assert anchoring.weighted_sums(rows, weights, table).tolist() == [[3.0, 8.0]]


# ----- states -------------------------------------------------------------------------------------
def test_a_spot_that_two_states_hold_out_is_of_the_first():
    def state(spots: list[int], value: float) -> states.State:
        split = sections.Split(np.arange(9), np.array(spots), np.empty((9, 0)))
        return states.State(None, split, np.full((len(spots), 2), value, np.float32))

    spots, predicted = states.held_out([state([4, 1], 1), state([7, 4], 2)])
    assert spots.tolist() == [1, 4, 7]
    assert predicted[:, 0].tolist() == [1, 1, 2]


def test_a_correlation_needs_three_spots_and_a_change():
    measured = np.array([[1, 5, 1], [2, 5, 2], [4, 5, 3]], np.float32)
    predicted = np.array([[2, 1, 3], [4, 2, 2], [8, 3, 1]], np.float32)
    assert np.isnan(states.correlations(predicted[:2], measured[:2])).all()
    found = states.correlations(predicted, measured)
    np.testing.assert_allclose(found, [1, np.nan, -1])


def test_the_disk_that_states_take():
    one = nn.Linear(3, 2)  # 8 numbers of 4 bytes
    assert states.bytes_of(one, 5) == 15 * 32
    assert states.files_of(2) == [
        "states/00/model.json", "states/00/model.safetensors",
        "states/01/model.json", "states/01/model.safetensors",
    ]  # fmt: skip


def test_a_state_comes_back_for_its_key_only(tmp_path, capsys):
    section = make_section()
    one, other = default_network(section, 1), default_network(section, 2)
    predicted = np.arange(10, dtype=np.float32).reshape(2, G)
    key = key_named()
    assert states.read_state(tmp_path, key, other, (2, G)) is None
    states.write_state(tmp_path, one, [{"loss": 1.0}], predicted, key, 7)
    found = states.read_state(tmp_path, key, other, (2, G))
    np.testing.assert_array_equal(found, predicted)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert (tmp_path / "history.csv").read_text() == "loss\n1.0\n"
    info = json.loads((tmp_path / "model.json").read_text())
    assert (info["epoch"], info["network"], info["key"]) == (7, "DefaultNetwork", key.hash)
    assert capsys.readouterr().out == ""
    assert states.read_state(tmp_path, key_named("z"), other, (2, G)) is None
    assert states.read_state(tmp_path, key, other, (3, G)) is None
    assert states.read_state(tmp_path, key, nn.Linear(1, 1), (2, G)) is None
    assert capsys.readouterr().out.count("are damaged") == 2
    assert states.read_key(tmp_path / "none.json") is None
    assert key.change_since(tmp_path) is None
    assert key_named("z").change_since(tmp_path) == ("options or the preset have changed (name)")
    assert key.change_since(tmp_path / "none") is None
    (tmp_path / "model.json").write_text("[]")
    assert states.read_key(tmp_path / "model.json") is None
    assert key.change_since(tmp_path) is None
    (tmp_path / "model.json").write_text("{}")
    assert key.change_since(tmp_path).startswith("an earlier version of HISTEX")


def test_a_state_that_could_not_be_written_whole_is_none(tmp_path, monkeypatch):
    one = default_network(make_section())
    written = functools.partial(
        states.write_state, tmp_path, one, [{"loss": 1.0}], np.ones((2, G), "f4"), key_named(), 7
    )
    written()
    assert states.read_key(tmp_path / "model.json") == key_named().hash

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space"):
        written()
    assert states.read_key(tmp_path / "model.json") is None


def test_a_checkpoint_comes_back_for_its_key_only(tmp_path):
    folder = tmp_path / "states" / "00"
    saved = states.Checkpoint(folder, key_named())
    assert saved.read() is None
    saved.write({"epoch": 3})
    assert saved.read() == {"epoch": 3, "key": key_named().hash}
    assert states.Checkpoint(folder, key_named("z")).read() is None
    saved.remove()
    saved.remove()
    assert list(folder.iterdir()) == []


def test_what_a_key_says_of_functions_and_where_they_are(tmp_path):
    partly = functools.partial(states.files_of, 3)
    assert states.described(partly) == ["files_of", [3], {}]
    assert states.described(4) == 4
    home = {path.name for path in states.sources_of(partly)}
    assert home == {"states.py"}
    assert {path.name for path in states.sources_of(Interpolating)} == {
        "test_core.py", "network.py",
    }  # fmt: skip
    assert states.sources_of(3) == set()
    training = HISTEX.Training(HISTEX.PRESETS["default"], epochs=3)
    inputs = {"a.csv": {"sha256": "x"}}
    (tmp_path / "a.json").write_text("{}")
    key = states.key_of(training, [tmp_path / "a.json"], inputs, CPU)
    assert key.inputs == {"a.csv": "x"}
    assert {"a.json", "HISTEX.py", "network.py"} <= key.code.keys()
    assert key.training["epochs"] == 3
    assert key.code["a.json"] == disk.hash_of([tmp_path / "a.json"])
    assert key.machine == {"device": "cpu", "torch": torch.__version__}
    again = states.key_of(training, [tmp_path / "a.json"], inputs, CPU)
    assert key.hash == again.hash
    assert len(key.hash) == 64


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3), (9, 8), (64, 8)])
def test_a_core_is_left_to_other_programs_unless_told_otherwise(cores, threads, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    devices.limit_threads(torch.device("cpu"), 8)
    devices.limit_threads(torch.device("cuda"), 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    devices.limit_threads(torch.device("cpu"), 8)
    assert taken == [threads]
