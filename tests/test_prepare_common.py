"""What the prepare scripts share: section.py, lattice.py, sample.py, options.py and tenx.py."""

import argparse
import csv
import errno
import functools
import gzip
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite

import utils
from method.grid import lattice_pitch
from prepare import aligned, images, lattice, options, sample, scans, tenx, xenium
from prepare import section as sections
from reading import cli
from writing import disk

PITCH, UM = 80.0, 1.25  # px and um per px: 100 um
GENES = ["ACTB", "MARCH1", "NA", "gene, with comma"]
PATH = Path("positions.csv")  # only named in messages
LABELS = utils.Artifact(("labels.csv",), None, "a table")


# ----- files in 10x's formats, also for the tests of visium.py and visium_hd.py -----
def write_h5(path, counts, barcodes, ids, names, types=None, index_type=np.int64):
    """A matrix (barcodes, features) as Space Ranger 1 to 4 write it: features x barcodes by column.

    The strings have a fixed length, the indices are int64, as in 10x's own files.
    """
    matrix = sparse.csr_array(counts)
    types = types or ["Gene Expression"] * len(ids)
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        group = file.create_group("matrix")
        group["shape"] = np.array(matrix.shape[::-1], np.int32)
        group["data"] = matrix.data.astype(np.int32)
        group["indices"] = matrix.indices.astype(index_type)
        group["indptr"] = matrix.indptr.astype(index_type)
        group["barcodes"] = np.array(barcodes, "S")
        features = group.create_group("features")
        features["id"], features["name"] = np.array(ids, "S"), np.array(names, "S")
        features["feature_type"] = np.array(types, "S")
        features["genome"] = np.array(["GRCh38"] * len(ids), "S")
        features["_all_tag_keys"] = np.array(["genome"], "S")
    return path


def write_mtx(folder, counts, barcodes, ids, names, types=None, packed=True):
    """The folder of matrix.mtx.gz, barcodes.tsv.gz, features.tsv.gz; genes.tsv without types."""
    folder.mkdir(parents=True)
    content = io.BytesIO()
    mmwrite(content, sparse.coo_array(counts).T.astype(int))
    rows = [[*pair, *([kind] if types else [])] for *pair, kind in zip(
        ids, names, types or ids, strict=True)]  # fmt: skip
    files = {
        "matrix.mtx": content.getvalue(),
        "barcodes.tsv": "".join(f"{b}\n" for b in barcodes).encode(),
        "features.tsv" if types else "genes.tsv": "".join(
            "\t".join(row) + "\n" for row in rows
        ).encode(),
    }
    for name, data in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def matrix():
    """Counts (5 barcodes, 4 features), of which the last is an antibody."""
    counts = np.array(
        [[1, 0, 2, 9], [0, 0, 0, 0], [3, 4, 0, 1], [0, 7, 0, 0], [1, 1, 300, 2]]
    )  # fmt: skip
    barcodes = [f"AAAC{i}-1" for i in range(5)]
    ids, names = ["ENSG1", "ENSG2", "ENSG3", "CD3"], ["TBCE", "NA", "TBCE", "CD3"]
    return counts, barcodes, ids, names, [*["Gene Expression"] * 3, "Antibody Capture"]


def assert_same_matrix(read, matrix):
    counts, barcodes, features = read
    np.testing.assert_array_equal(counts.toarray(), matrix[0][:, :3])
    assert barcodes == matrix[1]
    assert features["id"].tolist() == matrix[2][:3]
    assert features["name"].tolist() == matrix[3][:3]
    assert features.attrs["dropped"] == {"Antibody Capture": (1, 12.0)}


@pytest.mark.parametrize("index_type", [np.int32, np.int64, np.float64])
def test_h5_is_read_and_antibodies_are_counted(tmp_path, matrix, index_type):
    path = write_h5(tmp_path / "m.h5", *matrix, index_type=index_type)
    assert_same_matrix(tenx.read_10x_h5(path), matrix)


@pytest.mark.parametrize("packed", [True, False])
def test_mtx_folder_is_read_packed_or_not(tmp_path, matrix, packed):
    folder = write_mtx(tmp_path / "m", *matrix, packed=packed)
    assert_same_matrix(tenx.read_10x_mtx(folder), matrix)


def test_old_layouts_without_feature_types_are_read_whole(tmp_path, matrix):
    counts, barcodes, ids, names, _ = matrix
    old = tenx.read_10x_mtx(write_mtx(tmp_path / "m", counts, barcodes, ids, names))
    path = write_genomes(tmp_path / "v2.h5", {"GRCh38": (counts, barcodes, ids, names)})
    for read, found_barcodes, features in (old, tenx.read_10x_h5(path)):
        np.testing.assert_array_equal(read.toarray(), counts)
        assert found_barcodes == barcodes
        assert features["id"].tolist() == ids
        assert features.attrs["dropped"] == {}


def write_genomes(path, read):
    """A group a genome, as Cell Ranger 2 has it; read: genome -> counts, barcodes, ids, names."""
    with h5py.File(path, "w") as file:
        for genome, (counts, barcodes, ids, names) in read.items():
            group, csr = file.create_group(genome), sparse.csr_array(counts)
            group["shape"] = np.array(csr.shape[::-1])
            group["data"], group["indices"], group["indptr"] = csr.data, csr.indices, csr.indptr
            group["barcodes"] = np.array(barcodes, "S")
            group["genes"], group["gene_names"] = np.array(ids, "S"), np.array(names, "S")
    return path


def test_two_genomes_of_the_old_layout_are_joined_by_barcode(tmp_path):
    """Their barcodes differ in part and in order; one gene id is in both."""
    human = np.array([[1, 2], [3, 0]]), ["a-1", "b-1"], ["ENSG1", "X"], ["ACTB", "TAG"]
    mouse = np.array([[7, 0], [0, 8]]), ["c-1", "a-1"], ["ENSMUSG1", "X"], ["Actb", "TAG"]
    path = write_genomes(tmp_path / "m.h5", {"GRCh38": human, "mm10": mouse})
    counts, barcodes, features = tenx.read_10x_h5(path)
    assert barcodes == ["a-1", "b-1", "c-1"]
    assert features["id"].tolist() == ["ENSG1", "GRCh38_X", "ENSMUSG1", "mm10_X"]
    assert tenx.gene_names(features) == ["ACTB", "GRCh38_TAG", "Actb", "mm10_TAG"]
    np.testing.assert_array_equal(counts.toarray(), [[1, 2, 0, 8], [3, 0, 0, 0], [0, 0, 7, 0]])
    notes = tenx.dropped_notes(features)
    assert notes == ["the matrices of the genomes GRCh38, mm10 are joined by barcode"]
    with pytest.raises(utils.StageError, match="the genomes GRCh38, mm10 in matrices of their own"):
        tenx.open_h5(path).__enter__()


