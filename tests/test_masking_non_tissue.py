"""masking_non_tissue.py: tissue against bare slide, on small synthetic slides and on real ones."""

import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

import masking_non_tissue as masking
import utils
from reading import images

SPECK, HOLE = (masking.superpixels(area) for area in (masking.MIN_SPECK_MM2, masking.MIN_HOLE_MM2))


def slide(shape: tuple[int, int], seed: int = 0, level: float = 243.0) -> np.ndarray:
    """Colours of superpixels of bare slide, float (rows, columns, 3)."""
    return np.random.default_rng(seed).normal(level, 0.7, (*shape, 3))


def disc(shape: tuple[int, int], row: float, col: float, radius: float) -> np.ndarray:
    r, c = np.mgrid[: shape[0], : shape[1]]
    return (r - row) ** 2 + (c - col) ** 2 < radius**2


def put_tissue(
    colours: np.ndarray, where: np.ndarray, od: float = 0.5, spread: float = 0.15
) -> None:
    """Pink tissue of a mean optical density, with the contrast of nuclei and stroma."""
    rng = np.random.default_rng(int(where.sum()))
    tint = np.array([0.6, 1.5, 0.9])  # of eosin and hematoxylin; mean 1
    density = np.maximum(rng.normal(od, spread, where.sum()), 0)[:, None] * tint
    colours[where] = (243 * np.exp(-density)).clip(0, 255)


