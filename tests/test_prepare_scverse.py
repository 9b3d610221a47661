"""prepare/scverse.py on objects that anndata and spatialdata wrote, and on plain tables."""

import importlib.util
import json
import shutil
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse

import image_calibration
import utils
from prepare import annotated, libraries, scverse, stores

FORMATS = ROOT / "tests" / "formats"


def recipe(name: str):
    """The script that wrote an archive, for what it says of its content."""
    spec = importlib.util.spec_from_file_location(name, FORMATS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ANNDATA, STORES = recipe("make_anndata"), recipe("make_spatialdata")
GENES, PIXEL_UM, array, counts = ANNDATA.GENES, ANNDATA.PIXEL_UM, ANNDATA.array, ANNDATA.counts


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "full.png"
    rng = np.random.default_rng(0)
    shade = rng.integers(150, 250, (70, 82, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(shade).save(path, compress_level=1)
    return path


def prepare(name, image, tmp_path, *options, archive="anndata.zip") -> int:
    """Prepare one of the objects that anndata wrote."""
    path = unpack(name, tmp_path, archive)
    target = tmp_path / "s"
    return scverse.run(
        ["--h5ad", str(path), "--image", str(image), "--directory", str(target), *options]
    )


def unpack(name: str, tmp_path: Path, archive: str = "anndata.zip") -> Path:
    """The .h5ad file of that name, or the .zarr folder if that is part of the name."""
    name = name if name.endswith(".zarr") else f"{name}.h5ad"
    with zipfile.ZipFile(FORMATS / archive) as packed:
        members = [m for m in packed.namelist() if m == name or m.startswith(f"{name}/")]
        packed.extractall(tmp_path, members)
    return tmp_path / name


def read(target):
    options = {"index_col": 0, "keep_default_na": False}
    locs = pd.read_csv(target / "locs-raw.csv", **options)
    record = json.loads((target / "prepare.json").read_text())
    return locs, pd.read_csv(target / "cnts.csv.gz", **options), record


def check_sample(target, genes=GENES) -> dict:
    """That the sample holds the 60 spots in tissue, their places and counts."""
    locs, found, record = read(target)
    table = array().iloc[4:]
    assert locs.index.tolist() == table.index.tolist()
    np.testing.assert_allclose(locs, table[["x", "y"]], atol=6e-4)
    assert found.columns.tolist() == genes
    np.testing.assert_array_equal(found, counts()[4:])
    assert float((target / "pixel-size-raw.txt").read_text()) == pytest.approx(PIXEL_UM, rel=1e-6)
    assert float((target / "radius-raw.txt").read_text()) == pytest.approx(22, rel=1e-5)
    return record


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("float", "X"),
        ("int", "X"),
        ("uint16", "X"),
        ("csr", "X"),
        ("csc", "X"),
        ("layer", "layer 'counts'"),
        ("sparse_layer", "layer 'umi'"),
        ("unknown_layer", "layer 'mine'"),
        ("raw", "raw"),
        ("scaled_raw_sparse", "raw"),
        ("fewer_genes", "raw"),
        ("text_in_tissue", "X"),
    ],
)
def test_raw_counts_are_found_wherever_they_are(name, place, image, tmp_path):
    assert prepare(name, image, tmp_path) == 0
    record = check_sample(tmp_path / "s")
    assert f"the counts are those of {place}" in record["notes"]
    assert record["spots_off_tissue"] == 4
    assert (tmp_path / "s" / "he-raw.png").read_bytes() == image.read_bytes()


def test_a_layer_can_be_named(image, tmp_path, capsys):
    assert prepare("layer", image, tmp_path, "--layer", "counts") == 0
    check_sample(tmp_path / "s")
    assert prepare("sparse_layer", image, tmp_path, "--layer", "lognorm") == 2
    assert "log-transformed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("log", "X runs up to"),
        ("log", "log-transformed"),
        ("sparse_log", "log-transformed"),
        ("normalised", "normalised"),
        ("scaled", "scaled, or residuals"),
        ("log_layer", "'counts'"),
        ("log_raw", "raw"),
        ("zeros", "or nothing"),
        ("no_genes", "or nothing"),
    ],
)
def test_normalised_values_are_refused(name, words, image, tmp_path, capsys):
    assert prepare(name, image, tmp_path) == 2
    message = capsys.readouterr().err
    assert "holds no raw counts" in message
    assert words in message
    assert str(tmp_path / f"{name}.h5ad") in message
    assert not (tmp_path / "s").exists()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 30), min_size=1, max_size=6), st.booleans())
def test_whole_counts_are_whole_and_not_negative(values, packed):
    matrix = np.array([values], np.float64)
    expected = all(v >= 0 and v == int(v) for v in values) and any(values)
    assert scverse.whole_counts(sparse.csr_array(matrix) if packed else matrix) == expected


@pytest.mark.parametrize("archive", ["anndata.zip", "anndata-0.7.zip"])
def test_categories_are_read_as_such_also_of_anndata_0_7(archive, image, tmp_path, capsys):
    """Their codes would put every spot but the first four off the tissue."""
    assert prepare("categories", image, tmp_path, "--library", "P1", archive=archive) == 0
    assert check_sample(tmp_path / "s")["spots_off_tissue"] == 4
    assert prepare("categories", image, tmp_path, "--library", "P2", archive=archive) == 2
    assert "has no section 'P2', but P1 (obs['sample'])" in capsys.readouterr().err


