"""prepare/xenium.py on small runs that the tests write in the vendor's format, truth known."""

import contextlib
import json
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tifffile
import zarr
from conftest import REAL_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy import sparse
from scipy.io import mmwrite

import utils
from prepare import aligned, scans, xenium, xenium_files

RUN_UM = 0.2125  # um per pixel of the run's own images
GENES = ["ACTB", "EPCAM", "KRT8", "MARCH1", "NA", "PTPRC"]
CONTROLS = ["NegControlProbe_00042", "antisense_TP53", "BLANK_0069", "UnassignedCodeword_0301"]
LOW, HIGH = np.array([130.0, 90.0]), np.array([440.0, 360.0])  # um, the tissue
N = 9000


# -------------------------------------------------------------------------- a run and its H&E
def colour(um: np.ndarray) -> np.ndarray:
    """What the section looks like at a place (..., 2) in um: broad waves, so that any pixel grid
    shows the same."""
    x, y = um[..., 0], um[..., 1]
    waves = [np.sin(x / 13) * np.cos(y / 17), np.sin((x + y) / 19), np.cos(x / 23 - y / 11)]
    return 150 + 90 * np.stack(waves, -1)


def h_and_e(path, matrix: np.ndarray, size: tuple[int, int], **options) -> None:
    """The section photographed: ``matrix`` leads from px of the photograph to px of the run."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    mapped = np.stack([x, y, np.ones_like(x)], -1) @ matrix.T
    image = colour(mapped[..., :2] / mapped[..., 2:] * RUN_UM).astype(np.uint8)
    pixel = RUN_UM * np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    metadata = {"axes": "YXS", "PhysicalSizeX": pixel, "PhysicalSizeY": pixel}
    options = {"metadata": metadata, "tile": (256, 256), "compression": "zlib", **options}
    tifffile.imwrite(path, image, photometric="rgb", **options)


def alignment(pixel_um: float, degrees: float, flip: bool = False, tilt: float = 0.0):
    """3 x 3 from px of the H&E to px of the run, and the size of an H&E that shows all tissue."""
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ np.diag([-1.0 if flip else 1.0, 1.0]) * pixel_um / RUN_UM
    side = 500 / pixel_um  # um
    centre = matrix[:2, :2] @ np.array([side / 2, side / 2])
    matrix[:2, 2] = (LOW + HIGH) / 2 / RUN_UM - centre
    matrix[2, :2] = tilt / side
    return matrix, (round(side), round(side))


def molecules(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    names = np.array(GENES + CONTROLS)
    share = np.r_[np.full(6, 0.155), np.full(4, 0.0175)]
    feature = rng.choice(names, N, p=share / share.sum())
    return pd.DataFrame(
        {
            "transcript_id": np.arange(N, dtype=np.uint64),
            "cell_id": [f"cell{i}-1" for i in rng.integers(0, 90, N)],
            "feature_name": feature,
            "x_location": rng.uniform(LOW[0], HIGH[0], N).astype(np.float32),
            "y_location": rng.uniform(LOW[1], HIGH[1], N).astype(np.float32),
            "qv": rng.choice([5.0, 19.99, 20.0, 40.0], N, p=[0.1, 0.1, 0.4, 0.4]).astype("f4"),
            "is_gene": np.isin(feature, GENES),
        }
    )


def cell_tables(table: pd.DataFrame, seed: int = 1):
    """Matrix (cells, features), centroids and outlines of 90 cells, rows of each in another order.

    Outlines are stars of 13 vertices, closed by the first one, as the vendor's.
    """
    rng = np.random.default_rng(seed)
    good = table[table["qv"] >= 20]
    counts = pd.crosstab(good["cell_id"], good["feature_name"])[GENES + CONTROLS]
    xy = pd.DataFrame(
        rng.uniform(LOW + 20, HIGH - 20, (len(counts), 2)),
        index=counts.index, columns=["x_centroid", "y_centroid"],
    )  # fmt: skip
    outlines = []
    for cell, (x, y) in xy.iterrows():
        angle = np.linspace(0, 2 * np.pi, 13)
        radius = np.r_[rng.uniform(2, 12, 12), 0]
        radius[-1] = radius[0]
        outlines.append(
            pd.DataFrame(
                {
                    "cell_id": cell,
                    "vertex_x": x + radius * np.cos(angle),
                    "vertex_y": y + radius * np.sin(angle),
                }
            )
        )
    order = rng.permutation(len(outlines))
    return counts, xy.sample(frac=1, random_state=2), pd.concat([outlines[i] for i in order])


def write_matrix(path, counts: pd.DataFrame) -> None:
    """cell_feature_matrix.h5: compressed columns are cells."""
    matrix = sparse.csc_array(counts.to_numpy().T.astype(np.int32))
    kinds = ["Gene Expression"] * len(GENES) + ["Negative Control Probe", "Genomic Control"]
    kinds += ["Blank Codeword", "Unassigned Codeword"]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(counts.index, "S")
        features = group.create_group("features")
        features["name"] = np.array(counts.columns, "S")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(kinds))], "S")
        features["feature_type"] = np.array(kinds, "S")


def write_outs(folder, table: pd.DataFrame, cells: bool = True):
    folder.mkdir(parents=True)
    content = {"major_version": 5, "pixel_size": RUN_UM, "run_name": "test"}
    (folder / "experiment.xenium").write_text(json.dumps(content))
    parquet.write_table(
        pa.Table.from_pandas(table, preserve_index=False), folder / "transcripts.parquet",
        row_group_size=1100,
    )  # fmt: skip
    if cells:
        counts, xy, outlines = cell_tables(table)
        write_matrix(folder / "cell_feature_matrix.h5", counts)
        xy.reset_index().to_parquet(folder / "cells.parquet")
        outlines.to_parquet(folder / "cell_boundaries.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run with transcripts and cells, an H&E turned by 3 degrees, and its alignment."""
    folder = tmp_path_factory.mktemp("xenium")
    write_outs(folder / "outs", molecules())
    matrix, size = alignment(0.4, 3.0)
    h_and_e(folder / "he.ome.tif", matrix, size)
    np.savetxt(folder / "alignment.csv", matrix, delimiter=",")
    return folder


