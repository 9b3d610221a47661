"""Counts, images and options at the ends of their ranges, over all five scripts."""

import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from conftest import GENES, IMAGE_SHAPE, PIPELINE, hexagonal_spots, run, write_sample
from PIL import Image
from test_HISTEX import make_section

import get_HR
import utils
from method import maps
from reading import pickles, tables

TRAINING = ("--epochs", "1", "--n-states", "1", "--n-plots", "1", "--device", "cpu")


def go_on(directory, *scripts):
    """Run some of the five scripts, which do not go on over what an earlier run left."""
    for script, *options in PIPELINE:
        if script in scripts:
            assert run(script, directory, *options) == 0


def edit_counts(directory, change) -> pd.DataFrame:
    counts = pd.read_csv(directory / "cnts.csv", index_col=0)
    change(counts)
    counts.to_csv(directory / "cnts.csv")
    return counts


def maps_in(directory, folder="cnts-super") -> dict[str, np.ndarray]:
    index = pd.read_csv(directory / folder / "index.csv", dtype=str, keep_default_na=False)
    paths = [directory / folder / name for name in index["file"]]
    return {
        gene: pickles.read_pickle(path) for gene, path in zip(index["gene"], paths, strict=True)
    }


# ----- counts -----
def test_genes_and_spots_without_counts_or_without_change(finished, capsys):
    """A gene of zeros, a constant one, and spots without any count, with --uncertainty."""

    def change(counts):
        counts["GENE0"], counts["GENE1"] = 0, 7
        counts.iloc[:3] = 0
        counts["GENE1"] = 7

    edit_counts(finished, change)
    (finished / "gene-names.txt").write_text("\n".join(GENES))
    go_on(finished, utils.HIGH_RESOLUTION)
    assert run(utils.HISTEX, finished, *TRAINING, "--uncertainty") == 0
    found, spread = maps_in(finished), maps_in(finished, "cnts-super-sd")
    tissue = ~np.isnan(found["GENE2"])
    assert tissue.any()
    for gene in GENES:
        for values in (found[gene], spread[gene]):
            assert np.isfinite(values[tissue]).all()
            assert (values[tissue] >= 0).all()
    assert not found["GENE0"][tissue].any()
    assert not spread["GENE0"][tissue].any()
    assert found["GENE1"][tissue].min() > 0
    assert pd.read_csv(finished / "held-out-r.csv", index_col=0)["held_out_r"].isna()["GENE0"]


@pytest.mark.parametrize("preset", ["default", "published"])
def test_counts_of_ten_million(finished, preset):
    """Nothing overflows; a superpixel has about the 37th part of the counts of its disc."""
    edit_counts(finished, lambda counts: counts.update((counts * 10**6).clip(upper=10**7)))
    go_on(finished, utils.HIGH_RESOLUTION)
    expression = np.load(finished / "HRcnts.npy")
    assert expression.max() == 1e7
    assert run(utils.HISTEX, finished, *TRAINING, "--preset", preset) == 0
    found = maps_in(finished)
    assert all(np.isfinite(values[~np.isnan(values)]).all() for values in found.values())
    if preset == "default":
        assert max(np.nanmax(values) for values in found.values()) > 1e4


@pytest.mark.parametrize("value", ["3e36", "1.1e9"])
def test_counts_beyond_reason_are_refused_with_spot_and_gene(finished, value, capsys):
    table = pd.read_csv(finished / "cnts.csv", index_col=0, dtype=str)
    table.loc[table.index[5], "GENE3"] = value
    table.to_csv(finished / "cnts.csv")
    assert run(utils.HIGH_RESOLUTION, finished) == 2
    said = capsys.readouterr().err
    assert f"holds {float(value):g} for spot {table.index[5]}, gene GENE3" in said
    assert "at most 1e+09" in said


def test_the_largest_count_is_taken(finished):
    edit_counts(finished, lambda counts: counts.__setitem__("GENE3", int(tables.MAX_COUNT)))
    assert run(utils.HIGH_RESOLUTION, finished) == 0


def test_hr_counts_beyond_reason_are_refused(finished, capsys):
    values = np.load(finished / "HRcnts.npy")
    values[3, 2] = 1e38
    np.save(finished / "HRcnts.npy", values)
    assert run(utils.HISTEX, finished, *TRAINING) == 2
    said = capsys.readouterr().err
    assert "HRcnts.npy holds 1e+38; counts are 1e+09 at most" in said
    assert "get_HR.py" in said


def test_float16_has_no_room_for_a_map_that_float32_has(finished, capsys):
    """Such a gene is written in float32, which is said; the others in float16."""

    def change(counts):
        counts["GENE0"] = 50_000_000

    edit_counts(finished, change)
    (finished / "gene-names.txt").write_text("\n".join(GENES))
    go_on(finished, utils.HIGH_RESOLUTION)
    options = (*TRAINING, "--dtype", "float16")
    assert run(utils.HISTEX, finished, *options) == 0
    assert (
        "note: 1 maps in cnts-super are float32: float16 ends at 65,504" in capsys.readouterr().out
    )
    found = maps_in(finished)
    assert found.pop("GENE0").dtype == np.float32
    assert {values.dtype for values in found.values()} == {np.dtype(np.float16)}
    assert all(
        np.isfinite(values[~np.isnan(values)]).all() for values in maps_in(finished).values()
    )