def test_objects_before_anndata_0_7_are_refused(image, tmp_path, capsys):
    with zipfile.ZipFile(FORMATS / "anndata.zip") as packed:
        packed.extract("float.h5ad", tmp_path)
    with h5py.File(tmp_path / "float.h5ad", "r+") as file:
        del file["obs"]  # it was one table of records
        file["obs"] = np.array([(b"AAAC-1", 1)], [("index", "S9"), ("in_tissue", "i8")])
    options = ["--h5ad", str(tmp_path / "float.h5ad"), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--image", str(image)]) == 2
    assert "written by anndata before 0.7" in capsys.readouterr().err


def test_spots_of_a_smaller_copy_are_not_laid_on_a_larger_image(image, tmp_path, capsys):
    """All of them fall on it, and the array fits: only the sizes tell, or the metadata."""
    with Image.open(image) as picture:
        large = np.asarray(picture).repeat(2, 0).repeat(2, 1)
    Image.fromarray(large).save(tmp_path / "large.png", compress_level=1)
    assert prepare("float", tmp_path / "large.png", tmp_path) == 2
    message = capsys.readouterr().err
    assert "is 1640 x 1400 px, but the coordinates refer to an image of about 820 x 700" in message
    assert not (tmp_path / "s").exists()
    size = ("--pixel-size", str(PIXEL_UM))
    assert prepare("float", tmp_path / "large.png", tmp_path, *size) == 0
    assert any("taken all the same" in note for note in read(tmp_path / "s")[2]["notes"])


def test_metadata_must_agree_with_the_spots(image, tmp_path, capsys):
    with Image.open(image) as picture:
        pixels = np.asarray(picture)
    metadata = {"axes": "YXS", "PhysicalSizeX": PIXEL_UM / 2, "PhysicalSizeY": PIXEL_UM / 2}
    path = tmp_path / "full.ome.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), metadata=metadata)
    assert prepare("float", path, tmp_path) == 2
    message = capsys.readouterr().err
    assert "has 0.625 um per pixel, but by the spots it has 1.25, a factor of 2" in message
    assert "add --pixel-size 1.25" in message
    assert prepare("float", path, tmp_path, "--pixel-size", "1.25") == 0
    assert any("The spots are believed" in note for note in read(tmp_path / "s")[2]["notes"])


def test_ensembl_ids_become_unique_symbols(image, tmp_path):
    assert prepare("ensembl", image, tmp_path) == 0
    check_sample(tmp_path / "s", ["TBCE", "KRT8", "TBCE.ENSG00000000002", "NA"])


def test_repeated_symbols_get_their_ids_and_antibodies_are_left_out(image, tmp_path):
    assert prepare("repeated", image, tmp_path) == 0
    record = check_sample(tmp_path / "s", ["TBCE", "KRT8", "TBCE.E3", "NA"])
    assert "1 features of type Antibody Capture are left out" in record["notes"]


def test_without_the_array_the_pixel_size_comes_from_the_nearest_spots(image, tmp_path):
    assert prepare("no_array", image, tmp_path) == 0
    assert len(read(tmp_path / "s")[0]) == 64
    size = float((tmp_path / "s" / "pixel-size-raw.txt").read_text())
    assert size == pytest.approx(PIXEL_UM, rel=1e-6)


def test_a_section_is_chosen_of_several(image, tmp_path, capsys):
    assert prepare("two_sections", image, tmp_path) == 2
    assert "--library" in capsys.readouterr().err
    assert prepare("two_sections", image, tmp_path, "--library", "P3") == 2
    assert "'P3'" in capsys.readouterr().err
    assert prepare("two_sections", image, tmp_path, "--library", "P1") == 0
    check_sample(tmp_path / "s")


@pytest.mark.parametrize("name", ["table_of_places", "seurat_places"])
def test_places_in_a_table_are_taken_by_the_names_of_its_columns(name, image, tmp_path):
    """y stands before x in it; Seurat calls them imagerow and imagecol."""
    assert prepare(name, image, tmp_path) == 0
    check_sample(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("joined", "P1, P2 (obs['library_id'])"),
        ("joined_batch", "P1, P2 (obs['batch'])"),
        ("joined_own_column", "P1, P2 (obs['whose'])"),
        ("joined_nameless", "No column of obs tells them apart"),
        ("joined_same_ids", "64 spots have the id of another"),
    ],
)
def test_sections_joined_without_uns_are_told_apart(name, told, image, tmp_path, capsys):
    assert prepare(name, image, tmp_path) == 2
    message = capsys.readouterr().err
    assert "seems to hold several sections" in message
    assert told in message
    assert ("--library all" in message) == (name != "joined_same_ids")
    assert not (tmp_path / "s").exists()


def test_a_joined_section_is_taken_by_name(image, tmp_path, capsys):
    assert prepare("joined", image, tmp_path, "--library", "P2") == 0
    locs, found, _ = read(tmp_path / "s")
    np.testing.assert_allclose(
        locs.to_numpy() - np.array([37, 25]), array()[["x", "y"]][4:], atol=6e-4
    )
    np.testing.assert_array_equal(found, counts()[4:])
    assert prepare("joined_own_column", image, tmp_path, "--library", "whose=P1") == 0
    np.testing.assert_allclose(read(tmp_path / "s")[0], array()[["x", "y"]], atol=6e-4)
    assert prepare("joined_nameless", image, tmp_path, "--library", "all", "--force") == 0
    locs, _, record = read(tmp_path / "s")
    assert len(locs) == 128
    assert any("taken for one section" in note for note in record["notes"])