def test_withdrawn_probes_and_antibodies_are_left_out_and_counted(tmp_path):
    """By id or by name; a gene whose name only contains the word stays."""
    ids = ["ENSG1", "DEPRECATED_ENSG2", "ENSG3", "ENSG4", "CD3"]
    names = ["ACTB", "TBCE", "DEPRECATED_NA", "NOT_DEPRECATED_", "CD3"]
    types = [*["Gene Expression"] * 4, "Antibody Capture"]
    counts = np.array([[1, 2, 4, 8, 16], [0, 32, 0, 64, 0]])
    matrix = counts, ["a-1", "b-1"], ids, names, types
    folder = write_mtx(tmp_path / "m", *matrix)
    for read in (tenx.read_10x_h5(write_h5(tmp_path / "m.h5", *matrix)), tenx.read_10x(folder)):
        np.testing.assert_array_equal(read[0].toarray(), counts[:, [0, 3]])
        assert tenx.gene_names(read[2]) == ["ACTB", "NOT_DEPRECATED_"]
        assert tenx.dropped_notes(read[2]) == [
            "2 features of type DEPRECATED with 38 molecules are left out",
            "1 features of type Antibody Capture with 16 molecules are left out",
        ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("obs", r"AnnData .*scverse\.py --h5ad"),
        ("barcode_idx", "molecule_info"),
        ("feature_slices", "feature_slice"),
        ("other", "the groups other"),
    ],
)
def test_another_h5_file_is_named(tmp_path, name, words):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_group(name)
    with pytest.raises(utils.StageError, match=words) as error:
        tenx.read_10x_h5(tmp_path / "m.h5")
    assert "ownload" not in str(error.value)


def test_a_matrix_that_its_bytes_cannot_hold_is_refused_from_the_header(tmp_path, matrix):
    path = write_h5(tmp_path / "m.h5", *matrix)
    with h5py.File(path, "r+") as file:
        del file["matrix/data"]
        file["matrix"].create_dataset("data", (10**12,), np.int32, chunks=(10**6,))
    with pytest.raises(utils.StageError, match=r"declares 4,000\.0 GB of values"):
        tenx.read_10x_h5(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_an_error_of_the_system_is_not_called_damage(tmp_path, matrix, monkeypatch, code):
    """Copying the file again would not help."""

    def fail(*_, **__):
        raise OSError(code, "of the disk")

    path = write_h5(tmp_path / "m.h5", *matrix)
    monkeypatch.setattr(h5py, "File", fail)
    folder = write_mtx(tmp_path / "folder", *matrix)
    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(tenx, "mmread", fail)
    with pytest.raises(OSError, match="of the disk"):
        tenx.read_10x_mtx(folder)
    with pytest.raises(OSError, match="of the disk"):
        tenx.read_10x_h5(path)
    with pytest.raises(OSError, match="of the disk"):
        sections.read_numbers(path)
    with pytest.raises(OSError, match="of the disk"):
        scans.open_slide(path)


def test_tables_of_a_matrix_as_windows_saves_them(tmp_path, matrix):
    folder = write_mtx(tmp_path / "m", *matrix, packed=False)
    for name in ("barcodes.tsv", "features.tsv"):
        text = (folder / name).read_text().replace("\n", "\r\n")
        (folder / name).write_bytes(text.encode("utf-8-sig"))
    assert_same_matrix(tenx.read_10x_mtx(folder), matrix)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_scale_factors_of_any_encoding_are_read(tmp_path, encoding):
    path = tmp_path / tenx.SCALE_FACTORS
    path.write_bytes('{"tissue_hires_scalef": 0.25, "spot_diameter_fullres": 9}'.encode(encoding))
    assert tenx.read_spatial(tmp_path).scales == {"tissue_hires_scalef": 0.25}


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", '""', '"1,5"', "null", "[1]"])
def test_scale_factors_that_are_none_are_named(tmp_path, value):
    path = tmp_path / tenx.SCALE_FACTORS
    path.write_text(f'{{"tissue_hires_scalef": {value}}}')
    with pytest.raises(utils.StageError, match=r"scalefactors_json\.json (says|holds no)") as error:
        tenx.read_spatial(tmp_path)
    assert "ownload" not in str(error.value)


def break_indices(file):
    file["matrix/indices"][0] = 99


def break_shape(file):
    file["matrix/shape"][1] = 4


def break_barcodes(file):
    del file["matrix/barcodes"]
    file["matrix/barcodes"] = np.array(["a"], "S")


def break_features(file):
    del file["matrix/features"]


def break_names(file):
    del file["matrix/features/name"]
    file["matrix/features/name"] = np.array([b"A", b"\xff", b"B", b"C"])


@pytest.mark.parametrize(
    "damage", [break_indices, break_shape, break_barcodes, break_features, break_names]
)  # fmt: skip
def test_damaged_h5_is_named(tmp_path, matrix, damage):
    path = write_h5(tmp_path / "m.h5", *matrix)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(utils.StageError, match=r"m\.h5.*(damaged|whole|rows)"):
        tenx.read_10x_h5(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_truncated_h5_is_named(tmp_path, matrix, content):
    path = write_h5(tmp_path / "m.h5", *matrix)
    path.write_bytes(path.read_bytes()[:1500] if content is None else content)
    with pytest.raises(utils.StageError, match=r"m\.h5 is no whole 10x matrix"):
        tenx.read_10x_h5(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("matrix.mtx", "%%MatrixMarket matrix coordinate integer general\n4 5 99\n1 1 1\n",
         "matrix.mtx is no whole 10x matrix"),
        ("features.tsv", "ENSG1\nENSG2\nENSG3\nCD3\n", "has one column only"),
        ("features.tsv", "ENSG1\tA\nENSG2\tB\tGene Expression\n", "not as many in all rows"),
        ("barcodes.tsv", "", "barcodes.tsv is empty"),
        ("barcodes.tsv", "A-1\nB-1\n", "5 columns and 4 rows for 2 barcodes and 4 features"),
        ("features.tsv", "".join(f"E{i}\tN{i}\tCRISPR Guide Capture\n" for i in range(4)),
         "has no Gene Expression but CRISPR Guide Capture"),
    ],
)  # fmt: skip
def test_damaged_parts_of_a_folder_are_named(tmp_path, matrix, name, content, words):
    folder = write_mtx(tmp_path / "m", *matrix, packed=False)
    (folder / name).write_text(content)
    with pytest.raises(utils.StageError, match=r"/m/.*") as error:
        tenx.read_10x_mtx(folder)
    assert words in str(error.value)


def test_a_matrix_that_is_not_there_is_named(tmp_path):
    with pytest.raises(utils.StageError, match=r"m\.h5 is missing"):
        tenx.read_10x_h5(tmp_path / "m.h5")


def test_missing_parts_of_a_folder_are_named(tmp_path, matrix):
    folder = write_mtx(tmp_path / "m", *matrix)
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(utils.StageError, match=r"none of features\.tsv\.gz, .*genes\.tsv"):
        tenx.read_10x_mtx(folder)


# ----- gene symbols -----
def test_later_genes_of_a_symbol_get_their_id():
    names = sections.unique_symbols(
        ["TBCE", "", "TBCE", "NA", "TBCE"], ["E1", "E2", "E3", "E4", "E5"]
    )
    assert names == ["TBCE", "E2", "TBCE.E3", "NA", "TBCE.E5"]


@given(st.lists(st.sampled_from(["A", "B", " A", "", "C"]), max_size=30))
def test_symbols_become_unique_and_keep_their_order(symbols):
    names = sections.unique_symbols(symbols, [f"ENSG{i}" for i in range(len(symbols))])
    assert len(set(names)) == len(names)
    for i, (name, symbol) in enumerate(zip(names, symbols, strict=True)):
        assert name in (symbol.strip(), f"ENSG{i}", f"{symbol.strip()}.ENSG{i}")


def test_repeated_gene_ids_are_refused():
    with pytest.raises(utils.StageError, match=r"A\.E1"):
        sections.unique_symbols(["A", "A", "A"], ["E1", "E1", "E1"])


# ----- lattices, discs, grids -----
def test_lattice_is_hexagonal():
    xy = lattice.hexagonal_lattice((10, 20, 1010, 720), 100.0)
    rows = np.unique(xy[:, 1].round(6))
    np.testing.assert_allclose(np.diff(rows), 86.60254, atol=1e-5)
    assert len(rows) == 9  # 8 * 86.6 = 692.8 fit into 700
    assert (xy[:, 0].min(), xy[:, 0].max()) == (10, 1010)
    distance = np.linalg.norm(xy[:, None] - xy, axis=2)
    inner = ((xy > [110, 120]) & (xy < [910, 620])).all(1)
    near = np.abs(distance - 100) < 1e-6
    assert (near.sum(1)[inner] == 6).all()
    assert (distance + 1e9 * np.eye(len(xy)) > 100 - 1e-6).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 400))