@pytest.mark.parametrize(("value", "kept"), [(65_504, np.float16), (65_505, np.float32)])
def test_the_largest_number_of_float16(tmp_path, value, kept):
    values = np.array([[np.nan, 1, value]], np.float32)
    maps.write_map(tmp_path / "a.npy", values, "float16")
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == kept
    assert found[0, 2] == value


def test_a_map_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(utils.StageError, match=r"map a holds values that are not finite"):
        maps.write_map(tmp_path / "a.npy", np.array([[np.nan, np.inf]]), "float32")
    assert not list(tmp_path.iterdir())


# ----- gene names -----
def test_long_gene_names_get_files_of_their_own_that_every_disk_takes(finished):
    long = ["A" * 300, "A" * 299 + "B", "é" * 100, "é" * 99 + "e"]
    edit_counts(finished, lambda counts: counts.__setattr__("columns", [*long, *GENES[4:]]))
    (finished / "gene-names.txt").write_text("\n".join(long), encoding="utf-8")
    go_on(finished, utils.HIGH_RESOLUTION)
    assert run(utils.HISTEX, finished, *TRAINING, "--n-plots", "4") == 0
    assert list(maps_in(finished)) == long
    for folder in ("cnts-super", "cnts-super-plots"):
        names = [path.name for path in (finished / folder).iterdir()]
        assert len(names) >= 4
        assert all(name.isascii() and len(name) <= 120 for name in names)


# ----- training -----
@pytest.mark.parametrize("preset", ["default", "published"])
def test_a_huge_learning_rate_ends_with_one_message_and_no_checkpoint(finished, preset, capsys):
    shutil.rmtree(finished / "states")
    options = ("--preset", preset, "--learning-rate", "1e30", "--epochs", "5", "--device", "cpu")
    assert run(utils.HISTEX, finished, *options) == 2
    said = capsys.readouterr().err
    assert "The training of state 0 diverges: in epoch" in said
    assert "with the learning rate 1e+30" in said
    assert "--learning-rate NUMBER" in said
    assert not list(finished.glob("states/*/*"))


# ----- little tissue, few spots, small images -----
def test_one_superpixel_of_tissue_is_too_little_to_learn_from(finished, capsys):
    mask = np.zeros(np.load(finished / "Histology_rgb.npy").shape[:2], np.uint8)
    mask[12, 20] = 255
    Image.fromarray(mask).save(finished / "mask.png")
    assert run(utils.HISTEX, finished, *TRAINING) == 2
    said = capsys.readouterr().err
    assert "mask.png leaves 0 of" in said
    assert "at least 4 are needed" in said


def sample_of(directory, shape, spots, seed=0):
    """A sample with spots (N, 2) at places of our own, 30 to 60 counts of each of five genes."""
    write_sample(directory, shape, seed)
    ids = [f"s{i}" for i in range(len(spots))]
    pd.DataFrame(spots, ids, ["x", "y"]).to_csv(directory / "locs-raw.csv")
    counts = np.random.default_rng(seed).integers(30, 60, (len(spots), 5))
    pd.DataFrame(counts, ids, GENES[:5]).to_csv(directory / "cnts.csv")
    return directory


def test_four_spots_go_through_all_scripts(tmp_path, capsys):
    spots = [(260, 180), (360, 180), (310, 266), (410, 266)]
    directory = sample_of(tmp_path / "four", IMAGE_SHAPE, spots)
    for script, *options in PIPELINE:
        assert run(script, directory, *options) == 0, capsys.readouterr().err
    found = maps_in(directory)
    assert len(found) == 5
    assert all(np.nanmax(values) > 0 for values in found.values())
    assert "only 4 spots" in capsys.readouterr().out


def test_an_image_of_one_tile_goes_through_all_scripts(tmp_path, capsys):
    shape = (224, 224)
    directory = sample_of(tmp_path / "small", shape, hexagonal_spots(shape, 35.0, 50.0))
    (directory / "radius-raw.txt").write_text("16")
    for script, *options in PIPELINE:
        assert run(script, directory, *options) == 0, capsys.readouterr().err
    assert np.load(directory / "Histology_feature_map.npy").shape[:2] == (14, 14)
    assert all(values.shape == (14, 14) for values in maps_in(directory).values())


def test_an_image_smaller_than_a_tile_is_refused_with_its_size(tmp_path, capsys):
    directory = sample_of(tmp_path / "small", (180, 200), [(100, 90)])
    assert run(utils.CALIBRATION, directory) == 2
    said = capsys.readouterr().err
    assert "200 x 180 px once it is calibrated; expected at least one tile of 224 px" in said


# ----- memory -----
def peak_bytes(work) -> int:
    """Bytes that Python and numpy held at most at a time while ``work()`` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_twenty_thousand_genes_are_written_in_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(get_HR, "BLOCK_BYTES", 10**6)
    counts = np.ones((50, 20_000), np.float32)
    parents = get_HR.hr_parents(50, np.column_stack([np.arange(49), np.arange(1, 50)]))
    path = tmp_path / "HRcnts.npy"
    assert peak_bytes(lambda: get_HR.write_hr_counts(counts, parents, path)) < 4 * 10**6
    assert np.load(path, mmap_mode="r").shape == (99, 20_000)


def test_a_section_of_twenty_thousand_genes_holds_their_counts_once():
    counts = np.ones((16, 20_000), np.float32)
    small = make_section()
    expression = np.ones((len(small.parents), 20_000), np.float32)
    peak = peak_bytes(lambda: make_section(counts=counts, expression=expression))
    assert peak < 1.3 * expression.nbytes