def test_a_section_that_only_uns_names_is_not_asked_for_in_a_circle(image, tmp_path, capsys):
    path = unpack("two_sections", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["obs/library_id"]
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--library", "P1"]) == 2
    assert "no column of obs says which spots are of it" in capsys.readouterr().err


def test_the_scales_of_another_section_are_not_used(image, tmp_path):
    """uns holds the section that came first; the hires copy of P2 is not that of P1."""
    path = unpack("two_sections", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["uns/spatial/P2"]
        file["uns/spatial/P1/images/hires"] = np.zeros((50, 50, 3), "f4")
        file["uns/spatial/P1/scalefactors/tissue_hires_scalef"] = 0.2
        file["obsm/spatial"][64:] = file["obsm/spatial"][:64]
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--library", "P1"]) == 2
    assert scverse.run([*options, "--library", "P2"]) == 0


def test_pieces_of_one_array_are_one_section(image, tmp_path):
    """A column called sample has two values, but all spots lie on one array."""
    assert prepare("one_array", image, tmp_path) == 0
    check_sample(tmp_path / "s")


def spots_at(xy, rows_cols=None):
    return libraries.Spots(np.arange(len(xy)).astype(object), np.asarray(xy, float), rows_cols)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), pitch=st.floats(5, 300), turn=st.floats(0, 3.2),
    shift=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)), share=st.floats(0.3, 1),
)  # fmt: skip
def test_one_lattice_is_told_from_two(seed, pitch, turn, shift, share):
    """Of any pitch and turn, with holes, and by hand a little off its places."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[:14, :14]
    xy = np.column_stack([(col + row % 2 / 2).ravel(), (row * np.sqrt(3) / 2).ravel()])
    xy = xy[np.hypot(*(xy - xy.mean(0)).T) < 6]
    xy = xy[rng.permutation(len(xy))[: int(0.8 * len(xy))]]
    spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    one = xy @ spin * pitch
    assert spots_at(one + rng.normal(0, 0.02 * pitch, one.shape)).several() == ""
    step = np.array([[1, 0], [0.5, np.sqrt(3) / 2]])
    other = (xy + np.array(shift) @ step)[: int(share * len(xy))] @ spin * pitch
    assert spots_at(np.concatenate([one, other])).several()


def test_a_few_spots_of_one_array_are_one_section():
    """Of a cluster, say: some are neighbours, most are far apart. Only the array tells."""
    table = array()
    rng = np.random.default_rng(3)
    chosen = table.iloc[np.sort(rng.permutation(64)[:24])]
    xy, place = (chosen[list(names)].to_numpy(float) for names in ("xy", libraries.ARRAY))
    assert spots_at(xy, place).several() == ""
    assert spots_at(xy, place[::-1]).several() == spots_at(xy).several() != ""


def test_what_has_no_value_is_left_out_and_counted(image, tmp_path):
    """Nullable columns and categories of anndata 0.12, in HDF5 and in both formats of zarr."""
    for name in ("without_values", "zarr2.zarr", "zarr3.zarr"):
        assert prepare(name, image, tmp_path, "--library", "P1") == 0
        locs, found, record = read(tmp_path / "s")
        table = array().iloc[4:62]
        assert locs.index.tolist() == table.index.tolist()
        np.testing.assert_allclose(locs, table[["x", "y"]], atol=6e-4)
        np.testing.assert_array_equal(found, counts()[4:62, :3])
        assert found.columns.tolist() == GENES[:3]
        assert float((tmp_path / "s" / "pixel-size-raw.txt").read_text()) == pytest.approx(1.25)
        for note in (
            "the counts are those of layer 'counts'",
            "1 features of type no type are left out",
            "1 spots without a value in in_tissue are left out",
            "2 spots without a value in obs['section'] are left out",
            "1 spots have no array_row or array_col; the others tell the array",
        ):
            assert note in record["notes"]
        assert any(n.startswith("X runs up to 8.") and "passed over" in n for n in record["notes"])


def test_a_category_without_value_is_not_the_last_one():
    np.testing.assert_array_equal(
        annotated.categories_of(["a", "b"], np.array([0, -1, 1], np.int8)), ["a", "", "b"]
    )
    for code in (-2, 2):
        with pytest.raises(ValueError, match="of 2 categories"):
            annotated.categories_of(["a", "b"], np.array([code]))


def test_indices_of_64_bits_are_read(image, tmp_path):
    assert prepare("wide_indices", image, tmp_path) == 0
    check_sample(tmp_path / "s")


def test_exchanged_x_and_y_are_noted(tmp_path):
    """On a square image nothing else tells: every spot falls on it, and the lattice fits."""
    Image.new("RGB", (820, 820), "pink").save(tmp_path / "square.png")
    assert prepare("exchanged", tmp_path / "square.png", tmp_path) == 0
    record = read(tmp_path / "s")[2]
    assert record["array_mirrored"] is True
    assert any("x and y of the positions are exchanged" in note for note in record["notes"])
    assert prepare("float", tmp_path / "square.png", tmp_path, "--pixel-size", "1.25") == 0
    record = read(tmp_path / "s")[2]
    assert record["array_mirrored"] is False
    assert not any("positions are exchanged" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("values", "words"),
    [(["1", "0", "maybe"], "obs['in_tissue'] holds maybe"), (["TRUE", "FALSE", "true"], "")],
)
def test_in_tissue_is_yes_or_no(values, words, image, tmp_path, capsys):
    path = unpack("float", tmp_path)
    with h5py.File(path, "r+") as file:
        del file["obs/in_tissue"]
        file["obs/in_tissue"] = np.array([values[min(i // 4, 2)] for i in range(64)], "S")
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == (2 if words else 0)
    assert words in capsys.readouterr().err
    if not words:
        assert len(read(tmp_path / "s")[0]) == 60


def huge_dense(file):
    del file["X"]
    file.create_dataset("X", (10**6, 10**6), "f4", chunks=(1000, 1000))
    rename(file, 10**6)


def huge_sparse(file):
    """Whole, but for its size: nothing is stored."""
    del file["X"]
    group = file.create_group("X")
    group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", (10**6, 10**6)
    for name, n in (("data", 0), ("indices", 0), ("indptr", 10**6 + 1)):
        group.create_dataset(name, (n,), "i8", chunks=(1000,) if n else None)
    rename(file, 10**6)


def rename(file, n):
    """As many rows and columns; the places of none of them are stored."""
    for table in ("obs", "var"):
        for name in list(file[table]):
            del file[table][name]
        file[table].create_dataset("_index", (n,), h5py.string_dtype(), chunks=(10**6,))
        file[table].attrs["_index"] = "_index"
    del file["obsm/spatial"]
    file["obsm"].create_dataset("spatial", (n, 2), "f8", chunks=(10**6, 2))


def huge_names(file):
    rename(file, 10**10)


def huge_places(file):
    del file["obsm/spatial"]
    file["obsm"].create_dataset("spatial", (64, 10**11), "f8", chunks=(64, 10**6))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (huge_dense, "1,000,000 spots x 1,000,000 genes"),
        (huge_sparse, "1,000,000 spots x 1,000,000 genes"),
        (huge_names, "declares 10,000,000,000 rows of obs"),
        (huge_places, "GB can be read here"),
    ],
)
def test_what_declares_too_much_is_refused_by_its_header(
    spoil, words, image, tmp_path, capsys, monkeypatch
):
    """The empty names of the million are equal; that comes first otherwise."""
    monkeypatch.setattr(libraries.Spots, "several", lambda spots: "")
    path = unpack("float", tmp_path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--library", "all"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["csr", "without_values", "joined"])
def test_damaged_bytes_are_refused_or_do_no_harm(name, image, tmp_path):
    """No error but a message, wherever a byte is changed or the file ends."""
    whole = unpack(name, tmp_path).read_bytes()
    path = tmp_path / "damaged.h5ad"
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    args = scverse.build_parser().parse_args([*options, "--library", "all"])
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(15):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        damaged = damaged[: rng.integers(1, len(whole))] if rng.random() < 0.2 else damaged
        path.write_bytes(damaged.tobytes())
        try:
            scverse.prepare(args)
        except utils.StageError as error:
            refused.append(str(error))
    assert len(refused) > 2
    assert all(str(path) in message or str(image) in message for message in refused)


def other_content(name):
    def spoil(path):
        path.unlink()
        with h5py.File(path, "w") as file:
            file.create_group(name)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_content("matrix"), "prepare/visium.py"),
        (other_content("mod"), "MuData"),
        (other_content("assays"), "h5Seurat"),
        (other_content("row_attrs"), ".loom"),
        (other_content("things"), "holds things, no obs and var"),
        (lambda p: p.write_text("<!DOCTYPE html><title>Sign in"), "is text ('<!DOCTYP')"),
        (lambda p: p.write_bytes(b"PK\3\4 and so on"), "unzip"),
        (lambda p: p.write_bytes(b"\x1f\x8b and so on"), "gunzip"),
    ],
)
def test_another_format_gets_its_name_and_a_way_out(spoil, words, image, tmp_path, capsys):
    path = unpack("float", tmp_path)
    spoil(path)
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "download it again" not in message


def test_an_object_of_r_gets_its_name_and_a_way_out(image, tmp_path, capsys):
    path = tmp_path / "section.rds"
    path.write_bytes(b"\x1f\x8b and so on")  # R packs by gzip
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    message = capsys.readouterr().err
    assert "section.rds is an object of R" in message
    assert "anndataR" in message


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("swapped", (), "fall on the image"),
        ("five_times", (), "tissue_hires_scalef"),
        ("three_times", (), "fall on the image"),
        ("float", ("--pixel-size", "0.5"), "expected 100 um"),
        ("float", ("--layer", "mine"), "no layer 'mine'"),
        ("no_places", (), "no obsm['spatial']"),
        ("not_finite", (), "holds what is no number"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, words, image, tmp_path, capsys):
    assert prepare(name, image, tmp_path, *options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert not (tmp_path / "s").exists()


def spoil_indices(file):
    file["X/indices"][5] = 99


def drop_matrix(file):
    del file["X"], file["uns"]


def unknown_encoding(file):
    file["X"].attrs["encoding-type"] = "awkward-array"


@pytest.mark.parametrize("spoil", [spoil_indices, unknown_encoding, drop_matrix])
def test_a_damaged_object_is_named(spoil, image, tmp_path, capsys):
    with zipfile.ZipFile(FORMATS / "anndata.zip") as packed:
        packed.extract("csr.h5ad", tmp_path)
    with h5py.File(tmp_path / "csr.h5ad", "r+") as file:
        spoil(file)
    options = ["--h5ad", str(tmp_path / "csr.h5ad"), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--image", str(image)]) == 2
    assert str(tmp_path / "csr.h5ad") in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def replaced(name, values):
    def spoil(file):
        del file[name]
        file[name] = values

    return spoil


def two_columns_of_sections(file):
    """The name P1 stands in both, for other spots."""
    file["obs/batch"] = np.array(["P1", "P2"] * 32, "S")
    file["obs/slide"] = np.array(["P2", "P1"] * 32, "S")


def without_the_array(file):
    """A column that usually names sections, and no array to tell that there is one."""
    del file["obs/array_row"]
    file["obs/batch"] = np.array(["P1"] * 32 + ["P2"] * 32, "S")


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (replaced("obs/in_tissue", np.ones(63)), (), "obs['in_tissue'] has 63 of 64 values"),
        (replaced("X", np.ones((64, 3))), (), "X is (64, 3) for 64 obs and 4 var"),
        (replaced("obsm/spatial", np.ones((64, 1))), (), "is (64, 1); expected x and y of 64"),
        (replaced("obsm/spatial", np.ones((63, 2))), (), "is (63, 2); expected x and y of 64"),
        (
            replaced("obs/array_row", np.array(["1"] * 63 + ["one"], "S")),
            (),
            "obs['array_row'] holds 'one'; expected numbers",
        ),
        (replaced("obs/in_tissue", np.zeros(64, int)), (), "has no spot in tissue"),
        (two_columns_of_sections, ("--library", "P1"), "Name the column, too: --library slide=P1"),
        (without_the_array, (), "may hold several sections. Sections may be P1, P2 (obs['batch'])"),
        (
            replaced("uns/spatial/P1/scalefactors/tissue_hires_scalef", -0.2),
            (),
            "says of the copies of the image: scales {'tissue_hires_scalef': -0.2}",
        ),
        (replaced("uns/spatial/P1/images/hires", np.ones(3)), (), "hires of (3,) px"),
    ],
)
def test_what_an_object_says_wrongly_is_named(spoil, options, words, image, tmp_path, capsys):
    path = unpack("float", tmp_path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    rest = ["--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(["--h5ad", str(path), *rest, *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}")
    assert words in message
    assert not (tmp_path / "s").exists()


def nullable_names(file):
    """As anndata 0.12 writes names that are a column of strings of pandas."""
    names = [f"AAAC{i:03d}-1" for i in range(64)]
    del file["obs/_index"]
    group = file.create_group("obs/_index")
    group.attrs["encoding-type"] = "nullable-string-array"
    group["values"], group["mask"] = names, np.zeros(64, bool)


def mixed_array(file):
    """Every place of the array once, but not at the spot that is there."""
    order = np.random.default_rng(0).permutation(64)
    for name in libraries.ARRAY:
        file[f"obs/{name}"][:] = file[f"obs/{name}"][:][order]


@pytest.mark.parametrize(
    ("spoil", "options", "note"),
    [
        (nullable_names, (), "the counts are those of X"),
        (lambda _: None, ("--library", "P1"), "the counts are those of X"),
        (
            mixed_array,
            ("--pixel-size", str(PIXEL_UM)),
            "the pixel size is taken as given, but ",
        ),
    ],
)
def test_what_an_object_says_in_another_way_is_read(spoil, options, note, image, tmp_path):
    """P1 is the name of the only section in uns; no column has it, for all spots are of it."""
    path = unpack("float", tmp_path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    rest = ["--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(["--h5ad", str(path), *rest, *options]) == 0
    assert any(text.startswith(note) for text in check_sample(tmp_path / "s")["notes"])


def test_repeated_symbols_with_repeated_ids_are_told_apart_by_their_places(image, tmp_path):
    """Gene ids that repeat, as those of a joined object may, would give the same name twice."""
    path = unpack("repeated", tmp_path)
    with h5py.File(path, "r+") as file:
        replaced("var/gene_ids", np.array(["E1"] * 5, "S"))(file)
    rest = ["--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(["--h5ad", str(path), *rest]) == 0
    check_sample(tmp_path / "s", ["TBCE", "KRT8", "TBCE.3", "NA"])


def test_columns_that_do_not_tell_sections_apart_are_not_offered(image, tmp_path, capsys):
    path = unpack("joined_own_column", tmp_path)
    with h5py.File(path, "r+") as file:
        file["obs/half"] = np.array(["left", "right"] * 64, "S")
    rest = ["--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(["--h5ad", str(path), *rest]) == 2
    message = capsys.readouterr().err
    assert "P1, P2 (obs['whose'])" in message
    assert "half" not in message


def test_a_few_spots_do_not_show_a_lattice():
    """Two spots near each other among 19 may be of one section; among 20 they are counted."""
    xy = np.array([(100.0 * (i % 5), 100.0 * (i // 5)) for i in range(19)] + [(20.0, 0.0)])
    assert spots_at(xy[1:]).several() == ""
    assert "of the spots lie nearer to another one" in spots_at(xy).several()


@pytest.mark.parametrize("content", [b"", b"no hdf5", None])
def test_a_file_that_is_no_anndata_is_named(content, image, tmp_path, capsys):
    if content is not None:
        (tmp_path / "a.h5ad").write_bytes(content)
    options = ["--h5ad", str(tmp_path / "a.h5ad"), "--directory", str(tmp_path / "s")]
    assert scverse.run([*options, "--image", str(image)]) == 2
    assert str(tmp_path / "a.h5ad") in capsys.readouterr().err


def test_the_hires_copies_inside_are_not_taken_for_the_image(tmp_path, capsys):
    with zipfile.ZipFile(FORMATS / "anndata.zip") as packed:
        packed.extract("float.h5ad", tmp_path)
    options = ["--h5ad", str(tmp_path / "float.h5ad"), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    assert "full-resolution image" in capsys.readouterr().err


# -------------------------------------------------------------------------------- SpatialData
@pytest.fixture(params=["new.zarr", "old.zarr"])
def store(request, tmp_path):
    with zipfile.ZipFile(FORMATS / "spatialdata.zip") as packed:
        packed.extractall(tmp_path / "stores")
    return tmp_path / "stores" / request.param


def prepare_store(store, target, *options) -> int:
    return scverse.run(["--spatialdata", str(store), "--directory", str(target), *options])


def check_store(target):
    known = STORES
    locs, found, record = read(target)
    assert locs.index.tolist() == [f"AAAC{i:02d}-1" for i in range(36)]
    np.testing.assert_array_equal(found, known.counts())
    assert found.columns.tolist() == known.GENES
    size = float((target / "pixel-size-raw.txt").read_text())
    assert "the counts are those of layer 'counts'" in record["notes"]
    return locs, size


def test_a_store_of_spatialdata_is_read_with_its_transforms(store, tmp_path):
    assert prepare_store(store, tmp_path / "s") == 0
    locs, size = check_store(tmp_path / "s")
    np.testing.assert_allclose(locs, STORES.spots(), atol=1e-3)
    record = json.loads((tmp_path / "s" / "prepare.json").read_text())
    parts = {Path(name).relative_to(store).parts[0] for name in record["inputs"]}
    assert parts == {"tables", "shapes", "images"}
    assert size == pytest.approx(2.0, rel=1e-4)
    found = tifffile.imread(tmp_path / "s" / "he-raw.tif")
    np.testing.assert_array_equal(found, np.moveaxis(STORES.image(), 0, 2))


@pytest.mark.parametrize("lost", ["shapes", "images", "all"])
def test_a_store_that_is_removed_while_it_is_read_is_not_taken_for_empty(
    store, tmp_path, monkeypatch, capsys, lost
):
    """To zarr, a chunk that is not there holds zeros."""
    honest = stores.read_spatialdata

    def read_and_remove(args):
        found = honest(args)
        shutil.rmtree(store if lost == "all" else store / lost)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(stores, "read_spatialdata", read_and_remove)
        assert prepare_store(store, tmp_path / "s") == 2
    said = capsys.readouterr().err
    assert "went while prepare/scverse.py ran and read it" in said
    assert "Bring it back, then run the same command" in said
    assert not (tmp_path / "s").exists()


def test_a_table_that_is_changed_while_it_is_read_is_named(image, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    write_plain(str(tmp_path / "data" / "P1-"), image)
    honest = scverse.read_tables

    def read_and_edit(args):
        found = honest(args)
        path = tmp_path / "data" / "P1-cnts.csv"
        path.write_text(path.read_text() + "\n")
        return found

    monkeypatch.setattr(scverse, "read_tables", read_and_edit)
    options = ["--tables", str(tmp_path / "data" / "P1-"), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    assert "P1-cnts.csv changed while prepare/scverse.py ran" in capsys.readouterr().err


def test_a_store_is_cut_to_the_spots_and_levels_are_used(store, tmp_path):
    slide = stores.ZarrSlide(store / "images" / "he")
    assert slide.downsamples == (1, 2)
    half = slide.read_region(0, 0, 384, 320, 2)
    assert np.abs(half.astype(int) - np.moveaxis(STORES.image(), 0, 2)[::2, ::2]).max() <= 1
    assert prepare_store(store, tmp_path / "s", "--crop-um", "40") == 0
    locs, size = check_store(tmp_path / "s")
    np.testing.assert_allclose(locs, STORES.spots() - 20, atol=1e-3)
    found = tifffile.imread(tmp_path / "s" / "he-raw.tif")
    known = np.moveaxis(STORES.image(), 0, 2)[20:, 20:]
    np.testing.assert_array_equal(found, known[: len(found), : found.shape[1]])
    assert size == pytest.approx(2.0, rel=1e-4)


def test_an_image_beside_the_store_has_the_pixels_of_its_shapes(store, tmp_path):
    Image.new("RGB", (300, 300), "pink").save(tmp_path / "full.png")
    options = ("--image", str(tmp_path / "full.png"), "--pitch-um", "50")
    assert prepare_store(store, tmp_path / "s", *options) == 0
    locs, size = check_store(tmp_path / "s")
    known = STORES
    np.testing.assert_allclose(locs, known.spots() * known.SCALE + known.SHIFT, atol=1e-3)
    assert size == pytest.approx(2.0, rel=1e-3)


@pytest.fixture
def stores_folder(tmp_path):
    with zipfile.ZipFile(FORMATS / "spatialdata.zip") as packed:
        packed.extractall(tmp_path / "stores")
    return tmp_path / "stores"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "has the tables other, table"),
        (("--table", "table"), "he (384 x 320 px), hires (39 x 32 px)"),
        (("--table", "table", "--image-element", "dapi"), "uint16 (1, 320, 384)"),
        (("--table", "table", "--image-element", "cy5"), "has the images dapi, he, hires"),
    ],
)
def test_of_several_tables_and_images_one_is_asked_for(
    stores_folder, tmp_path, capsys, options, words
):
    assert prepare_store(stores_folder / "many.zarr", tmp_path / "s", *options) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "download" not in message
    options = ("--table", "other", "--image-element", "he")
    assert prepare_store(stores_folder / "many.zarr", tmp_path / "s", *options) == 0
    np.testing.assert_allclose(check_store(tmp_path / "s")[0], STORES.spots(), atol=1e-3)


def test_of_the_sections_of_a_store_one_is_asked_for(stores_folder, tmp_path, capsys):
    store = stores_folder / "two.zarr"
    assert prepare_store(store, tmp_path / "s") == 2
    assert "is of more, spots" in capsys.readouterr().err
    assert prepare_store(store, tmp_path / "s", "--shapes", "more") == 0
    locs, found, _ = read(tmp_path / "s")
    assert locs.index.tolist() == [f"AAAC{i:02d}-2" for i in range(36)]
    moved = np.array([5, 3]) / STORES.SCALE
    np.testing.assert_allclose(locs.to_numpy() - moved, STORES.spots(), atol=1e-3)
    np.testing.assert_array_equal(found, STORES.counts())


def test_rows_of_a_table_that_tell_no_section_are_left_out_and_counted(stores_folder, tmp_path):
    table = zarr.open_group(stores_folder / "two.zarr" / "tables" / "table", mode="r+")
    table["obs/region/codes"][:2] = -1  # one more would be the last category
    options = ("--shapes", "spots")
    assert prepare_store(stores_folder / "two.zarr", tmp_path / "s", *options) == 0
    locs, found, record = read(tmp_path / "s")
    assert locs.index.tolist() == [f"AAAC{i:02d}-1" for i in range(2, 36)]
    np.testing.assert_array_equal(found, STORES.counts()[2:])
    assert "2 rows of the table without a region are left out" in record["notes"]


def test_an_image_that_alone_shares_a_system_with_the_spots_is_taken(stores_folder, tmp_path):
    store = stores_folder / "many.zarr"
    change_text("images/hires", '"hires"', '"elsewhere"')(store)
    assert prepare_store(store, tmp_path / "s", "--table", "table") == 0
    np.testing.assert_allclose(check_store(tmp_path / "s")[0], STORES.spots(), atol=1e-3)


def test_coordinate_systems_that_differ_are_asked_for(stores_folder, tmp_path, capsys):
    """In one of them the transform mirrors the image; the spots follow it."""
    store = stores_folder / "mirrored.zarr"
    assert prepare_store(store, tmp_path / "s") == 2
    message = capsys.readouterr().err
    assert "--coordinate-system" in message
    assert "global: x " in message
    assert "turned: x " in message
    options = ("--coordinate-system", "global")
    assert prepare_store(store, tmp_path / "s", *options) == 0
    np.testing.assert_allclose(check_store(tmp_path / "s")[0], STORES.spots(), atol=1e-3)
    assert prepare_store(store, tmp_path / "s", "--coordinate-system", "hires") == 2
    assert "that is called 'hires'" in capsys.readouterr().err


def test_a_system_can_be_that_of_an_image_beside_the_store(stores_folder, tmp_path, capsys):
    Image.new("RGB", (300, 300), "pink").save(tmp_path / "full.png")
    options = ("--image", str(tmp_path / "full.png"), "--pitch-um", "50")
    store = stores_folder / "mirrored.zarr"
    assert prepare_store(store, tmp_path / "s", *options, "--coordinate-system", "turned") == 0
    homogeneous = np.column_stack([STORES.spots(), np.ones(len(STORES.spots()))])
    known = (homogeneous @ STORES.MIRROR.T)[:, :2] + (50, 0)
    np.testing.assert_allclose(check_store(tmp_path / "s")[0], known, atol=1e-3)
    assert prepare_store(store, tmp_path / "s", *options, "--coordinate-system", "x") == 2
    assert "is not in 'x', but in" in capsys.readouterr().err


def test_the_scale_of_the_finest_level_is_part_of_the_transform(stores_folder, tmp_path):
    """spatialdata writes 1 there; other writers of OME-Zarr the pixel size."""
    store = stores_folder / "new.zarr"
    path = attributes_file(store, "images/he")
    content = json.loads(path.read_text())
    multiscale = content["attributes"]["ome"]["multiscales"][0]
    (own,) = multiscale["datasets"][0]["coordinateTransformations"]
    own["scale"] = [1.0, 0.25, 0.25]
    (move,) = (t for t in multiscale["coordinateTransformations"] if t["type"] == "sequence")
    for step in move["transformations"]:
        if step["type"] == "scale":
            step["scale"] = [n if n == 1 else n * 4 for n in step["scale"]]
    path.write_text(json.dumps(content))
    assert prepare_store(store, tmp_path / "s") == 0
    np.testing.assert_allclose(check_store(tmp_path / "s")[0], STORES.spots(), atol=1e-3)


def change_shapes(change):
    def spoil(store):
        path = store / "shapes" / "spots" / "shapes.parquet"
        change(pd.read_parquet(path)).to_parquet(path)

    return spoil


def unlink_table(store):
    table = zarr.open_group(store / "tables" / "table", mode="r+")
    del table["uns/spatialdata_attrs"]


def to_polygons(store):
    path = store / "shapes" / "spots" / "shapes.parquet"
    table = pd.read_parquet(path)
    polygon = struct.pack("<BIIIdd", 1, 3, 1, 1, 0.0, 0.0)
    table.assign(geometry=[polygon] * len(table)).to_parquet(path)


def declare(store, **changes):
    """Another shape of the finest level, of which nothing more is stored."""
    path = attributes_file(store, "images/he/s0")
    content = json.loads(path.read_text())
    content["shape"] = changes.get("shape", content["shape"])
    if "chunk" in changes:
        content["chunk_grid"]["configuration"]["chunk_shape"] = changes["chunk"]
    path.write_text(json.dumps(content))


def singular(store):
    path = attributes_file(store, "images/he")
    content = json.loads(path.read_text())
    for listed in content["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"]:
        for step in listed.get("transformations", []):
            if step["type"] == "scale":
                step["scale"] = [1, 0, 0]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (to_polygons, "holds shapes of type 3"),
        (lambda s: declare(s, shape=[3, 10**6, 10**6]), "1,000,000 x 1,000,000 px"),
        (
            lambda s: declare(s, shape=[3, 10**6, 10**6], chunk=[3, 10**6, 10**6]),
            "chunks of 3,000,000,000,000 values",
        ),
        (singular, "a transform into 'global' that cannot be undone"),
        (lambda s: declare(s, shape=[3, 0, 384]), "levels of [(384, 0), (192, 160)] px"),
        (
            change_shapes(lambda t: t.assign(geometry="POINT (1 2)")),
            "holds shapes as str, not in well-known binary",
        ),
        (
            change_shapes(lambda t: t.set_index(t.index.where(t.index != 7, 8))),
            "the shapes 8 are there more than once",
        ),
        (unlink_table, "does not say which shapes it is of"),
        (
            change_shapes(lambda t: t.assign(geometry=t["geometry"].iloc[0])),
            "seems to hold the spots of several sections: 35 spots have the x and y of another.",
        ),
        (lambda s: (s / "shapes" / "spots" / "shapes.parquet").unlink(), "has no shapes.parquet"),
        (lambda s: shutil.rmtree(s / "tables"), "has no tables"),
        (lambda s: shutil.rmtree(s / "images"), "has no images"),
    ],
)
def test_what_a_store_holds_instead_is_named(stores_folder, tmp_path, capsys, spoil, words):
    spoil(stores_folder / "new.zarr")
    assert prepare_store(stores_folder / "new.zarr", tmp_path / "s") == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Copy or download it again" not in message


def test_shapes_that_no_row_of_the_table_is_of_are_named(stores_folder, tmp_path, capsys):
    store = stores_folder / "two.zarr"
    table = zarr.open_group(store / "tables" / "table", mode="r+")
    table["obs/region/codes"][:] = list(table["obs/region/categories"][:]).index("spots")
    assert prepare_store(store, tmp_path / "s", "--shapes", "more") == 2
    assert "annotates spots, not more.\nChoose one of them by --shapes" in capsys.readouterr().err


def test_spots_that_lie_as_those_of_two_sections_are_taken_when_the_user_insists(
    stores_folder, tmp_path, capsys
):
    """Every second spot is moved next to another one: no lattice has such distances."""
    store = stores_folder / "new.zarr"
    path = store / "shapes" / "spots" / "shapes.parquet"
    table = pd.read_parquet(path).sort_index()
    xy = np.array([struct.unpack("<dd", shape[5:]) for shape in table["geometry"]])
    xy[1::2] = xy[::2] + np.array([3, 0])
    table["geometry"] = [struct.pack("<BIdd", 1, 1, *place) for place in xy]
    table.to_parquet(path)
    assert prepare_store(store, tmp_path / "s", "--pixel-size", "2") == 2
    message = capsys.readouterr().err
    assert "seems to hold the spots of several sections" in message
    assert "If it is one, say --shapes spots." in message
    args = ["--spatialdata", str(store), "--directory", str(tmp_path / "s"), "--shapes", "spots"]
    spots = stores.read_spatialdata(scverse.build_parser().parse_args(args))
    np.testing.assert_allclose(
        (spots.places[["x", "y"]] * STORES.SCALE + STORES.SHIFT).to_numpy(), xy, atol=1e-3
    )
    assert any(note.startswith("by --shapes spots these spots are taken") for note in spots.notes)


def test_one_kind_of_store_given_for_another_is_named(stores_folder, image, tmp_path, capsys):
    rest = ["--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(["--h5ad", str(stores_folder / "new.zarr"), *rest]) == 2
    assert "Give it by --spatialdata" in capsys.readouterr().err
    for name in ("float", "zarr3.zarr"):
        path = unpack(name, tmp_path)
        assert scverse.run(["--spatialdata", str(path), *rest]) == 2
        assert f"prepare/scverse.py --h5ad {path}" in capsys.readouterr().err
    packed = shutil.make_archive(str(tmp_path / "new.zarr"), "zip", stores_folder / "new.zarr")
    for option in ("--h5ad", "--spatialdata"):
        assert scverse.run([option, packed, *rest]) == 2
        assert f"unzip {packed}" in capsys.readouterr().err


def attributes_file(store, element):
    new = store / element / "zarr.json"
    return new if new.exists() else store / element / ".zattrs"


def change_text(element, old, new):
    def spoil(store):
        path = attributes_file(store, element)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return spoil


def drop_shape(store):
    path = store / "shapes" / "spots" / "shapes.parquet"
    pd.read_parquet(path).iloc[:-2].to_parquet(path)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda s: None, ("--shapes", "cells"), "'cells'"),
        (lambda s: None, ("--table", "other"), "'other'"),
        (lambda s: None, ("--image-element", "dapi"), "'dapi'"),
        (lambda s: None, ("--layer", "raw"), "no layer 'raw'"),
        (drop_shape, (), "lacks 2 of 36"),
        (
            change_text("shapes/spots", '"global"', '"aligned"'),
            (),
            "no coordinate system in common",
        ),
        (change_text("images/he", '"sequence"', '"bspline"'), (), "'bspline'"),
        (change_text("images/he", '"multiscales"', '"other"'), (), "no multiscale image"),
    ],
)
def test_a_store_that_lacks_something_is_refused(store, tmp_path, capsys, spoil, options, words):
    spoil(store)
    assert prepare_store(store, tmp_path / "s", *options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert not (tmp_path / "s").exists()


def test_transforms_with_axes_in_any_order():
    """As spatialdata writes an affine of x, y for an image c, y, x: rows are in the output's
    order, columns in the input's."""

    def axes(names):
        return {"name": "a", "axes": [{"name": name} for name in names]}

    ends = {"input": axes("cyx"), "output": axes("cxy")}
    affine = {"type": "affine", "affine": [[1, 0, 0, 0], [0, -2, 0, 10], [0, 0, 2, 20]], **ends}
    expected = np.array([[0, -2, 10], [2, 0, 20], [0, 0, 1]])
    np.testing.assert_array_equal(stores.matrix_of(affine), expected)
    ends = {"input": axes("cyx"), "output": axes("cyx")}
    scale = {"type": "scale", "scale": [1, 3, 2]}
    shift = {"type": "translation", "translation": [0, 7, 5]}
    both = {"type": "sequence", "transformations": [scale, shift], **ends}
    np.testing.assert_array_equal(stores.matrix_of(both), [[2, 0, 5], [0, 3, 7], [0, 0, 1]])