def test_pseudo_spots_equal_a_brute_force_count(seed, n):
    rng = np.random.default_rng(seed)
    centres = lattice.hexagonal_lattice((0, 0, 300, 300), 100.0)
    xy, gene, weight = rng.uniform(-50, 350, (n, 2)), rng.integers(0, 3, n), rng.integers(1, 9, n)
    disc = lattice.disc_of(xy, centres, 27.5)
    found = lattice.tally(disc, gene, (len(centres), 3), weight).toarray()
    expected = np.zeros((len(centres), 3))
    for (x, y), g, amount in zip(xy, gene, weight, strict=True):
        for s, (cx, cy) in enumerate(centres):
            if (x - cx) ** 2 + (y - cy) ** 2 <= 27.5**2:
                expected[s, g] += amount
    np.testing.assert_array_equal(found, expected)
    matrix = sparse.csr_array((weight.astype(float), (np.arange(n), gene)), shape=(n, 3))
    summed = lattice.sum_rows(lattice.disc_of(xy, centres, 27.5), matrix, len(centres))
    np.testing.assert_array_equal(summed.toarray(), expected)


def test_a_molecule_on_the_edge_of_a_disc_counts():
    inside = lattice.disc_of(np.array([[27.5, 0], [27.5001, 0]]), np.zeros((1, 2)), 27.5)
    assert inside.tolist() == [0, -1]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.booleans())