def find(colours: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mask by colours alone: the tokens are optical densities and textures, and noise."""
    rgb = colours.clip(0, 255).astype(np.uint8)
    return masking.clean(masking.classify(simple_tokens(rgb), rgb, seed))


def simple_tokens(rgb: np.ndarray) -> np.ndarray:
    """What a network would know at least: density, texture, and features that say nothing."""
    density = masking.optical_density(rgb)
    signs = [density, masking.local_texture(density), ndimage.gaussian_filter(density, 2)]
    noise = np.random.default_rng(0).normal(0, 1, (*rgb.shape[:2], 3))
    return np.concatenate([np.stack(signs, axis=-1), noise], axis=-1).astype(np.float16)


EDGE = masking.TEXTURE_WINDOW // 2  # superpixels; the synthetic textures are blurred by the window


def agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union, leaving out what is nearer than EDGE to the wanted outline."""
    window = np.ones((2 * EDGE + 1, 2 * EDGE + 1), bool)
    far = ndimage.binary_erosion(wanted, window, border_value=1)
    far |= ndimage.binary_erosion(~wanted, window, border_value=1)
    return (found & wanted)[far].sum() / (found | wanted)[far].sum()


# ----- what is tissue -----------------------------------------------------------------------------
SHAPE = (90, 120)


def test_superpixels_are_64_square_micrometres():
    assert masking.superpixels(0.02) == 312  # 20,000 um2 / 64 um2 = 312.5
    assert masking.superpixels(1.0) == 15625


@pytest.mark.parametrize(
    ("od", "spread"), [(0.05, 0.045), (0.15, 0.1), (0.5, 0.15), (1.2, 0.2)]
)  # loose stroma, pale, usual, and thick and dark
def test_tissue_pale_and_dark(od, spread):
    colours, tissue = slide(SHAPE), disc(SHAPE, 45, 60, 32)
    put_tissue(colours, tissue, od, spread)
    assert agreement(find(colours), tissue) > 0.98


def test_pale_and_dark_tissue_side_by_side():
    """Pale tissue is not taken for slide because dark tissue is there."""
    colours = slide(SHAPE)
    dark, pale = disc(SHAPE, 45, 30, 22), disc(SHAPE, 45, 85, 24)
    put_tissue(colours, dark, 1.0, 0.2)
    put_tissue(colours, pale, 0.08, 0.06)
    assert agreement(find(colours), dark | pale) > 0.98


def test_a_section_that_fills_the_image_stays_whole():
    colours = slide(SHAPE)
    put_tissue(colours, np.ones(SHAPE, bool), 0.4)
    assert find(colours).all()


def test_a_section_that_nearly_fills_the_image_stays_whole():
    colours, tissue = slide(SHAPE), np.ones(SHAPE, bool)
    tissue[:14, :20] = False
    put_tissue(colours, tissue, 0.4)
    found = find(colours)
    assert found[20:].all()
    assert agreement(found, tissue) > 0.98


def test_two_kinds_of_tissue_without_slide_stay_whole():
    """Two clusters would cut it in half."""
    colours = slide(SHAPE)
    left = np.zeros(SHAPE, bool)
    left[:, :60] = True
    put_tissue(colours, left, 0.9, 0.2)
    put_tissue(colours, ~left, 0.25, 0.1)
    assert find(colours).all()


@pytest.mark.parametrize("level", [215, 243, 255])
def test_bare_slide_is_no_tissue(level):
    assert not find(slide(SHAPE, level=level)).any()


@pytest.mark.parametrize("tint", [(6, 14, 8), (12, 22, 14)])
def test_a_stain_haze_is_no_tissue(tint):
    """A smooth pink veil over half of the slide, as dense as pale tissue."""
    colours, tissue = slide(SHAPE), disc(SHAPE, 45, 30, 22)
    veil = np.clip((np.arange(SHAPE[1]) - 50) / 40, 0, 1)[None, :, None]
    colours -= veil * np.array(tint)
    put_tissue(colours, tissue)
    assert masking.optical_density(colours.astype(np.uint8))[:, 100:].mean() > 0.03
    assert agreement(find(colours), tissue) > 0.98


def test_printed_dots_are_no_tissue():
    """The fiducials of an array: dark and small, each alone on bare slide."""
    colours, tissue = slide((130, 130)), disc((130, 130), 65, 65, 32)
    put_tissue(colours, tissue)
    for place in range(5, 130, 20):
        for dot in ((4, place), (place, 4), (125, place), (place, 125)):
            colours[disc((130, 130), *dot, 2.5)] = 140
    found = find(colours)
    assert agreement(found, tissue) > 0.98
    assert ndimage.label(found)[1] == 1


def test_a_fragmented_section_keeps_its_pieces_and_loses_specks():
    shape = (120, 160)
    pieces = [disc(shape, 30, 30, 16), disc(shape, 30, 90, 14), disc(shape, 90, 60, 22)]
    specks = [disc(shape, 95, 130, 4), disc(shape, 20, 140, 3)]
    colours = slide(shape)
    put_tissue(colours, np.any(pieces + specks, axis=0))
    found = find(colours)
    assert ndimage.label(found)[1] == 3
    assert [found[piece].mean() > 0.9 for piece in pieces] == [True] * 3
    assert [found[speck].any() for speck in specks] == [False] * 2


def test_pinholes_are_filled_and_lumina_are_left_out():
    colours, tissue = slide(SHAPE), disc(SHAPE, 45, 60, 40)
    pinhole, lumen = disc(SHAPE, 45, 35, 3), disc(SHAPE, 45, 72, 15)
    put_tissue(colours, tissue & ~pinhole & ~lumen)
    found = find(colours)
    assert found[pinhole].all()
    assert found[lumen].mean() < 0.35
    assert not found[disc(SHAPE, 45, 72, 9)].any()


@pytest.mark.parametrize("shape", [(28, 28), (14, 30), (14, 14)])
def test_a_small_image_is_not_trimmed(shape):
    """448 px and less: the published margin of 16 superpixels would leave nothing."""
    colours = slide(shape)
    put_tissue(colours, np.ones(shape, bool))
    assert find(colours).all()


def test_a_small_image_may_be_half_bare():
    shape = (28, 28)
    colours, tissue = slide(shape), np.arange(28)[:, None] * np.ones(28) >= 14
    put_tissue(colours, tissue)
    assert agreement(find(colours), tissue) > 0.98


def test_another_seed_changes_next_to_nothing(monkeypatch):
    monkeypatch.setattr(masking, "MAX_SEEDS", 400)
    colours, tissue = slide(SHAPE), disc(SHAPE, 45, 60, 32)
    put_tissue(colours, tissue)
    first = find(colours, seed=0)
    np.testing.assert_array_equal(first, find(colours, seed=0))
    assert agreement(first, find(colours, seed=1)) > 0.95


def test_blocks_of_rows_do_not_show(monkeypatch):
    colours = slide(SHAPE)
    put_tissue(colours, disc(SHAPE, 45, 60, 32))
    whole = find(colours)
    monkeypatch.setattr(masking, "ROW_BLOCK", 7)
    np.testing.assert_array_equal(find(colours), whole)


# ----- the parts ----------------------------------------------------------------------------------
def test_optical_density_of_known_colours():
    rgb = np.full((20, 20, 3), 239, np.uint8)
    rgb[0, 0] = 119  # (119 + 1) / (239 + 1) = 1 / 2
    rgb[0, 1] = (239, 119, 59)  # 1, 1 / 2, 1 / 4
    rgb[0, 2] = 250  # brighter than the white
    density = masking.optical_density(rgb)
    np.testing.assert_allclose(density[0, :4], [np.log(2), np.log(2), 0, 0], atol=1e-6)
    dark = masking.optical_density(np.full((20, 20, 3), 99, np.uint8))
    np.testing.assert_allclose(dark, -np.log(100 / 201), rtol=1e-5)  # no scanner's white is so dark


def test_local_texture_is_the_standard_deviation_of_a_window():
    density = np.random.default_rng(0).random((20, 25))
    found = masking.local_texture(density)
    half = masking.TEXTURE_WINDOW // 2
    for row, col in ((half, half), (10, 12), (19 - half, 24 - half)):
        window = density[row - half : row + half + 1, col - half : col + half + 1]
        assert found[row, col] == pytest.approx(window.std())
    np.testing.assert_allclose(masking.local_texture(np.full((9, 9), 0.3)), 0, atol=1e-7)


def test_the_discriminant_is_fishers():
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.8, 0], [0.8, 1.0, 0], [0, 0, 4.0]])
    tissue = np.arange(4000) < 3000  # unequal classes, which count the same
    means = np.where(tissue[:, None], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    tokens = rng.multivariate_normal(np.zeros(3), covariance, 4000) + means
    weights, threshold = masking.fit_discriminant(tokens.astype(np.float32), tissue)
    wanted = np.linalg.solve(covariance, [1.0, 0.0, 0.0])
    cosine = weights @ wanted / np.linalg.norm(weights) / np.linalg.norm(wanted)
    assert cosine > 0.995
    found = tokens @ weights > threshold
    assert found[tissue].mean() == pytest.approx((~found[~tissue]).mean(), abs=0.03)
    middle = (tokens[tissue].mean(axis=0) + tokens[~tissue].mean(axis=0)) / 2
    assert middle @ weights == pytest.approx(threshold, abs=1e-4)


def test_the_discriminant_survives_constant_and_repeated_features():
    rng = np.random.default_rng(0)
    tissue = np.arange(200) < 100
    signal = (tissue + rng.normal(0, 0.2, 200))[:, None]
    tokens = np.hstack([signal, signal, signal, np.ones((200, 2))]).astype(np.float32)
    weights, threshold = masking.fit_discriminant(tokens, tissue)
    assert np.isfinite(weights).all()
    assert ((tokens @ weights > threshold) == tissue).mean() > 0.97


# ----- cleaning: P5 -------------------------------------------------------------------------------
def components(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Pieces of a mask by flood fill, neighbours along rows and columns."""
    left, pieces = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        piece, edge = set(), [left.pop()]
        while edge:
            row, col = edge.pop()
            piece.add((row, col))
            for near in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        pieces.append(piece)
    return pieces


def cleaned(mask: np.ndarray, hole: int, speck: int) -> np.ndarray:
    """What clean() must give: holes up to a size are filled, then specks up to a size removed."""
    filled = mask.copy()
    for piece in components(~mask):
        if len(piece) <= hole:
            filled[tuple(np.array(sorted(piece)).T)] = True
    pieces = components(filled)
    kept = [piece for piece in pieces if len(piece) > speck]
    out = np.zeros_like(mask)
    for piece in kept:
        out[tuple(np.array(sorted(piece)).T)] = True
    return out


SMALL_HOLE, SMALL_SPECK = 3, 6  # superpixels, so that small masks show everything


MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(mask=MASKS)
@settings(max_examples=300, deadline=None)
def test_clean(mask):
    with pytest.MonkeyPatch.context() as patch:
        sizes = {masking.MIN_HOLE_MM2: SMALL_HOLE, masking.MIN_SPECK_MM2: SMALL_SPECK}
        patch.setattr(masking, "superpixels", sizes.get)
        found = masking.clean(mask)
        np.testing.assert_array_equal(masking.clean(found), found)
    pieces = components(found)
    small = [piece for piece in pieces if len(piece) <= SMALL_SPECK]
    assert not small or len(pieces) == 1
    wanted = cleaned(mask, SMALL_HOLE, SMALL_SPECK)
    if wanted.any():
        np.testing.assert_array_equal(found, wanted)
    elif mask.any():  # all pieces are specks: the largest stays
        sizes = [len(piece) for piece in components(cleaned(mask, SMALL_HOLE, 0))]
        assert len(pieces) == 1
        assert len(pieces[0]) == max(sizes)
    else:
        assert not found.any() or mask.size <= SMALL_HOLE


def test_clean_at_its_limits():
    mask = np.zeros((60, 60), bool)
    mask[:20, :20] = True
    mask[30, : SPECK // 8] = True
    big = np.zeros((60, 60), bool)
    big[40 : 40 + 18, 30 : 30 + 18] = True  # 324 > 312
    found = masking.clean(mask | big)
    np.testing.assert_array_equal(found, big | (mask & (np.arange(60) < 20)[:, None]))
    for size, filled in ((HOLE, True), (HOLE + 1, False)):
        solid = np.ones((60, 60), bool)
        rows, cols = np.unravel_index(np.arange(size), (20, 20))
        solid[10 + rows, 10 + cols] = False
        assert masking.clean(solid).all() == filled
    for size, kept in ((SPECK, False), (SPECK + 1, True)):
        two = np.zeros((60, 120), bool)
        rows, cols = np.unravel_index(np.arange(size), (20, 20))
        two[5 + rows, 5 + cols] = True
        two[5:35, 60:90] = True
        assert masking.clean(two)[5:25, 5:25].any() == kept


# ----- spots and picture --------------------------------------------------------------------------
def test_spots_inside():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True  # x 32 to 48, y 16 to 32
    places = [(32, 16), (47.99, 31.99), (31.99, 16), (48, 20), (40, 15.9), (40, 32), (-1, 20),
              (40, -1), (640, 20), (40, 640), (-24, -32)]  # fmt: skip
    locs = pd.DataFrame(places, columns=["x", "y"])
    assert masking.spots_inside(mask, locs).tolist() == [True, True] + [False] * 9


def test_the_overlay_shows_outline_and_spots():
    picture = np.full((150, 200, 3), 240, np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[6:24, 8:32] = True
    locs = pd.DataFrame({"x": [320.0, 32.0], "y": [240.0, 32.0]})  # of 640 x 480 px
    before = picture.copy()
    drawn = masking.draw_overlay(picture, mask, locs)
    np.testing.assert_array_equal(picture, before)
    assert drawn.shape == (150, 200, 3)
    assert tuple(drawn[75, 100]) == masking.IN_COLOUR
    assert tuple(drawn[10, 10]) == masking.OUT_COLOUR
    assert tuple(drawn[30, 100]) == masking.OUTLINE_COLOUR  # upper edge at 6 / 30 of the height
    assert tuple(drawn[75, 60]) == (240, 240, 240)  # tissue stays as it is
    assert tuple(drawn[140, 100]) == (220, 220, 220)  # the rest is veiled


# ----- whole runs ---------------------------------------------------------------------------------
def write_colours(directory, colours: np.ndarray) -> None:
    """Give a finished sample other colours and tokens."""
    rgb = colours.clip(0, 255).astype(np.uint8)
    np.save(directory / "Histology_rgb.npy", rgb)
    np.save(directory / "Histology_feature_map.npy", simple_tokens(rgb))


def test_run(finished, capsys):
    colours, tissue = slide((28, 42)), np.arange(42)[None] * np.ones((28, 1)) < 26
    put_tissue(colours, tissue)
    write_colours(finished, colours)
    assert run("masking_non_tissue.py", finished) == 0
    with Image.open(finished / "mask.png") as image:
        assert (image.mode, image.size) == ("L", (42, 28))
        found = np.asarray(image)
    assert set(np.unique(found)) == {0, 255}
    assert agreement(found > 0, tissue) > 0.98
    record = utils.json.loads((finished / "masking_non_tissue.json").read_text())
    locs = pd.read_csv(finished / "locs.csv")
    under = (found > 0)[(locs.y // 16).astype(int), (locs.x // 16).astype(int)].mean()
    assert record["tissue_share"] == pytest.approx((found > 0).mean(), abs=1e-4)
    assert record["spots_on_tissue"] == pytest.approx(under, abs=1e-4)
    assert 0.5 < under < 1
    printed = capsys.readouterr().out
    assert f"{under:.1%} of 22 spots" in printed
    assert "Fewer than half" not in printed
    with Image.open(finished / "mask-overlay.png") as image:
        assert image.size == (672, 448)


def test_fewer_than_half_of_the_spots_on_tissue(finished, capsys):
    colours, tissue = slide((28, 42)), np.arange(42)[None] * np.ones((28, 1)) < 14
    put_tissue(colours, tissue)
    write_colours(finished, colours)
    assert run("masking_non_tissue.py", finished) == 0
    assert (
        "Fewer than half of the spots are on tissue: look at mask-overlay"
        in capsys.readouterr().out
    )


def test_a_bare_slide_gives_advice_and_no_mask(finished, capsys):
    before = (finished / "mask.png").read_bytes()
    write_colours(finished, slide((28, 42)))
    assert run("masking_non_tissue.py", finished) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "shows no tissue" in message
    assert "paint mask.png yourself: 42 x 28 px" in message
    assert (finished / "mask.png").read_bytes() == before
    assert not list(finished.glob(".*"))


def test_the_picture_of_a_large_section_is_small(finished, tmp_path):
    path = tmp_path / "he.jpg"
    Image.new("RGB", (3360, 448), (200, 120, 160)).save(path)
    args = masking.build_parser().parse_args(["--directory", str(finished)])
    stage = utils.Stage(masking.SCRIPT, args)
    thumbnail = images.thumbnail(stage, path, masking.OVERLAY_PX)
    assert max(thumbnail.shape) <= masking.OVERLAY_PX
    assert thumbnail.shape[1] / thumbnail.shape[0] == pytest.approx(7.5, rel=0.02)


# ----- real sections, colours alone ---------------------------------------------------------------
def real_section(name: str) -> tuple[np.ndarray, pd.DataFrame]:
    """Mean colours of superpixels (rows, columns, 3) and spots in px of he.jpg."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    (path,) = folder.glob("he-raw.*")
    factor = float((folder / "pixel-size-raw.txt").read_text()) / utils.PIXEL_SIZE_UM
    with Image.open(path) as image:
        full = image.size
        image.draft("RGB", (full[0] // 4, full[1] // 4))  # a JPEG in a quarter of the time
        size = [round(side * factor / utils.TOKEN_PX) for side in full]
        rgb = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))
    locs = pd.read_csv(folder / "locs-raw.csv", index_col=0)
    return rgb, locs[["x", "y"]] * factor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most", "spots"),
    [
        ("dev_her2st_C2", 0.15, 0.19, 1.0),
        ("dev_kidney", 0.9, 1.0, 0.97),  # a crop that tissue fills
        ("dev_pancreas", 0.9, 1.0, 0.9),  # as well; its spots also lie on empty slide
    ],
)
def test_real_sections(name, least, most, spots):
    rgb, locs = real_section(name)
    found = masking.clean(masking.classify(simple_tokens(rgb), rgb, seed=0))
    covered = masking.spots_inside(found, locs).mean()
    print(f"{name}: tissue {found.mean():.1%}, under {covered:.1%} of {len(locs)} spots")
    assert least < found.mean() <= most
    assert covered >= spots