# -------------------------------------------------------------------------------- plain tables
def write_plain(start: str, image, tabs: bool = False) -> None:
    """The layout of iStar and of the published HISTEX: spot ids, x and y, one number a file."""
    table, ending = array(), "tsv" if tabs else "csv"
    options = {"sep": "\t" if tabs else ","}
    locs = table[["x", "y"]].sample(frac=1, random_state=0)
    locs.to_csv(f"{start}locs-raw.{ending}", index_label="spot", **options)
    pd.DataFrame(counts(), index=table.index, columns=GENES).to_csv(
        f"{start}cnts.{ending}", **options
    )
    with open(f"{start}pixel-size-raw.txt", "w") as file:  # noqa: PTH123
        file.write(f"{PIXEL_UM}\n")
    with Image.open(image) as picture:
        picture.save(f"{start}he-raw.jpg", quality=95)


@pytest.mark.parametrize("tabs", [True, False])
@pytest.mark.parametrize("start", ["data/", "data/P1-"])
def test_plain_tables_in_a_folder_or_after_a_prefix(image, tmp_path, tabs, start):
    (tmp_path / "data").mkdir()
    write_plain(str(tmp_path / "data") + start[4:], image, tabs)
    prefix = str(tmp_path / "data") if start == "data/" else str(tmp_path / start)
    assert scverse.run(["--tables", prefix, "--directory", str(tmp_path / "s")]) == 0
    locs, found, record = read(tmp_path / "s")
    assert locs.index.tolist() == array().index.tolist()
    np.testing.assert_allclose(locs, array()[["x", "y"]], atol=6e-4)
    kinds = {Path(name).name.removeprefix("P1-").split(".")[0] for name in record["inputs"]}
    assert kinds == {"cnts", "locs-raw", "pixel-size-raw", "he-raw"}
    np.testing.assert_array_equal(found, counts())
    assert found.columns.tolist() == GENES
    assert float((tmp_path / "s" / "radius-raw.txt").read_text()) == pytest.approx(22)
    assert image_calibration.run(["--directory", str(tmp_path / "s")]) == 0
    assert float((tmp_path / "s" / "pixel-size.txt").read_text()) == utils.PIXEL_SIZE_UM