def test_every_molecule_is_in_the_grid_once_or_outside(seed, n, weighted):
    rng = np.random.default_rng(seed)
    row, col = rng.uniform(-1, 5, n), rng.uniform(-1, 7, n)
    row[: n // 20] = np.nan
    gene, weight = rng.integers(0, 2, n), rng.integers(1, 5, n) if weighted else None
    place = lattice.superpixel_of(np.column_stack([col, row]), (4, 6))
    counts = lattice.tally(place, gene, (24, 2), weight)
    expected, left = np.zeros((4, 6, 2)), 0
    for i in range(n):
        amount = 1 if weight is None else weight[i]
        if 0 <= row[i] < 4 and 0 <= col[i] < 6:
            expected[int(row[i] // 1), int(col[i] // 1), gene[i]] += amount
        else:
            left += 1
    np.testing.assert_array_equal(counts.toarray().reshape(4, 6, 2), expected)
    assert (place < 0).sum() == left


@settings(max_examples=50)
@given(
    st.floats(0.1, 5), st.floats(-180, 180), st.booleans(), st.tuples(*[st.floats(-1e4, 1e4)] * 2)
)
def test_a_fitted_lattice_gives_its_pixel_size_at_any_rotation_and_flip(um, degrees, flip, origin):
    turn = np.radians(degrees)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / um
    axes[1] *= -1 if flip else 1
    points = np.random.default_rng(0).uniform(0, 6500, (50, 2))
    found = lattice.fit_array(points, np.array(origin) + points @ axes, PATH)
    np.testing.assert_allclose(found.axes, axes, atol=1e-8)
    np.testing.assert_allclose(found.origin, origin, atol=1e-5)
    assert found.pixel_size_um == pytest.approx(um, rel=1e-8)
    assert found.residual_um == pytest.approx(0, abs=1e-5)
    assert found.skew == pytest.approx(0, abs=1e-8)


def test_positions_on_one_line_are_refused():
    line = np.arange(10.0)[:, None] * [1, 2]
    with pytest.raises(utils.StageError, match="one line"):
        lattice.fit_array(line, line, PATH)


def test_a_fitted_array_tells_how_far_it_is_off_and_askew():
    points = np.array([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    off = np.array([[3.0, 0], [-3, 0], [-3, 0], [3, 0]])  # orthogonal to any plane of four corners
    found = lattice.fit_array(points, points + off, PATH)
    assert found.pixel_size_um == pytest.approx(1)
    assert found.residual_um == pytest.approx(3)
    wide = lattice.fit_array(points, points * (1.2, 1), PATH)
    assert (wide.skew, wide.cosine) == (pytest.approx(0.2), pytest.approx(0))
    askew = lattice.fit_array(points, points @ [[1.0, 0], [0.6, 0.8]], PATH)
    assert askew.skew == askew.cosine == pytest.approx(0.6)


# ----- the section -----
@functools.cache
def section_picture(shape):
    """Checks of 20 px in changing colours: quick to draw and to pack."""
    row, col = np.mgrid[: shape[0], : shape[1]] // 20
    return np.stack([row * 5 % 256, col * 7 % 256, (row + col) % 2 * 99], axis=2).astype(np.uint8)


def make_section(tmp_path, image_shape=(500, 640), **changes):
    """24 spots 80 px apart on an image at 1.25 um per px, counts in another order than locs."""
    path = tmp_path / "scan.png"
    if not path.exists():
        Image.fromarray(section_picture(image_shape)).save(path)
    xy = lattice.hexagonal_lattice((50, 60, 560, 440), PITCH)
    locs = pd.DataFrame(xy, [f"s{i}-1" for i in range(len(xy))], ["x", "y"])
    counts = np.random.default_rng(1).poisson(3, (len(xy), len(GENES)))
    order = np.random.default_rng(2).permutation(len(xy))
    values = {
        "image": path,
        "pixel_size_um": UM,
        "locs": locs,
        "counts": sparse.csr_array(counts[order]),
        "spots": [locs.index[i] for i in order],
        "genes": GENES,
        "radius_um": 27.5,
        "pitch_um": 100.0,
    }
    values.update(changes)
    return sections.PreparedSection(**values), counts


def test_counts_are_joined_by_id(tmp_path):
    section, counts = make_section(tmp_path)
    np.testing.assert_array_equal(section.counts.toarray(), counts)
    again, _ = make_section(tmp_path, counts=sparse.csr_array(counts), spots=None)
    np.testing.assert_array_equal(again.counts.toarray(), counts)


def test_counts_of_spots_without_location_are_left_out_with_a_note(tmp_path):
    section, counts = make_section(tmp_path)
    fewer, _ = make_section(tmp_path, locs=section.locs.iloc[3:])
    np.testing.assert_array_equal(fewer.counts.toarray(), counts[3:])
    assert fewer.notes == ["3 spots without a location are left out"]


def test_locations_without_counts_are_refused(tmp_path):
    section, _ = make_section(tmp_path)
    locs = section.locs.rename(index={"s3-1": "other"})
    with pytest.raises(utils.StageError, match=r"1 of \d+ spots .* no counts: other"):
        make_section(tmp_path, locs=locs)


@pytest.mark.parametrize("what", ["spots", "locations", "genes"])
def test_names_that_occur_twice_are_refused(tmp_path, what):
    section, _ = make_section(tmp_path)
    twice = {
        "spots": {"spots": ["s1-1", *section.spots[1:-1], "s1-1"]},
        "locations": {"locs": section.locs.rename(index={"s3-1": "s1-1"})},
        "genes": {"genes": ["s1-1", *GENES[1:-1], "s1-1"]},
    }[what]
    with pytest.raises(utils.StageError, match=f"^The {what} s1-1 occur more than once"):
        make_section(tmp_path, **twice)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf, 0])
def test_counts_that_are_no_counts_are_refused(tmp_path, bad):
    _, counts = make_section(tmp_path)
    with pytest.raises(utils.StageError, match="expected raw counts"):
        make_section(tmp_path, counts=sparse.csr_array(np.full(counts.shape, float(bad))))


# ----- the check -----
def test_check_measures_pitch_and_share(tmp_path):
    report = sections.check_fit(make_section(tmp_path)[0])
    assert report.spots == report.spots_on_image
    assert (report.pitch_px, report.pitch_um) == (pytest.approx(80), pytest.approx(100))
    assert report.image_size == (640, 500)


@pytest.mark.parametrize(
    ("factor", "fits"), [(1.049, True), (1.051, False), (0.951, True), (0.949, False)]
)
def test_pitch_may_be_off_by_five_percent(tmp_path, factor, fits):
    section, _ = make_section(tmp_path, pixel_size_um=UM * factor)
    if fits:
        assert sections.check_fit(section).pitch_um == pytest.approx(100 * factor)
        return
    with pytest.raises(
        utils.StageError, match=r"80\.00 px x .* um apart; expected 100 um"
    ) as error:
        sections.check_fit(section)
    assert "would have to be 1.25 um" in str(error.value)


def test_five_percent_of_the_spots_may_miss_the_image(tmp_path):
    section, _ = make_section(tmp_path)
    n = len(section.locs)
    for missed, fits in ((int(0.05 * n), True), (int(0.05 * n) + 1, False)):
        locs = section.locs.copy()
        locs.iloc[:missed, 0] -= 5000
        moved, _ = make_section(tmp_path, locs=locs)
        if fits:
            assert sections.check_fit(moved).spots_on_image == n - missed
        else:
            with pytest.raises(utils.StageError, match=f"Only {n - missed} of {n}"):
                sections.check_fit(moved)


def test_spots_off_the_image_are_left_out_with_a_note(tmp_path):
    """And image_calibration.py takes what is written."""
    section, counts = make_section(tmp_path)
    locs = section.locs.copy()
    locs.iloc[0, 0] = -0.5
    section, _ = make_section(tmp_path, locs=locs, off_tissue=locs)
    write_sample(tmp_path / "sample", section)
    written = pd.read_csv(tmp_path / "sample" / "locs-raw.csv", index_col=0)
    assert written.index.tolist() == locs.index[1:].tolist()
    table = pd.read_csv(tmp_path / "sample" / "cnts.csv.gz", index_col=0, keep_default_na=False)
    np.testing.assert_array_equal(table.to_numpy(), counts[1:])
    record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert record["spots"] == record["spots_on_image"] + 1 == len(locs)
    assert record["notes"] == ["1 spots in tissue lie off the image and are left out: s0-1"]
    assert run("image_calibration.py", tmp_path / "sample") == 0


def tissue_of(path, spots, shape=(640, 640)):
    """Stained discs of 50 px about places (N, 2) on grey glass, as a file."""
    picture = np.full((*shape, 3), 240, np.uint8)
    row, col = np.mgrid[: shape[0], : shape[1]]
    for x, y in spots:
        picture[np.hypot(col - x, row - y) < 50] = (200, 120, 180)
    Image.fromarray(picture).save(path)
    return path


@pytest.mark.parametrize("exchanged", [True, False])
def test_spots_that_lie_on_the_tissue_with_x_and_y_exchanged_only_are_noted(tmp_path, exchanged):
    """Where no array tells: a band of spots on a square image, stained where they lie."""
    xy = lattice.hexagonal_lattice((50, 60, 560, 300), PITCH)
    image = tissue_of(tmp_path / "he.png", xy[:, ::-1] if exchanged else xy)
    locs = pd.DataFrame(xy, [f"s{i}" for i in range(len(xy))], ["x", "y"])
    counts = sparse.csr_array(np.ones((len(xy), len(GENES))))
    section, _ = make_section(tmp_path, image=image, locs=locs, counts=counts, spots=None)
    write_sample(tmp_path / "sample", section)
    notes = json.loads((tmp_path / "sample" / "prepare.json").read_text())["notes"]
    assert [("would with x and y exchanged" in note) for note in notes] == [True] * exchanged


@pytest.mark.parametrize("stain", [(240, 240, 240), (200, 120, 180)])
def test_an_image_of_one_colour_does_not_tell_of_exchanged_axes(tmp_path, stain):
    section, _ = make_section(tmp_path)
    assert sections.exchanged_notes(section, np.full((500, 640, 3), stain, np.uint8)) == []


def test_a_section_without_spots_is_refused(tmp_path):
    section, _ = make_section(tmp_path)
    with pytest.raises(utils.StageError, match="No spot is in tissue"):
        make_section(tmp_path, locs=section.locs[:0])


def test_55_counts_beyond_reason_are_refused_with_the_number(tmp_path):
    _, counts = make_section(tmp_path)
    counts = counts.astype(float)
    counts[3, 2] = 1e9
    make_section(tmp_path, counts=counts, spots=None)
    counts[3, 2] = 3e36
    with pytest.raises(utils.StageError, match=r"run up to 3e\+36; .* at most 1e\+09"):
        make_section(tmp_path, counts=counts, spots=None)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_46_names_that_hold_the_end_of_a_line_are_refused(tmp_path, end):
    genes = [*GENES[:3], f"A{end}B"]
    with pytest.raises(utils.StageError, match="hold the end of a line"):
        make_section(tmp_path, genes=genes)


def test_names_that_excel_makes_of_genes_are_said(tmp_path):
    section, _ = make_section(tmp_path, genes=[*GENES[:3], "1-Mar"])
    write_sample(tmp_path / "sample", section)
    record = json.loads((tmp_path / "sample" / "prepare.json").read_text())
    assert record["warnings"][0].startswith("the counts name 1-Mar: a date or a number that Excel")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["A", "B", "A", "A"], ["A", "B", "A.1", "A.2"]),
        (["A", "A.1", "A"], ["A", "A.1", "A.2"]),
        (["", "", "A"], ["", ".1", "A"]),
    ],
)
def test_columns_of_one_name_are_numbered(names, wanted):
    assert sections.numbered(names) == wanted