@pytest.fixture
def run_folder(shared, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(shared, tmp_path / "run A")


def prepare(folder, target, *options) -> int:
    return xenium.run(
        [
            "--outs", str(folder / "outs"), "--image", str(folder / "he.ome.tif"),
            "--alignment", str(folder / "alignment.csv"), "--directory", str(target), *options,
        ]
    )  # fmt: skip


def read_sample(target):
    """(record, truth counts, tissue, genes of the truth, locs, counts of the spots)."""
    record = json.loads((target / "prepare.json").read_text())
    with np.load(target / "truth.npz", allow_pickle=False) as saved:
        truth, tissue, genes = saved["counts"], saved["tissue"], saved["genes"].tolist()
    options = {"index_col": 0, "keep_default_na": False}
    locs = pd.read_csv(target / "locs-raw.csv", **options)
    return record, truth, tissue, genes, locs, pd.read_csv(target / "cnts.csv.gz", **options)


def brute_force(table, record, shape, locs):
    """Truth (h, w, G) and spots (N, G), molecule by molecule."""
    origin, h_w = np.array(record["frame_origin_um"]), shape
    grid, spots = np.zeros((*h_w, len(GENES))), np.zeros((len(locs), len(GENES)))
    centres = locs.to_numpy() * 0.5 + origin
    for x, y, name in table[["x_location", "y_location", "feature_name"]].itertuples(index=False):
        gene = GENES.index(name)
        grid[int((y - origin[1]) // 8), int((x - origin[0]) // 8), gene] += 1
        spots[np.hypot(centres[:, 0] - x, centres[:, 1] - y) <= 27.5, gene] += 1
    return grid, spots


# --------------------------------------------------------------------------------- molecules
def test_every_molecule_is_counted_once_and_spots_equal_brute_force(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(xenium_files, "BATCH", 700)
    assert prepare(shared, tmp_path / "s") == 0
    record, truth, tissue, genes, locs, counts = read_sample(tmp_path / "s")
    table = molecules()
    good = table[(table["qv"] >= 20) & table["is_gene"]]
    assert genes == sorted(GENES) == list(counts.columns)
    grid, spots = brute_force(good, record, tissue.shape, locs)
    np.testing.assert_array_equal(truth, grid)
    np.testing.assert_array_equal(counts.to_numpy(), spots)
    assert record["molecules_in_grid"] == len(good)
    assert record["molecules_outside"] == 0
    assert record["molecules_read"] == N
    assert record["below_quality"] == (table["qv"] < 20).sum()
    assert record["of_controls"] == ((table["qv"] >= 20) & ~table["is_gene"]).sum()
    assert record["controls"] == len(CONTROLS)
    assert record["pixel_size_um"] == 0.5
    read = {Path(name).name for name in record["inputs"]}
    assert read == {
        "he.ome.tif", "alignment.csv", "experiment.xenium", "transcripts.parquet",
        "cell_feature_matrix.h5",
    }  # fmt: skip
    assert float((tmp_path / "s" / "radius-raw.txt").read_text()) == 55
    assert (tmp_path / "s" / "check.png").is_file()


@pytest.mark.parametrize("kind", ["transcripts", "cells", "polygons"])
def test_truth_holds_the_most_variable_genes_or_the_listed_ones(shared, tmp_path, kind):
    assert prepare(shared, tmp_path / "all", "--counts", kind) == 0
    whole, truth, tissue, genes, _, counts = read_sample(tmp_path / "all")
    assert whole["molecules_in_truth"] == pytest.approx(whole["molecules_in_grid"])
    assert prepare(shared, tmp_path / "two", "--counts", kind, "--truth-genes", "2") == 0
    record, part, same_tissue, two, _, same_counts = read_sample(tmp_path / "two")
    best = counts.var(ddof=0).sort_values(ascending=False).index[:2]
    assert two == sorted(best, key=genes.index)
    np.testing.assert_array_equal(part, truth[..., [genes.index(gene) for gene in two]])
    np.testing.assert_array_equal(same_tissue, tissue)
    pd.testing.assert_frame_equal(same_counts, counts)
    assert record["molecules_in_grid"] == whole["molecules_in_grid"]
    assert record["molecules_in_truth"] == pytest.approx(part.sum(dtype=float), rel=1e-6)
    (tmp_path / "genes.txt").write_text("NA\nACTB\n")
    listed = ("--counts", kind, "--genes", str(tmp_path / "genes.txt"), "--truth-genes", "1")
    assert prepare(shared, tmp_path / "listed", *listed) == 0
    _, part, _, two, _, _ = read_sample(tmp_path / "listed")
    assert two == ["NA", "ACTB"]
    np.testing.assert_array_equal(part, truth[..., [genes.index(gene) for gene in two]])


def test_no_truth_when_not_asked_for(shared, tmp_path):
    assert prepare(shared, tmp_path / "s", "--truth-genes", "0") == 0
    assert not (tmp_path / "s" / "truth.npz").exists()
    record = json.loads((tmp_path / "s" / "prepare.json").read_text())
    assert record["molecules_in_truth"] == 0 < record["molecules_in_grid"]


def test_spots_lie_on_the_hexagonal_lattice(shared, tmp_path):
    assert prepare(shared, tmp_path / "s") == 0
    record, _, tissue, _, locs, _ = read_sample(tmp_path / "s")
    xy = locs.to_numpy()
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert apart.min() == pytest.approx(200, abs=1e-3)
    rows = np.unique(xy[:, 1].round(2))
    np.testing.assert_allclose(np.diff(rows), 100 * np.sqrt(3), atol=0.02)
    row, column = np.floor(xy[:, ::-1] / 16).astype(int).T
    assert tissue[row, column].all()
    um = locs.to_numpy() * 0.5 + record["frame_origin_um"]
    assert ((um > LOW - 20) & (um < HIGH + 20)).all()


def test_a_region_counts_what_lies_in_it_and_reports_the_rest(shared, tmp_path):
    region = (200.0, 140.0, 210.0, 190.0)
    assert (
        prepare(shared, tmp_path / "s", "--region", *map(str, region), "--min-quality", "30") == 0
    )
    record, truth, tissue, _, _, _ = read_sample(tmp_path / "s")
    table = molecules()
    good = table[(table["qv"] >= 30) & table["is_gene"]]
    x, y = good["x_location"] - region[0], good["y_location"] - region[1]
    within = (x >= 0) & (x < region[2]) & (y >= 0) & (y < region[3])
    assert truth.sum() == within.sum() == record["molecules_in_grid"]
    assert record["molecules_outside"] == (~within).sum()
    assert tifffile.imread(tmp_path / "s" / "he-raw.tif").shape == (380, 420, 3)
    assert tissue.shape == (448 // 16, 448 // 16)
    assert not tissue[380 // 16 + 1 :].any()  # the padding of he.jpg


@pytest.mark.parametrize("layout", ["category", "panel", "prefix"])
def test_controls_are_told_from_genes_in_every_version(shared, tmp_path, layout):
    """codeword_category of later versions; the cell matrix; or, with neither, the names."""
    table = molecules()
    is_gene = table.pop("is_gene")
    if layout == "category":
        kinds = np.where(is_gene, "predesigned_gene", "unassigned_codeword")
        kinds[table["feature_name"] == "KRT8"] = "custom_gene"
        table["codeword_category"] = kinds
    if layout != "category":  # earlier versions wrote bytes
        table["feature_name"] = [name.encode() for name in table["feature_name"]]
    write_outs(tmp_path / "run" / "outs", table, cells=False)
    if layout == "panel":
        source = shared / "outs" / "cell_feature_matrix.h5"
        shutil.copy(source, tmp_path / "run" / "outs")
    for name in ("he.ome.tif", "alignment.csv"):
        shutil.copy(shared / name, tmp_path / "run")
    assert prepare(tmp_path / "run", tmp_path / "s") == 0
    record, truth, _, genes, _, _ = read_sample(tmp_path / "s")
    assert genes == sorted(GENES)
    assert truth.sum() == ((table["qv"] >= 20) & is_gene).sum()
    assert record["of_controls"] == ((table["qv"] >= 20) & ~is_gene).sum()


def spoilt() -> tuple[pd.DataFrame, pd.Series, dict[str, int]]:
    """Molecules with every kind of control and with missing values; which of them count; and how
    many good ones are left out, by kind."""
    table = molecules().rename(columns={"is_gene": "gene"})
    good, third = table["qv"] >= 20, np.arange(N) // 100
    category = np.where(table["gene"], "predesigned_gene", "negative_control_probe").astype(object)
    category[table["feature_name"] == "UnassignedCodeword_0301"] = "unassigned_codeword"
    category[table["feature_name"] == "BLANK_0069"] = "deprecated_codeword"
    category[(third == 3) & ~table["gene"]] = "genomic_control_probe"
    category[(third == 4) & ~table["gene"]] = "negative_control_codeword"
    category[third == 5] = None
    table["feature_name"] = table["feature_name"].astype(object).where(third != 6, None)
    table["x_location"] = table["x_location"].where(third != 7)
    table["qv"] = table["qv"].where(third != 8)
    table["codeword_category"] = category
    named = table["feature_name"].notna()
    counts = good & named & (third != 7) & (third != 8) & (category == "predesigned_gene")
    kind = pd.Series(category).where(third != 5, "no codeword_category")
    kind[~named] = "no feature_name"
    kind[(third == 7) & (kind == "predesigned_gene")] = "no place"
    left_out = kind[good & (third != 8) & (kind != "predesigned_gene")].value_counts().to_dict()
    return table.drop(columns="gene"), counts, left_out


def to_parquet(table, folder, names=None):
    columns = pa.Table.from_pandas(table, preserve_index=False)
    if names is not None:
        columns = columns.set_column(
            columns.schema.get_field_index("feature_name"), "feature_name", names(table)
        )
    parquet.write_table(columns, folder / "transcripts.parquet", row_group_size=1100)


def in_dictionary(table):
    return pa.array(table["feature_name"], pa.string(), from_pandas=True).dictionary_encode()


def in_bytes(table):
    return pa.array([None if n is None else n.encode() for n in table["feature_name"]])


@pytest.mark.parametrize(
    ("columns", "gene"),
    [
        ({"is_gene": ["true", "False", "", "1"]}, [True, False, False, True]),
        ({"codeword_category": ["predesigned_gene", "", "custom_gene", "x"]}, None),
        ({}, None),
    ],
)
def test_a_table_of_molecules_says_by_its_own_columns_what_is_a_gene(tmp_path, columns, gene):
    path = tmp_path / "transcripts.csv"
    fixed = {"feature_name": ["A", "B", "A", "C"], "x_location": 1.5, "y_location": 2.5, "qv": 40}
    pd.DataFrame({**fixed, **columns}).to_csv(path, index=False)
    (batch,) = xenium_files.csv_batches(path)
    assert batch.features[batch.feature].tolist() == ["A", "B", "A", "C"]
    assert batch.xy.tolist() == [[1.5, 2.5]] * 4
    assert (batch.is_gene if gene is None else batch.is_gene.tolist()) == gene
    if "codeword_category" in columns:
        named = batch.category >= 0
        assert named.tolist() == [True, False, True, True]
        said = batch.categories[batch.category[named]].tolist()
        assert said == ["predesigned_gene", "custom_gene", "x"]
    else:
        assert batch.categories is None


FORMS = {
    "text": to_parquet,
    "dictionary": lambda table, folder: to_parquet(table, folder, in_dictionary),
    "bytes": lambda table, folder: to_parquet(table, folder, in_bytes),
    "csv.gz": lambda table, folder: table.to_csv(folder / "transcripts.csv.gz", index=False),
    "csv": lambda table, folder: table.to_csv(
        folder / "transcripts.csv", index=False, encoding="utf-8-sig"
    ),
    "utf-16": lambda table, folder: table.to_csv(
        folder / "transcripts.csv", index=False, encoding="utf-16"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_value_and_every_control_is_left_out_and_counted(
    shared, tmp_path, monkeypatch, form
):
    monkeypatch.setattr(xenium_files, "BATCH", 700)
    table, counts, left_out = spoilt()
    assert len(left_out) == 8
    folder = tmp_path / "run"
    write_outs(folder / "outs", molecules(), cells=False)
    (folder / "outs" / "transcripts.parquet").unlink()
    FORMS[form](table, folder / "outs")
    for name in ("he.ome.tif", "alignment.csv"):
        shutil.copy(shared / name, folder)
    assert prepare(folder, tmp_path / "s") == 0
    record, truth, tissue, genes, locs, found = read_sample(tmp_path / "s")
    assert genes == sorted(GENES)
    grid, spots = brute_force(table[counts], record, tissue.shape, locs)
    np.testing.assert_array_equal(truth, grid)
    np.testing.assert_array_equal(found.to_numpy(), spots)
    assert record["left_out"] == left_out
    assert record["of_controls"] == sum(left_out.values())
    assert record["below_quality"] == N - (table["qv"] >= 20).sum()
    assert f"{left_out['unassigned_codeword']} unassigned_codeword" in " ".join(record["notes"])


def test_a_null_in_a_dictionary_is_no_name():
    """Neither as a code without value nor as a value of the dictionary is it the last name."""
    column = pa.DictionaryArray.from_arrays(
        pa.array([0, None, 2, 1, 3], pa.int8()), pa.array(["A", None, "B", ""])
    )
    names, codes = xenium_files.encoded(column)
    assert codes.tolist() == [0, -1, 2, -1, -1]
    assert names[[0, 2]].tolist() == ["A", "B"]


@contextlib.contextmanager
def zarr_group(path):
    """A zarr 2 store in a .zip, as Xenium Explorer has it."""
    with tempfile.TemporaryDirectory() as folder:
        yield zarr.open_group(folder, mode="w", zarr_format=2)
        with zipfile.ZipFile(path, "w") as packed:
            for file in sorted(f for f in Path(folder).rglob("*") if f.is_file()):
                packed.write(file, file.relative_to(folder))


def write_zarr_molecules(path, table) -> None:
    """As Xenium Explorer has them: tiles of 250 um, a coarser level of some of them."""
    with zarr_group(path) as root:
        names = [*GENES, *CONTROLS]
        root.attrs["gene_names"] = names
        tile = (table[["x_location", "y_location"]] // 250).astype(int)
        for level, every in (("0", 1), ("1", 4)):
            for (x, y), part in table.iloc[::every].groupby([tile[c] for c in tile]):
                group = root.create_group(f"grids/{level}/{x},{y}")
                xyz = np.column_stack([part[["x_location", "y_location"]], np.zeros(len(part))])
                group.create_array("location", data=xyz.astype("f4"))
                gene = part["feature_name"].map(names.index).to_numpy("u2")
                gene[part["feature_name"] == "KRT8"] = 65535
                group.create_array("gene_identity", data=gene[:, None])
                group.create_array("quality_score", data=part["qv"].to_numpy("f4")[:, None])


def test_molecules_of_the_explorer_are_read(shared, tmp_path):
    folder = tmp_path / "run"
    write_outs(folder / "outs", molecules(), cells=False)
    (folder / "outs" / "transcripts.parquet").unlink()
    write_zarr_molecules(folder / "outs" / "transcripts.zarr.zip", molecules())
    for name in ("he.ome.tif", "alignment.csv"):
        shutil.copy(shared / name, folder)
    assert prepare(folder, tmp_path / "s") == 0
    record, truth, tissue, genes, locs, _ = read_sample(tmp_path / "s")
    table = molecules()
    good = table[(table["qv"] >= 20) & table["is_gene"] & (table["feature_name"] != "KRT8")]
    assert genes == sorted(set(GENES) - {"KRT8"})
    grid, _ = brute_force(good, record, tissue.shape, locs)
    np.testing.assert_array_equal(truth, np.delete(grid, GENES.index("KRT8"), axis=2))
    krt8 = (table["feature_name"] == "KRT8") & (table["qv"] >= 20)
    assert record["left_out"]["no feature_name"] == krt8.sum()


def test_a_molecule_of_a_gene_beyond_the_list_is_refused(tmp_path):
    path = tmp_path / "transcripts.zarr.zip"
    with zarr_group(path) as root:
        root.attrs["gene_names"] = ["A", "B"]
        group = root.create_group("grids/0/0,0")
        group.create_array("location", data=np.ones((3, 3), "f4"))
        group.create_array("gene_identity", data=np.array([[0], [65535], [2]], "u2"))
        group.create_array("quality_score", data=np.full((3, 1), 40, "f4"))
    with pytest.raises(utils.StageError, match="gene 2 of 2 in tile 0,0"):
        list(xenium_files.zarr_batches(path))


def test_cells_of_the_first_versions_have_numbers_for_names():
    for ids in (np.array([7, 12]), np.array([[7], [12]], "u4")):
        assert xenium_files.cell_names(ids) == ["7", "12"]


def test_the_order_of_adding_does_not_matter():
    rng = np.random.default_rng(0)
    parts = [
        sparse.random_array((50, 40), density=d, rng=rng).tocsr() for d in rng.uniform(0, 0.3, 37)
    ]
    total = xenium.Total()
    for part in parts:
        total.add(part)
        assert len(total.parts) < 9
    np.testing.assert_allclose(total.sum().toarray(), sum(part.toarray() for part in parts))


# ------------------------------------------------------------------------------------- image
@pytest.mark.parametrize(
    ("pixel_um", "degrees", "flip", "tilt"),
    [
        (0.4, 3.0, False, 0.0),
        (0.5, 90.0, False, 0.0),
        (0.5, 0.0, True, 0.0),
        (0.27, 183.0, True, 0.0),
        (0.22, 30.0, False, 0.0),
        (0.8, -3.0, False, 0.0),
        (0.4, 10.0, False, 0.08),
    ],
)
def test_the_image_is_brought_into_the_frame_of_the_run(tmp_path, pixel_um, degrees, flip, tilt):
    matrix, size = alignment(pixel_um, degrees, flip, tilt)
    path = tmp_path / "he.tif"
    h_and_e(path, matrix, size, metadata=None)
    frame = xenium.make_frame(LOW, HIGH, None)
    run_px = np.diag([1 / RUN_UM] * 2 + [1.0])
    with scans.open_slide(path) as slide:
        to_slide = np.linalg.inv(matrix) @ run_px @ frame.to_um
        image = aligned.Aligned(slide, 0, 0, *frame.size, to_slide=to_slide)
        whole = image.read(0, image.shape[0])
        strips = np.concatenate(
            [
                image.read(top, min(top + 300, image.shape[0]))
                for top in range(0, image.shape[0], 300)
            ]
        )
        small = image.read(0, image.shape[0], 4)
    x, y = np.meshgrid(np.arange(frame.size[0]) + 0.5, np.arange(frame.size[1]) + 0.5)
    um = np.stack([x, y], -1) * 0.5 + frame.origin
    on_slide = aligned.project(to_slide, np.stack([x, y], -1).reshape(-1, 2)).reshape(um.shape)
    inner = ((on_slide > 3) & (on_slide < np.array(size) - 3)).all(-1)
    outer = ((on_slide < -3) | (on_slide > np.array(size) + 3)).any(-1)
    assert inner.mean() > 0.8
    error = np.abs(whole - colour(um))
    assert error[inner].mean() < 1.2
    assert error[inner].max() < 8  # a shift by a pixel gives 4 on average, 10 at most
    assert (whole[outer] == 255).all()
    assert np.abs(strips.astype(int) - whole).max() <= 2
    blocks = whole[: len(small) * 4, : small.shape[1] * 4].reshape(len(small), 4, -1, 4, 3)
    block_inner = inner[: len(small) * 4, : small.shape[1] * 4].reshape(len(small), 4, -1, 4)
    gap = np.abs(small - blocks.mean((1, 3)))[block_inner.all((1, 3))]
    assert gap.mean() < 2


def test_an_image_already_in_the_frame_keeps_its_pixels(shared, tmp_path):
    """At 0.5 um, without alignment, he-raw is a plain part of the image."""
    matrix, size = np.diag([0.5 / RUN_UM] * 2 + [1.0]), (1300, 1000)
    h_and_e(tmp_path / "he.ome.tif", matrix, size)
    options = ["--outs", str(shared / "outs"), "--image", str(tmp_path / "he.ome.tif")]
    assert xenium.run([*options, "--aligned", "--directory", str(tmp_path / "s")]) == 0
    record = read_sample(tmp_path / "s")[0]
    left, top = np.array(record["frame_origin_um"]) * 2
    found = tifffile.imread(tmp_path / "s" / "he-raw.tif")
    source = tifffile.imread(tmp_path / "he.ome.tif")
    top, left = int(top), int(left)
    expected = source[top : top + len(found), left : left + found.shape[1]]
    np.testing.assert_array_equal(found[: len(expected), : expected.shape[1]], expected)
    assert any("by --aligned" in note for note in record["notes"])


def test_beyond_the_horizon_of_a_tilted_slide_there_is_nothing(tmp_path):
    h_and_e(tmp_path / "he.tif", np.eye(3), (64, 64), metadata=None)
    to_slide = np.array([[1, 0, 0], [0, 1, 0], [-1 / 300, 0, 1.0]])  # none of x >= 300
    with scans.open_slide(tmp_path / "he.tif") as slide:
        image = aligned.Aligned(slide, 0, 0, 600, 64, to_slide=to_slide)
        assert image.warp((0, 0), (8, 8), 1).max() < 255
        assert image.warp((296, 0), (8, 8), 1).tolist() == np.full((8, 8, 3), 255).tolist()


def test_tissue_ends_where_the_slide_ends(shared, tmp_path):
    """Superpixels and spots that the H&E does not show are no tissue, and spots no spots."""
    matrix, size = np.diag([0.5 / RUN_UM] * 2 + [1.0]), (875, 1000)  # ends at 437.5 um
    h_and_e(tmp_path / "he.ome.tif", matrix, size)
    options = ["--outs", str(shared / "outs"), "--image", str(tmp_path / "he.ome.tif")]
    assert xenium.run([*options, "--aligned", "--directory", str(tmp_path / "s")]) == 0
    record, _, tissue, _, _, _ = read_sample(tmp_path / "s")
    ends = record["frame_origin_um"][0] + 8 * (np.flatnonzero(tissue.any(0)).max() + 0.5)
    assert ends < 437.5 <= ends + 8


# ------------------------------------------------------------------------------------- cells
def test_cells_are_joined_by_id_and_counted_at_their_centroids(shared, tmp_path):
    assert prepare(shared, tmp_path / "s", "--counts", "cells") == 0
    record, truth, tissue, genes, locs, counts = read_sample(tmp_path / "s")
    matrix, xy, _ = cell_tables(molecules())
    origin = np.array(record["frame_origin_um"])
    grid, spots = np.zeros((*tissue.shape, len(GENES))), np.zeros((len(locs), len(GENES)))
    for cell, (x, y) in xy.iterrows():
        grid[int((y - origin[1]) // 8), int((x - origin[0]) // 8)] += matrix.loc[cell, GENES]
        near = np.hypot(*(locs.to_numpy() * 0.5 + origin - (x, y)).T) <= 27.5
        spots[near] += matrix.loc[cell, GENES].to_numpy()
    assert genes == GENES
    np.testing.assert_array_equal(truth, grid)
    np.testing.assert_array_equal(counts.to_numpy(), spots)
    assert record["cells"] == len(matrix)
    lost = matrix[CONTROLS].sum()
    assert f"1 features of type Blank Codeword with {lost['BLANK_0069']:,} molecules" in " ".join(
        record["notes"]
    )


def clip(polygon: list, axis: int, value: float, keep_above: bool) -> list:
    """The part of a polygon on one side of a line (Sutherland and Hodgman)."""
    kept = []
    for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        inside = [(p[axis] >= value) == keep_above for p in (a, b)]
        if inside[0]:
            kept.append(a)
        if inside[0] != inside[1]:
            t = (value - a[axis]) / (b[axis] - a[axis])
            kept.append(tuple(a[i] + t * (b[i] - a[i]) for i in (0, 1)))
    return kept


def shoelace(polygon: list) -> float:
    if len(polygon) < 3:
        return 0.0
    x, y = np.array(polygon).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def area_in_square(polygon: list, row: int, col: int) -> float:
    for axis, low in ((0, col), (1, row)):
        polygon = clip(clip(polygon, axis, low, True), axis, low + 1, False) if polygon else []
    return abs(shoelace(polygon))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(3, 14), scale=st.floats(0.05, 3),
    whole=st.booleans(), clockwise=st.booleans(), closed=st.booleans(),
)  # fmt: skip
def test_area_shares_equal_clipping(seed, n, scale, whole, clockwise, closed):
    """Star-shaped outlines anywhere, also with vertices and edges on the grid lines."""
    rng = np.random.default_rng(seed)
    cells, vertices, expected = [], [], {}
    for cell in range(3):
        angle = (
            (np.arange(n) + rng.uniform(0, 0.4, n)) * 2 * np.pi / n
        )  # less than half a turn apart
        star = np.column_stack([np.cos(angle), np.sin(angle)]) * rng.uniform(0.3, 1, (n, 1))
        xy = rng.uniform(-5, 5, 2) + star * scale
        xy = np.round(xy) if whole else xy
        polygon = [tuple(p) for p in xy]
        (left, top), (right, bottom) = (
            np.floor(xy.min(0)).astype(int),
            np.ceil(xy.max(0)).astype(int),
        )
        for row in range(top - 1, bottom + 1):
            for col in range(left - 1, right + 1):
                expected[cell, row, col] = area_in_square(polygon, row, col)
        if clockwise:
            xy = xy[::-1]
        if closed:
            xy = np.vstack([xy, xy[:1]])
        cells += [cell] * len(xy)
        vertices.append(xy)
    shares, bare = xenium.outline_shares(np.array(cells), np.concatenate(vertices), 4)
    found = {key[:3]: key[3] for key in zip(*(column.tolist() for column in shares), strict=True)}
    assert 3 in bare  # without any vertex
    for cell in set(range(3)) - set(bare.tolist()):
        here = {key[1:]: a for key, a in expected.items() if key[0] == cell}
        total = sum(here.values())
        if whole and abs(sum(here.values()) - signed_total(vertices[cell])) > 1e-6:
            continue  # rounding made the outline cross itself: there clipping is no reference
        for place, area in here.items():
            assert found.get((cell, *place), 0.0) == pytest.approx(area / total, abs=1e-7)
        assert sum(v for k, v in found.items() if k[0] == cell) == pytest.approx(1)


def signed_total(xy: np.ndarray) -> float:
    return abs(shoelace([tuple(p) for p in xy]))


def test_polygons_spread_a_cell_by_area_and_conserve_its_molecules(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("method.grid.MAX_SQUARES", 500)  # several blocks
    assert prepare(shared, tmp_path / "s", "--counts", "polygons") == 0
    record, truth, tissue, _, locs, counts = read_sample(tmp_path / "s")
    matrix, _, outlines = cell_tables(molecules())
    origin = np.array(record["frame_origin_um"])
    grid = np.zeros((*tissue.shape, len(GENES)))
    for cell, outline in outlines.groupby("cell_id"):
        xy = (outline[["vertex_x", "vertex_y"]].to_numpy()[:-1] - origin) / 8
        polygon = [tuple(p) for p in xy]
        (left, top), (right, bottom) = np.floor(xy.min(0)), np.floor(xy.max(0))
        for row in range(int(top), int(bottom) + 1):
            for col in range(int(left), int(right) + 1):
                share = area_in_square(polygon, row, col) / abs(shoelace(polygon))
                grid[row, col] += share * matrix.loc[cell, GENES].to_numpy()
    np.testing.assert_allclose(truth, grid, atol=1e-4)
    assert truth.sum(dtype=float) == pytest.approx(matrix[GENES].to_numpy().sum(), rel=1e-6)
    assert record["molecules_outside"] == pytest.approx(0, abs=1e-6)
    row, col = np.mgrid[: tissue.shape[0], : tissue.shape[1]] * 16 + 8
    for (_, (x, y)), spot in zip(locs.iterrows(), counts.to_numpy(), strict=True):
        near = np.hypot(col - x, row - y) <= 55
        np.testing.assert_allclose(spot, grid[near].sum(0), rtol=1e-5, atol=1e-5)


def test_cells_without_a_sound_outline_fall_back_to_their_centroid(run_folder, tmp_path):
    path = run_folder / "outs" / "cell_boundaries.parquet"
    outlines = pd.read_parquet(path)
    gone = outlines["cell_id"].unique()[:7]
    outlines = outlines[~outlines["cell_id"].isin(gone[:3])].reset_index(drop=True)
    first = [np.flatnonzero(outlines["cell_id"] == cell)[0] for cell in gone[3:]]
    outlines.loc[first, "vertex_x"] = [1e30, -1e7, 4e3, 1e19]  # 1e30 took all memory there is
    outlines.to_parquet(path, index=False)
    assert prepare(run_folder, tmp_path / "s", "--counts", "polygons") == 0
    record, truth, *_ = read_sample(tmp_path / "s")
    matrix = cell_tables(molecules())[0]
    assert truth.sum(dtype=float) == pytest.approx(matrix[GENES].to_numpy().sum(), rel=1e-6)
    assert any(note.startswith("7 cells without a sound outline") for note in record["notes"])


def write_zarr_cells(path, centroids, outlines, version: int) -> None:
    """cells.zarr.zip of XOA 2 and later, and of XOA 1; ids are numbers there."""
    with zarr_group(path) as root:
        ids = np.column_stack([np.arange(len(centroids)) + 0x1F0, np.ones(len(centroids), int)])
        root.create_array("cell_id", data=ids.astype("u4"))
        summary = root.create_array(
            "cell_summary", data=np.column_stack([np.ones(len(ids)), centroids.to_numpy()])
        )
        summary.attrs["column_names"] = ["cell_area", "cell_centroid_x", "cell_centroid_y"]
        places = dict(zip(centroids.index, range(len(ids)), strict=True))
        size = outlines.groupby("cell_id").size()
        xy = np.zeros((len(ids), 2 * size.max() + 4), "f4")
        for cell, part in outlines.groupby("cell_id"):
            flat = part[["vertex_x", "vertex_y"]].to_numpy().ravel()
            xy[places[cell], : len(flat)] = flat
        n = size[centroids.index].to_numpy("i4")
        if version == 1:
            root.create_array("polygon_num_vertices", data=np.stack([n - 2, n]))
            root.create_array("polygon_vertices", data=np.stack([xy * 0, xy]))
        else:
            root.attrs["polygon_set_names"] = ["nucleus", "cell"]
            order = np.random.default_rng(3).permutation(len(ids))
            for i, factor in enumerate((0, 1)):
                group = root.create_group(f"polygon_sets/{i}")
                group.create_array("cell_index", data=order.astype("u4"))
                group.create_array("num_vertices", data=n[order])
                group.create_array("vertices", data=xy[order] * factor)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["cells", "polygons"])
def test_cells_of_the_explorer_give_the_same_sample(run_folder, tmp_path, kind, version):
    """cells.zarr.zip stands in for both tables, and the folder of the matrix for its .h5."""
    outs = run_folder / "outs"
    counts, centroids, outlines = cell_tables(molecules())
    names = {cell: f"{i + 0x1F0:08x}" for i, cell in enumerate(centroids.index)}
    letters = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
    names = {cell: f"{name.translate(letters)}-1" for cell, name in names.items()}
    assert names[centroids.index[0]] == "aaaaabpa-1"
    write_matrix(outs / "cell_feature_matrix.h5", counts.rename(index=names))
    for name, table in (
        ("cells", centroids.reset_index()),
        ("cell_boundaries", outlines.astype({"vertex_x": "f4", "vertex_y": "f4"})),
    ):
        table.assign(cell_id=table["cell_id"].map(names)).to_parquet(outs / f"{name}.parquet")
    assert prepare(run_folder, tmp_path / "a", "--counts", kind) == 0
    for name in ("cells", "cell_boundaries"):
        (outs / f"{name}.parquet").unlink()
    write_zarr_cells(outs / "cells.zarr.zip", centroids, outlines, version)
    assert prepare(run_folder, tmp_path / "b", "--counts", kind) == 0
    (_, truth, *_, locs, spots), (_, again, *_, same_locs, same) = (
        read_sample(tmp_path / name) for name in "ab"
    )
    np.testing.assert_allclose(again, truth, atol=1e-5)
    pd.testing.assert_frame_equal(same_locs, locs)
    pd.testing.assert_frame_equal(same, spots)


def test_the_matrix_may_be_a_folder(shared, run_folder, tmp_path):
    outs = run_folder / "outs"
    counts = cell_tables(molecules())[0]
    folder = outs / "cell_feature_matrix"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.coo_array(counts.to_numpy().T))
    kinds = ["Gene Expression"] * 6 + ["Negative Control Probe"] * 3 + ["Protein Expression"]
    rows = zip([f"E{i}" for i in range(10)], counts.columns, kinds, strict=True)
    (folder / "features.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / "barcodes.tsv").write_text("".join(f"{cell}\n" for cell in counts.index))
    (outs / "cell_feature_matrix.h5").unlink()
    assert prepare(run_folder, tmp_path / "s", "--counts", "cells") == 0
    assert prepare(shared, tmp_path / "t", "--counts", "cells") == 0
    found, expected = (read_sample(tmp_path / name) for name in "st")
    np.testing.assert_array_equal(found[1], expected[1])
    lost = counts[CONTROLS[-1]].sum()
    assert (
        f"1 features of type Protein Expression with {lost:,} molecules are left out"
        in (found[0]["notes"])
    )


@pytest.mark.parametrize("form", ["parquet", "utf-8-sig", "utf-16"])
def test_cells_without_a_place_are_left_out_and_counted(run_folder, tmp_path, form):
    outs, (counts, centroids, _) = run_folder / "outs", cell_tables(molecules())
    centroids.iloc[:2, 0] = np.nan
    table = centroids.reset_index()
    table = pd.concat([table, table[:3].assign(cell_id=None)])  # of no cell
    (outs / "cells.parquet").unlink()
    if form.startswith("utf"):
        table.to_csv(outs / "cells.csv", index=False, encoding=form)
    else:
        table.to_parquet(outs / "cells.parquet", index=False)
    assert prepare(run_folder, tmp_path / "s", "--counts", "cells") == 0
    record, truth, *_ = read_sample(tmp_path / "s")
    lost = counts.loc[centroids.index[:2], GENES].to_numpy().sum()
    assert f"2 cells without a place, {lost:,} molecules, are left out" in record["notes"]
    assert truth.sum() == counts[GENES].to_numpy().sum() - lost


def test_without_transcripts_the_cells_are_taken(run_folder, tmp_path):
    (run_folder / "outs" / "transcripts.parquet").unlink()
    assert prepare(run_folder, tmp_path / "s") == 0
    record = read_sample(tmp_path / "s")[0]
    assert record["counts_of"] == "cells"
    assert any("transcripts.csv.gz" in note for note in record["notes"])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real data beside the checkout")
def test_real_cell_tables_are_read_and_joined():
    folder = REAL_DATA / "formats" / "xenium_small"
    cells = xenium.read_cells(folder)
    assert cells.counts.shape == (6, 4)
    assert cells.ids.tolist() == list("123456")
    table = pd.read_csv(folder / "cells.csv.gz")
    np.testing.assert_allclose(cells.xy[:, 0], table["x_centroid"])
    assert (np.asarray(cells.counts.sum(1)) <= table["transcript_counts"]).all()


# ---------------------------------------------------------------------------------- archives
def pack_tar(path, members: dict, source) -> None:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                packed.addfile(content)
            else:
                packed.add(source / content, arcname=name)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_give_the_same_sample(shared, tmp_path, kind):
    assert prepare(shared, tmp_path / "a") == 0
    archive = tmp_path / f"outs.{kind}.gz" if kind == "tar" else tmp_path / "outs.zip"
    names = sorted(p.name for p in (shared / "outs").iterdir())
    if kind == "tar":
        pack_tar(archive, {f"run1/outs/{n}": n for n in names}, shared / "outs")
    else:
        with zipfile.ZipFile(archive, "w") as packed:
            for name in names:
                packed.write(shared / "outs" / name, name)
            packed.writestr("analysis/umap/projection.csv", "x")
    code = xenium.run(
        [
            "--outs", str(archive), "--image", str(shared / "he.ome.tif"),
            "--alignment", str(shared / "alignment.csv"), "--directory", str(tmp_path / "b"),
        ]
    )  # fmt: skip
    assert code == 0
    for name in ("locs-raw.csv", "cnts.csv.gz", "he-raw.tif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../../evil.txt": "experiment.xenium"}, "leads out of a folder"),
        ({"a/../../cells.parquet": "experiment.xenium"}, "leads out of a folder"),
        ({"..\\cells.parquet": "experiment.xenium"}, "leads out of a folder"),
        ({"C:\\cells.parquet": "experiment.xenium"}, "leads out of a folder"),
        ({"cells.parquet": link("cells.parquet", "/etc/passwd", tarfile.SYMTYPE)}, "as a link"),
        ({"cells.parquet": link("cells.parquet", "x", tarfile.LNKTYPE)}, "as a link"),
        ({"cells.parquet": link("cells.parquet", "", tarfile.FIFOTYPE)}, "as a link"),
        ({"cells.parquet": link("cells.parquet", "", tarfile.CHRTYPE)}, "as a link"),
        ({"a/cells.parquet": "experiment.xenium", "b/cells.parquet": "experiment.xenium"}, "twice"),
        ({"readme.txt": "experiment.xenium"}, "has none of"),
    ],
)
def test_malicious_archives_are_refused_and_nothing_is_written(
    shared, tmp_path, capsys, members, words
):
    archive = tmp_path / "outs.tar.gz"
    pack_tar(archive, members, shared / "outs")
    before = sorted(tmp_path.parent.rglob("*"))
    code = xenium.run(
        [
            "--outs", str(archive), "--image", str(shared / "he.ome.tif"),
            "--alignment", str(shared / "alignment.csv"), "--directory", str(tmp_path / "s"),
        ]
    )  # fmt: skip
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert str(archive) in message
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_an_absolute_path_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("/tmp/experiment.xenium", "{}")
    with pytest.raises(utils.StageError, match="leads out of a folder"):
        xenium_files.unpack(tmp_path / "a.zip", tmp_path)


def test_an_archive_with_a_password_is_to_be_unpacked(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("experiment.xenium", "{}")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the sign of it, in the directory of the archive
    path.write_bytes(content)
    with pytest.raises(utils.StageError, match=r"a\.zip is packed with a password") as error:
        xenium_files.unpack(path, tmp_path)
    assert "Unpack it." in str(error.value)


def test_the_folder_around_the_outs_will_do(shared, tmp_path):
    with xenium_files.open_outs(shared) as found:
        assert found == shared / "outs"
    (tmp_path / "outs").mkdir()
    words = r"has none of .*experiment\.xenium"
    with pytest.raises(utils.StageError, match=words), xenium_files.open_outs(tmp_path):
        pass


def test_what_is_no_archive_is_not_said_to_be_damaged(shared, tmp_path, capsys):
    outs = shared / "outs" / "transcripts.parquet"
    rest = ["--image", str(shared / "he.ome.tif"), "--aligned", "--directory", str(tmp_path / "s")]
    assert xenium.run(["--outs", str(outs), *rest]) == 2
    message = capsys.readouterr().err
    assert "neither a folder nor an archive" in message
    assert "download" not in message


def test_a_cut_off_archive_is_refused(shared, tmp_path):
    pack_tar(tmp_path / "a.tar.gz", {"experiment.xenium": "transcripts.parquet"}, shared / "outs")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(utils.StageError, match="no whole"):
        xenium_files.unpack(tmp_path / "a.tar.gz", tmp_path)


# ---------------------------------------------------------------------------------- bad input
def cut(name):
    return lambda f: (f / "outs" / name).write_bytes((f / "outs" / name).read_bytes()[:3000])


def rewrite(name, change):
    def spoil(folder):
        path = folder / "outs" / name
        change(pd.read_parquet(path)).to_parquet(path, index=False)

    return spoil


def write_alignment(matrix):
    return lambda folder: np.savetxt(folder / "alignment.csv", matrix, delimiter=",")


TURN = alignment(0.4, 3.0)[0]
SHIFTED = TURN + np.array([[0, 0, 1500.0], [0, 0, 0], [0, 0, 0]])


def drop(*names):
    return lambda f: [(f / "outs" / name).unlink() for name in names]


def in_two_corners(table):
    """The whole width and height, but of a square of 8 um each."""
    near = [np.abs(table[f"{axis}_location"] - at[i]) < 8
            for at in (LOW, HIGH) for i, axis in enumerate("xy")]  # fmt: skip
    return table[(near[0] & near[1]) | (near[2] & near[3])]


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (
            drop("transcripts.parquet"),
            ("--counts", "transcripts"),
            "none of transcripts.parquet, transcripts.csv.gz, transcripts.csv, transcripts.zarr",
        ),
        (drop("cells.parquet"), ("--counts", "cells"), "none of cells.parquet, cells.csv.gz"),
        (
            drop("transcripts.parquet", "cell_feature_matrix.h5"),
            (),
            "no cell_feature_matrix.h5 and no folder cell_feature_matrix",
        ),
        (
            lambda f: (f / "alignment.csv").write_text(
                "fixedX,fixedY,alignmentX,alignmentY\n1,2,3,4\n5,6,7,8\n1,6,3,8\n"
            ),
            (),
            "*_imagealignment.csv",
        ),
        (lambda f: (f / "outs" / "experiment.xenium").write_text("[1]"), (), "pixel_size"),
        (
            lambda f: (f / "outs" / "experiment.xenium").write_text('{"pixel_size": "wide"}'),
            (),
            "no experiment.xenium as known",
        ),
        (
            rewrite("transcripts.parquet", lambda t: t.assign(qv="good")),
            (),
            "no table of molecules as known",
        ),
        (lambda f: (f / "outs" / "experiment.xenium").unlink(), (), "experiment.xenium is missing"),
        (lambda f: (f / "outs" / "experiment.xenium").write_text("{}"), (), "pixel_size"),
        (
            lambda f: (f / "outs" / "experiment.xenium").write_text('{"pixel_size": 21}'),
            (),
            "pixel_size of 21",
        ),
        (cut("transcripts.parquet"), (), "no whole Parquet"),
        (rewrite("transcripts.parquet", lambda t: t.drop(columns="qv")), (), "no column qv"),
        (rewrite("transcripts.parquet", lambda t: t[~t["is_gene"]]), (), "no molecule of a gene"),
        (lambda f: None, ("--min-quality", "90"), "no molecule of a gene"),
        (write_alignment(np.linalg.inv(TURN)), (), "Inverted, the matrix"),
        (write_alignment(np.linalg.inv(TURN)), ("--pixel-size", "0.1129"), "Inverted, the matrix"),
        (write_alignment(np.diag([9, 9, 1.0])), (), "another copy of the image"),
        (write_alignment(np.diag([9, 9, 1.0])), ("--pixel-size", "0.4"), "another copy"),
        (write_alignment(SHIFTED), (), "do not belong together"),
        (write_alignment(TURN[:2]), (), "expected an invertible 3 x 3"),
        (write_alignment(np.zeros((3, 3))), (), "expected an invertible 3 x 3"),
        (write_alignment(TURN * np.nan), (), "expected an invertible 3 x 3"),
        (lambda f: (f / "alignment.csv").write_text("a,b,c\n1,2,3\n"), (), "no matrix of numbers"),
        (lambda f: (f / "alignment.csv").unlink(), (), "no matrix of numbers"),
        (lambda f: (f / "he.ome.tif").unlink(), (), "missing"),
        (lambda f: None, ("--region", "0", "0", "50", "500"), "Choose a larger part of the run"),
        (lambda f: None, ("--region", "0", "0", "60000", "60000"), "Choose a smaller part"),
        (
            rewrite("cells.parquet", lambda t: t.iloc[2:]),
            ("--counts", "cells"),
            "no place for 2 of 90 cells",
        ),
        (
            rewrite("cells.parquet", lambda t: pd.concat([t, t[:1]])),
            ("--counts", "cells"),
            "more than once",
        ),
        (
            lambda f: (f / "outs" / "cell_boundaries.parquet").unlink(),
            ("--counts", "polygons"),
            "none of cell_boundaries",
        ),
        (cut("cells.parquet"), ("--counts", "cells"), "no whole Parquet"),
        (
            rewrite("cells.parquet", lambda t: t.assign(x_centroid=np.nan)),
            ("--counts", "cells"),
            "cells.parquet has no place for any cell",
        ),
        (
            rewrite("transcripts.parquet", in_two_corners),
            (),
            "pseudo-spots lies in tissue.\nGive a whole section.",
        ),
        (
            rewrite("cells.parquet", lambda t: t.rename(columns={"x_centroid": "x"})),
            ("--counts", "cells"),
            "has no column x_centroid, but cell_id, x, y_centroid",
        ),
        (
            rewrite("cells.parquet", lambda t: t.assign(x_centroid="left")),
            ("--counts", "cells"),
            "no table of cells as known",
        ),
        (lambda f: shutil.rmtree(f / "outs"), (), "does not exist"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    run_folder, tmp_path, capsys, spoil, options, words
):
    spoil(run_folder)
    target = tmp_path / "s"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert prepare(run_folder, target, *options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert [p.name for p in target.iterdir()] == ["notes.txt"]


def test_an_alignment_that_mirrors_is_noted(run_folder, tmp_path):
    matrix, size = alignment(0.4, 3.0, flip=True)
    h_and_e(run_folder / "he.ome.tif", matrix, size)
    np.savetxt(run_folder / "alignment.csv", matrix, delimiter=",")
    assert prepare(run_folder, tmp_path / "s") == 0
    assert any("mirrors the H&E" in note for note in read_sample(tmp_path / "s")[0]["notes"])


@pytest.mark.parametrize("value", ["nan", "inf", "1e30", "left"])
def test_a_region_is_of_numbers(shared, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as stop:
        prepare(shared, tmp_path / "s", "--region-um", "0", value, "400", "400")
    assert stop.value.code == 2
    assert "is not a number" in capsys.readouterr().err


def test_the_alignment_cannot_be_forgotten(shared, tmp_path, capsys):
    """The tissue may fall on the H&E even so, in the wrong place."""
    options = ["--outs", str(shared / "outs"), "--image", str(shared / "he.ome.tif")]
    with pytest.raises(SystemExit) as stop:
        xenium.run([*options, "--directory", str(tmp_path / "s")])
    assert stop.value.code == 2
    assert "one of the arguments --alignment --aligned is required" in capsys.readouterr().err


def test_image_without_alignment_or_pixel_size_is_refused(shared, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "he.tif", np.zeros((999, 999, 3), np.uint8), photometric="rgb")
    options = ["--outs", str(shared / "outs"), "--image", str(tmp_path / "he.tif")]
    assert xenium.run([*options, "--aligned", "--directory", str(tmp_path / "s")]) == 2
    assert "--pixel-size" in capsys.readouterr().err


def test_a_gene_list_becomes_gene_names(shared, tmp_path, capsys):
    (tmp_path / "genes.txt").write_text("KRT8\nNA\n")
    assert prepare(shared, tmp_path / "s", "--genes", str(tmp_path / "genes.txt")) == 0
    assert (tmp_path / "s" / "gene-names.txt").read_text() == "KRT8\nNA\n"
    (tmp_path / "genes.txt").write_text("KRT9\n")
    assert prepare(shared, tmp_path / "t", "--genes", str(tmp_path / "genes.txt")) == 2
    assert "KRT9" in capsys.readouterr().err


def test_the_first_stage_accepts_the_sample(shared, tmp_path):
    import image_calibration

    assert prepare(shared, tmp_path / "s") == 0
    assert image_calibration.run(["--directory", str(tmp_path / "s")]) == 0
    _, truth, tissue, *_ = read_sample(tmp_path / "s")
    with scans.open_slide(tmp_path / "s" / "he.jpg") as image:
        assert image.size == (tissue.shape[1] * 16, tissue.shape[0] * 16)
    assert truth.shape[:2] == tissue.shape