def test_plain_tables_of_legacy_st_with_repeated_genes(image, tmp_path, capsys):
    """Spots 200 um apart, placed by hand: told what platform it may be, and then taken."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_plain(f"{folder}/", image)
    column, row = np.meshgrid(np.arange(7), np.arange(6))
    rng = np.random.default_rng(1)
    xy = np.column_stack([column.ravel(), row.ravel()]) * 100 + 60 + rng.normal(0, 4, (42, 2))
    ids = [f"{c}x{r}" for c, r in zip(column.ravel(), row.ravel(), strict=True)]
    pd.DataFrame(xy, ids, ["x", "y"]).to_csv(folder / "locs-raw.csv")
    pd.DataFrame(counts()[:42], ids, ["A", "B", "A", "NA"]).to_csv(folder / "cnts.csv")
    (folder / "pixel-size-raw.txt").write_text("2")
    options = ["--tables", str(folder), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    assert "the pitch of legacy ST" in capsys.readouterr().err
    assert scverse.run([*options, "--pitch-um", "200", "--radius-um", "50"]) == 0
    locs, found, record = read(tmp_path / "s")
    np.testing.assert_allclose(locs, xy, atol=6e-4)
    assert found.columns.tolist() == ["A", "B", "A.1", "NA"]
    np.testing.assert_array_equal(found, counts()[:42])
    assert record["notes"] == [
        "1 gene names occur more than once (A): the second is called A.1, and so on"
    ]
    assert float((tmp_path / "s" / "radius-raw.txt").read_text()) == 25


def test_spots_of_one_table_only_are_left_out_and_counted(image, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_plain(f"{folder}/", image)
    rewrite("locs-raw.csv", lambda table: table.drop(index=["AAAC000-1", "AAAC009-1"]))(folder)
    rewrite("cnts.csv", lambda table: table.drop(index="AAAC063-1"))(folder)
    assert scverse.run(["--tables", str(folder), "--directory", str(tmp_path / "s")]) == 0
    locs, found, record = read(tmp_path / "s")
    kept = [i for i in range(63) if i not in (0, 9)]
    assert locs.index.tolist() == array().index[kept].tolist()
    np.testing.assert_array_equal(found, counts()[kept])
    assert "3 spots are in one table only and are left out" in record["notes"]


@pytest.mark.parametrize("option", ["--pitch-um", "--radius-um", "--crop-um"])
@pytest.mark.parametrize("value", ["0", "-5", "nan", "wide"])
def test_lengths_are_above_zero(image, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        prepare("float", image, tmp_path, f"{option}={value}")
    assert stop.value.code == 2
    assert option in capsys.readouterr().err


def test_a_radius_file_is_used(image, tmp_path):
    (tmp_path / "data").mkdir()
    write_plain(f"{tmp_path}/data/", image)
    (tmp_path / "data" / "radius-raw.txt").write_text("30\n")
    assert scverse.run(["--tables", f"{tmp_path}/data", "--directory", str(tmp_path / "s")]) == 0
    assert float((tmp_path / "s" / "radius-raw.txt").read_text()) == pytest.approx(30)


def rewrite(name, change):
    def spoil(folder):
        table = pd.read_csv(folder / name, index_col=0, keep_default_na=False)
        change(table).to_csv(folder / name)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "cnts.csv").unlink(), "cnts.csv (counts)"),
        (lambda f: (f / "locs-raw.csv").unlink(), "locs-raw.csv (places"),
        (lambda f: (f / "he-raw.jpg").unlink(), "he-raw.jpg (image)"),
        (lambda f: (f / "cnts.tsv").write_text("x"), "which is the counts"),
        (rewrite("cnts.csv", np.log1p), "log-transformed"),
        (rewrite("cnts.csv", lambda t: t.assign(NA="x")), "holds 'x' for spot"),
        (rewrite("locs-raw.csv", lambda t: t.rename(columns={"x": "X"})), "expected a column x"),
        (rewrite("locs-raw.csv", lambda t: t.rename(index=lambda i: i + "a")), "in common"),
        (
            rewrite(
                "locs-raw.csv",
                lambda t: (t[["y", "x"]] + np.array([0, 60])).set_axis(["x", "y"], axis=1),
            ),
            "swapped",
        ),
        (lambda f: (f / "pixel-size-raw.txt").write_text("1,25"), "expected one number"),
        (lambda f: (f / "pixel-size-raw.txt").write_text("inf"), "expected one number"),
        (lambda f: (f / "pixel-size-raw.txt").write_bytes(b"\xff\xfe1"), "is no text"),
        (lambda f: (f / "pixel-size-raw.txt").write_text("0.5"), "expected 100 um"),
    ],
)
def test_bad_tables_are_named(image, tmp_path, capsys, spoil, words):
    folder = tmp_path / "data"
    folder.mkdir()
    write_plain(f"{folder}/", image)
    spoil(folder)
    assert scverse.run(["--tables", str(folder), "--directory", str(tmp_path / "s")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("source", "option"),
    [("--h5ad", "--table"), ("--spatialdata", "--library"), ("--tables", "--layer")],
)
def test_an_option_of_another_source_is_refused(tmp_path, capsys, source, option):
    options = [source, str(tmp_path), option, "x", "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    assert f"{option} says nothing of {source}" in capsys.readouterr().err


def test_the_source_folder_is_not_overwritten(image, tmp_path, capsys):
    write_plain(f"{tmp_path}/", image)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert scverse.run(["--tables", str(tmp_path), "--directory", str(tmp_path)]) == 2
    assert "would overwrite it" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("n", [1, 64])
def test_places_beyond_any_image_are_named_with_their_file(image, tmp_path, capsys, n):
    path = unpack("raw", tmp_path)
    with h5py.File(path, "r+") as file:
        file["obsm/spatial"][:n] = 1e30
    options = ["--h5ad", str(path), "--image", str(image), "--directory", str(tmp_path / "s")]
    assert scverse.run(options) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path} puts {n} of 64 spots beyond any image, such as ")
    assert "at x, y [1e+30, 1e+30]; expected px" in message