def test_swapped_axes_are_recognised(tmp_path):
    section, _ = make_section(tmp_path)
    swapped = section.locs.rename(columns={"x": "y", "y": "x"})
    with pytest.raises(utils.StageError, match="With x and y swapped they do fit"):
        sections.check_fit(make_section(tmp_path, locs=swapped)[0])


def test_swapped_axes_are_told_from_a_smaller_copy(tmp_path):
    """Times a small scale, the swapped spots would fit on any image."""
    section, _ = make_section(tmp_path)
    swapped = section.locs.rename(columns={"x": "y", "y": "x"})
    scales = {"tissue_hires_scalef": 0.16, "tissue_lowres_scalef": 0.05}
    with pytest.raises(utils.StageError, match="With x and y swapped they do fit"):
        sections.check_fit(make_section(tmp_path, locs=swapped, scales=scales)[0])


@pytest.mark.parametrize("square", [True, False])
def test_the_pitch_holds_where_spots_are_off_their_places(square):
    rng = np.random.default_rng(3)
    xy = lattice.hexagonal_lattice((0, 0, 1500, 1500), 100.0)
    if square:
        xy = np.stack(np.meshgrid(np.arange(15), np.arange(15)), -1).reshape(-1, 2) * 100.0
    assert lattice_pitch(xy) == pytest.approx(100)
    assert lattice_pitch(xy[rng.random(len(xy)) < 0.7]) == pytest.approx(100)
    if square:  # legacy ST: 5 % of 200 um
        assert lattice_pitch(xy + rng.normal(0, 5, xy.shape)) == pytest.approx(100, rel=0.02)
    assert lattice_pitch(np.arange(8.0)[:, None] * [1, 0]) == 1  # in one line
    assert lattice_pitch(xy[:2]) == 100
    assert np.isnan(lattice_pitch(xy[:1]))


def test_the_pitch_of_another_platform_is_recognised(tmp_path):
    section, _ = make_section(tmp_path, pitch_um=200.0)
    with pytest.raises(utils.StageError, match=r"found -50\.0%\. It is the pitch of Visium"):
        sections.check_fit(section)


def test_a_smaller_copy_is_recognised_by_its_scale_factor(tmp_path):
    section, _ = make_section(tmp_path)
    for scales, words in (
        ({"tissue_lowres_scalef": 0.05, "tissue_hires_scalef": 0.16}, "hires_scalef = 0.16"),
        ({"tissue_hires_scalef": 0.16}, "tissue_hires_scalef = 0.16 they do fit"),
        ({"tissue_hires_scalef": 0.9, "tissue_lowres_scalef": 0.16}, "lowres_scalef = 0.16"),
        ({}, r"reach \d\.\d\d times as far"),
    ):
        large, _ = make_section(tmp_path, locs=section.locs / 0.16, scales=scales)
        with pytest.raises(utils.StageError, match=words):
            sections.check_fit(large)


# ----- the sample -----
RECORD = utils.record_name("prepare/visium.py")


def write_sample(directory, section, force=False, genes=None):
    """As main of a prepare script does, once the section is read."""
    args = argparse.Namespace(directory=directory, genes=genes, force=force)
    stage = utils.Stage("prepare/visium.py", args, makes_folders=True)
    try:
        sample.guard_sample(stage)
        return sample.write_sample(stage, section)
    finally:
        stage.discard()


def read_files(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != RECORD}


def test_the_sample_is_what_the_next_stages_read(tmp_path):
    section, counts = make_section(tmp_path)
    directory = tmp_path / "new" / "section A"
    write_sample(directory, section)
    names = {"he-raw.png", "pixel-size-raw.txt", "locs-raw.csv", "cnts.csv.gz", "radius-raw.txt"}
    assert {f.name for f in directory.iterdir()} == names | {"check.png", "prepare.json"}
    assert (directory / "he-raw.png").read_bytes() == section.image.read_bytes()
    assert float((directory / "pixel-size-raw.txt").read_text()) == UM
    assert float((directory / "radius-raw.txt").read_text()) == 22
    with gzip.open(directory / "cnts.csv.gz", "rt", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["", *GENES]
    assert {row[0]: [int(n) for n in row[1:]] for row in rows} == dict(
        zip(section.locs.index, counts.tolist(), strict=True)
    )
    assert run("image_calibration.py", directory) == 0
    assert run("get_HR.py", directory) == 0
    locs = pd.read_csv(directory / "locs.csv", index_col=0).loc[section.locs.index]
    grid, factor = lattice.superpixel_grid((500, 640), UM)
    np.testing.assert_allclose(section.xy * factor, locs[["x", "y"]] / 16, atol=1e-4)
    with Image.open(directory / "he.jpg") as image:
        assert (image.height // 16, image.width // 16) == grid
    hr = np.load(directory / "HRcnts.npy")
    np.testing.assert_array_equal(hr[: len(counts)], counts)


def test_same_section_same_bytes_and_it_may_be_written_again(tmp_path):
    for _ in range(2):
        write_sample(tmp_path / "a", make_section(tmp_path)[0])
        write_sample(tmp_path / "b", make_section(tmp_path)[0])
        assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


@pytest.mark.parametrize("name", ["locs-raw.csv", "he-raw.png", "cnts.csv.gz", "check.png"])
def test_edited_files_are_kept_unless_forced(tmp_path, name, capsys):
    directory = tmp_path / "a"
    write_sample(directory, make_section(tmp_path)[0])
    (directory / name).write_bytes(b"my own")
    before = read_files(directory)
    write_sample(directory, make_section(tmp_path)[0])
    assert f"kept your {name} (--force makes a new one)" in capsys.readouterr().out
    assert read_files(directory) == before
    write_sample(directory, make_section(tmp_path)[0], force=True)
    assert (directory / name).read_bytes() != b"my own"


def test_a_truth_of_ones_own_stays_beside_a_section_without_one(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / "truth.npz").write_bytes(b"my own")
    write_sample(directory, make_section(tmp_path)[0])
    assert (directory / "truth.npz").read_bytes() == b"my own"


def test_a_truth_in_the_way_of_another_is_kept_unless_forced(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / "truth.npz").write_bytes(b"my own")
    truth = sections.CountedTruth(np.ones((2, 3, 1)), np.ones((2, 3), bool), ["NA"])
    with pytest.raises(utils.StageError, match=r"truth\.npz was not written by prepare/visium\.py"):
        write_sample(directory, make_section(tmp_path, truth=truth)[0])
    args = argparse.Namespace(directory=directory, genes=None, force=False, truth_genes=7)
    with pytest.raises(utils.StageError, match=r"truth\.npz was not written by prepare/xenium\.py"):
        sample.guard_sample(utils.Stage("prepare/xenium.py", args))  # before anything is read
    write_sample(directory, make_section(tmp_path, truth=truth)[0], force=True)
    (directory / "truth.npz").write_bytes(b"edited")  # of the section that goes
    args = argparse.Namespace(directory=directory, genes=None, force=False, options=["--a"])
    with pytest.raises(utils.StageError, match=r"truth\.npz was edited by hand, and other options"):
        sample.guard_sample(utils.Stage("prepare/visium.py", args))


@pytest.mark.parametrize("name", ["he-raw.jpg", "cnts.tsv", "check.png", "radius-raw.txt"])
def test_files_of_others_are_kept_unless_forced(tmp_path, name):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / name).write_bytes(b"of somebody else")
    with pytest.raises(utils.StageError, match=f"{name} was not written by prepare/visium.py"):
        write_sample(directory, make_section(tmp_path)[0])
    assert [f.name for f in directory.iterdir()] == [name]
    write_sample(directory, make_section(tmp_path)[0], force=True)
    present = {f.name for f in directory.iterdir()}
    assert len([n for n in utils.HE_RAW.names if n in present]) == 1
    assert len([n for n in utils.CNTS.names if n in present]) == 1


def test_a_gene_list_of_the_user_is_neither_replaced_nor_removed(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / "gene-names.txt").write_text("ACTB\n")
    write_sample(directory, make_section(tmp_path)[0], force=True)
    assert (directory / "gene-names.txt").read_text() == "ACTB\n"
    with pytest.raises(utils.StageError, match=r"gene-names\.txt was not written by prepare"):
        write_sample(directory, make_section(tmp_path, gene_names=["NA"])[0])
    assert (directory / "gene-names.txt").read_text() == "ACTB\n"


def test_what_an_earlier_run_wrote_does_not_outlive_the_next(tmp_path):
    truth = sections.CountedTruth(np.ones((2, 3, 1)), np.ones((2, 3), bool), ["NA"])
    first, _ = make_section(tmp_path, truth=truth, gene_names=["NA"])
    write_sample(tmp_path / "a", first)
    assert (tmp_path / "a" / "gene-names.txt").read_text() == "NA\n"
    image = section_picture((500, 640))
    write_sample(tmp_path / "a", make_section(tmp_path, image=image)[0])
    names = {f.name for f in (tmp_path / "a").iterdir()}
    assert names.isdisjoint({"truth.npz", "gene-names.txt", "he-raw.png"})
    with Image.open(tmp_path / "a" / "he-raw.tif") as written:
        np.testing.assert_array_equal(np.asarray(written), image)


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    directory = tmp_path / "a"
    write_sample(directory, make_section(tmp_path)[0])
    before = {f.name: f.read_bytes() for f in directory.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "draw_check", fail)  # the last file
    with pytest.raises(OSError, match="No space"):
        write_sample(directory, make_section(tmp_path, genes=GENES[::-1])[0])
    assert {f.name: f.read_bytes() for f in directory.iterdir()} == before


def test_a_run_cut_off_between_two_files_is_done_again(tmp_path, monkeypatch):
    directory = tmp_path / "a"
    write_sample(directory, make_section(tmp_path)[0])
    put, left = disk.put, iter(range(4))

    def put_some(partial, path):
        if path.name != RECORD and next(left, None) is None:
            raise KeyboardInterrupt
        put(partial, path)

    locs = make_section(tmp_path)[0].locs
    changes = {"locs": locs + 1, "pixel_size_um": 1.26, "radius_um": 29.0, "genes": GENES[::-1]}
    with monkeypatch.context() as patch:
        patch.setattr(disk, "put", put_some)
        with pytest.raises(KeyboardInterrupt):
            write_sample(directory, make_section(tmp_path, **changes)[0])
    assert not json.loads((directory / RECORD).read_text())["finished"]
    assert not list(directory.glob(".*partial*"))
    for _ in range(2):  # neither the old nor the new files are taken for edited ones
        write_sample(directory, make_section(tmp_path, **changes)[0])
    write_sample(tmp_path / "b", make_section(tmp_path, **changes)[0])
    assert read_files(directory) == read_files(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "[]", '{"outputs": {"he-raw.png": 1}}', '{"finished": true}'])
def test_a_damaged_record_is_named(tmp_path, text):
    directory = tmp_path / "a"
    directory.mkdir()
    (directory / RECORD).write_text(text)
    with pytest.raises(utils.StageError, match=r"prepare\.json is not a .*record"):
        write_sample(directory, make_section(tmp_path)[0])


def test_a_file_as_directory_and_a_full_disk_end_with_2(tmp_path, monkeypatch, capsys):
    def run_on(directory):
        argv = ["--directory", str(directory)]
        parser = options.prepare_parser("Test.")
        return sample.run(lambda _: make_section(tmp_path)[0], "prepare/visium.py", parser, argv)

    (tmp_path / "file").touch()
    assert run_on(tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err

    def fail(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(images, "write_image", fail)
    assert run_on(tmp_path / "new") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_record_tells_sources_and_numbers(tmp_path):
    section, counts = make_section(tmp_path, notes=["a note"], facts={"bins": 7})
    section.sources = [section.image]
    write_sample(tmp_path / "a", section)
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert record["finished"]
    source = record["inputs"][str(section.image.resolve())]
    assert source["sha256"] == disk.sha256(section.image)
    assert record["script"] == "prepare/visium.py"
    assert {"versions", "code", "seconds", "arguments"} <= record.keys()
    assert (record["spots"], record["molecules"]) == (len(counts), counts.sum())
    assert (record["notes"], record["bins"]) == (["a note"], 7)
    for name, known in record["outputs"].items():
        assert disk.fingerprint(tmp_path / "a" / name) == known


def test_tables_are_written_recorded_and_guarded(tmp_path, capsys):
    section, _ = make_section(tmp_path)
    section.tables[LABELS] = pd.DataFrame({"label": "tumour, left"}, section.locs.index[:3])
    directory = tmp_path / "a"
    write_sample(directory, section)
    expected = "".join(f'{spot},"tumour, left"\n' for spot in section.locs.index[:3])
    assert (directory / "labels.csv").read_text() == f",label\n{expected}"
    outputs = json.loads((directory / RECORD).read_text())["outputs"]
    assert outputs["labels.csv"] == disk.fingerprint(directory / "labels.csv")
    (directory / "labels.csv").write_text("mine")
    before = read_files(directory)
    write_sample(directory, section)
    assert "kept your labels.csv" in capsys.readouterr().out
    assert read_files(directory) == before


def test_most_variable_genes_in_the_order_of_the_matrix():
    rng = np.random.default_rng(0)
    counts = rng.poisson([1, 20, 0.1, 9, 5], (200, 5))
    expected = np.sort(np.argsort(-counts.var(axis=0))[:3])
    found = sections.choose_truth_genes(None, list("abcde"), sparse.csr_array(counts), 3)
    np.testing.assert_array_equal(found, expected)
    listed = sections.choose_truth_genes(["e", "a"], list("abcde"), sparse.csr_array(counts), 3)
    assert listed.tolist() == [4, 0]
    assert len(sections.choose_truth_genes(["e"], list("abcde"), sparse.csr_array(counts), 0)) == 0


def test_truth_is_written_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.poisson(0.3, (5, 4, 3))
    for counts, dtype in (
        (whole, np.uint16),
        (whole / 16, np.float32),
        (whole * 90_000, np.uint32),
    ):
        for form in (counts, sparse.csr_array(counts.reshape(20, 3))):
            path = tmp_path / "truth.npz"
            sample.write_truth(
                sections.CountedTruth(form, whole[..., 0] > 0, ["A", "NA", "µ"]), path
            )
            with np.load(path, allow_pickle=False) as saved:
                assert saved["counts"].dtype == dtype
                np.testing.assert_array_equal(saved["counts"], counts)
                assert saved["genes"].tolist() == ["A", "NA", "µ"]
                np.testing.assert_array_equal(saved["tissue"], whole[..., 0] > 0)


# ----- images -----
def test_an_image_is_cut_and_shrunk_with_its_spots(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (400, 600, 3), np.uint8)
    path = tmp_path / "scan.png"
    Image.fromarray(picture).save(path)
    locs = pd.DataFrame({"x": [200.0, 301], "y": [150.0, 251]}, index=["a", "b"])
    image, moved, um = images.place_image(path, locs, 0.25, margin_um=10, downsample=2)
    assert (image.x, image.y, um) == (160, 110, 0.5)
    assert image.shape == (90, 90)  # 181 px cut to a multiple of two
    np.testing.assert_allclose(moved, [[20, 20], [70.5, 70.5]])
    images.write_image(image, tmp_path / "cut.tif")
    part = picture[110:290, 160:340].astype(float).reshape(90, 2, 90, 2, 3).mean((1, 3))
    with Image.open(tmp_path / "cut.tif") as written:
        assert np.abs(np.asarray(written) - part).max() <= 0.51
    image.slide.close()
    whole, same, um = images.place_image(path, locs, 0.25)
    assert (whole, um) == (path, 0.25)
    assert same is locs


def test_a_cut_stays_on_the_image(tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(section_picture((300, 400))).save(path)
    locs = pd.DataFrame({"x": [5.0, 390], "y": [20.0, 280]}, index=["a", "b"])
    image, moved, _ = images.place_image(path, locs, 1.0, margin_um=50, downsample=1)
    assert (image.x, image.y, image.shape) == (0, 0, (300, 400))
    np.testing.assert_array_equal(moved, locs)
    image.slide.close()


def test_spots_that_miss_the_image_are_judged_by_the_whole_of_it(tmp_path):
    """Cut to such spots, the image would be a strip at its edge."""
    section, _ = make_section(tmp_path)
    swapped = section.locs.rename(columns={"x": "y", "y": "x"})
    image, locs, _ = images.place_image(section.image, swapped, UM, margin_um=50)
    assert image.shape == (500, 640)
    wrong, _ = make_section(tmp_path, image=image, locs=locs)
    with pytest.raises(utils.StageError, match="640 columns and 500 rows") as error:
        sections.check_fit(wrong)
    assert "swapped" in str(error.value)
    image.slide.close()


def test_images_of_many_tiles_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.scans.STRIP_PX", 64)
    picture = section_picture((230, 170))
    images.write_image(picture, tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as written:
        np.testing.assert_array_equal(np.asarray(written), picture)


def test_check_png_shows_each_spot_in_its_place(tmp_path):
    section, _ = make_section(tmp_path, off_tissue=pd.DataFrame({"x": [600.0], "y": [40.0]}))
    small = images.thumbnail(section.image)
    sections.draw_check(section, sections.check_fit(section), small, tmp_path / "check.png")
    with Image.open(tmp_path / "check.png") as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    header = picture.shape[0] - 500
    shown = picture[header:]
    for colour, xy in ((sections.TISSUE_COLOUR, section.xy), (sections.OTHER_COLOUR, [(600, 40)])):
        row, col = np.nonzero((shown == colour).all(2))
        distance = np.hypot(
            col[:, None] + 0.5 - np.array(xy)[:, 0], row[:, None] + 0.5 - np.array(xy)[:, 1]
        )
        assert np.abs(distance.min(1) - 22).max() < 2.6
        assert set(distance.argmin(1)) == set(range(len(xy)))


@pytest.mark.parametrize(
    "content",
    [
        "1,0,3\n0,2,4\n0,0,1\n".encode("utf-8-sig"),
        b"1;0;3\r\n0;2;4\r\n0;0;1\r\n",
        "1\t0\t3\r\n0\t2\t4\r\n0\t0\t1".encode("utf-16"),
    ],
)
def test_the_matrix_of_an_alignment_is_read_as_spreadsheets_save_it(tmp_path, content):
    (tmp_path / "matrix.csv").write_bytes(content)
    wanted = [[1, 0, 3], [0, 2, 4], [0, 0, 1]]
    np.testing.assert_array_equal(aligned.read_alignment(tmp_path / "matrix.csv"), wanted)


@pytest.mark.parametrize(
    "content",
    ["1,0,3\n0,2,4\n", "1,0,3\n0,2,4\n0,0\n", "1;0;1,5\n0;2;4\n0;0;1\n", "1,0,3\n,2,4\n0,0,1"],
)
def test_what_is_no_matrix_is_named(tmp_path, content):
    (tmp_path / "matrix.csv").write_text(content)
    with pytest.raises(utils.StageError, match=r"matrix\.csv (is no matrix|holds)"):
        aligned.read_alignment(tmp_path / "matrix.csv")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(utils.StageError, match=r"none\.png is missing or no file"):
        images.open_image(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("text", "words"), [("", "names no gene"), ("ACTB\nXYZ\n", "names XYZ"), (None, "no such file")]
)
def test_bad_gene_lists_are_named(tmp_path, text, words):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(utils.StageError, match=words):
        sections.genes_of_option(str(path), GENES)


def test_genes_are_a_file_or_a_list_in_their_order_without_repeats(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffNA\r\n\r\nACTB\r\nNA\r\n".encode())
    assert sections.genes_of_option(str(path), GENES) == ["NA", "ACTB"]
    assert sections.genes_of_option("NA, ACTB,NA", GENES) == ["NA", "ACTB"]
    assert sections.genes_of_option(None, GENES) is None


# ----- the command line -----
def test_old_spellings_of_xenium_go_on():
    needed = ["--outs", "o", "--image", "i", "--aligned", "--directory", "d"]
    region = ["0", "1", "9.5", "8"]
    for counts, part in (("--counts", "--region"), ("--counts-of", "--region-um")):
        args = xenium.build_parser().parse_args([*needed, counts, "cells", part, *region])
        assert (args.counts_of, args.region_um) == ("cells", [0, 1, 9.5, 8])
        assert cli.given_options(xenium.build_parser(), args)[-5:] == [
            "--region-um", "0.0", "1.0", "9.5", "8.0",
        ]  # fmt: skip
