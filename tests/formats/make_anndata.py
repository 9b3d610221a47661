"""Write tests/formats/anndata.zip: one small Visium section in the forms in which AnnData has it.

    python -m pip install anndata==0.12.19
    python tests/formats/make_anndata.py

With anndata 0.7.8 (and "pandas<2" "numpy<1.24") it writes anndata-0.7.zip instead, with the object
whose columns that version kept in another way.

anndata allows a few versions of pandas only, so that the tests read what it wrote instead of
installing it. Every object has the spots of array() and, somewhere, counts(); see OBJECTS.
"""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

GENES = ["ACTB", "KRT8", "MARCH1", "NA"]
PIXEL_UM = 1.25  # px of the image: 100 um are 80 px
OFF_TISSUE = 4  # the first spots


def array() -> pd.DataFrame:
    """Visium's numbering of 8 rows of 8 spots, with x, y in px, turned by 3 degrees."""
    row = np.repeat(np.arange(8), 8)
    col = 2 * np.tile(np.arange(8), 8) + row % 2
    um = np.column_stack([col * 50, row * 50 * np.sqrt(3)])
    angle = np.radians(3)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    x, y = (um / PIXEL_UM @ turn + (120, 90)).T
    ids = [f"AAAC{i:03d}-1" for i in range(len(row))]
    return pd.DataFrame({"array_row": row, "array_col": col, "x": x, "y": y}, index=ids)


def counts() -> np.ndarray:
    values = np.random.default_rng(0).poisson(3, (64, len(GENES)))
    values[:, 0] += 1
    return values


def per_10_000() -> np.ndarray:
    values = counts()
    return (values / values.sum(1, keepdims=True) * 1e4).astype(np.float32)


def logarithms() -> np.ndarray:
    return np.log1p(per_10_000())


def floats() -> np.ndarray:
    return counts().astype(np.float32)


def make(x=None, genes=GENES, **layers):
    """An object as scanpy's read_visium leaves it."""
    import anndata

    table = array()
    obs = table[["array_row", "array_col"]].copy()
    obs["in_tissue"] = (np.arange(64) >= OFF_TISSUE).astype(int)
    x = floats() if x is None else x
    data = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=list(genes)))
    data.obsm["spatial"] = table[["x", "y"]].to_numpy()
    factors = {"tissue_hires_scalef": 0.2, "spot_diameter_fullres": 52.0}
    images = {"hires": np.zeros((140, 164, 3), np.float32)}
    data.uns["spatial"] = {"P1": {"scalefactors": factors, "images": images}}
    for name, values in layers.items():
        data.layers[name] = values
    return data


def with_raw(x, raw):
    data = make(raw)
    data.raw = data.copy()
    data.X = x
    return data


def fewer_genes():
    data = with_raw(logarithms(), floats())
    return data[:, ["KRT8", "NA"]].copy()


def ensembl():
    data = make(genes=[f"ENSG{i:011d}" for i in range(4)])
    data.var["feature_name"] = pd.Categorical(["TBCE", "KRT8", "TBCE", "NA"])
    return data


def repeated():
    """Symbols that occur twice, and an antibody."""
    wide = np.column_stack([counts(), counts()[:, 0]]).astype(np.float32)
    data = make(wide, genes=["TBCE", "KRT8", "TBCE", "NA", "CD3"])
    data.var["gene_ids"] = ["E1", "E2", "E3", "E4", "CD3"]
    data.var["feature_types"] = ["Gene Expression"] * 4 + ["Antibody Capture"]
    return data


def no_array():
    data = make()
    data.obs = data.obs[[]]
    return data


def text_in_tissue():
    data = make()
    data.obs["in_tissue"] = (data.obs["in_tissue"] == 1).astype("boolean")
    return data


def categories():
    """Columns of categories, which anndata 0.7 kept apart from their codes."""
    data = make()
    data.obs["in_tissue"] = pd.Categorical(data.obs["in_tissue"].astype(str))
    data.obs["sample"] = pd.Categorical(["P1"] * 64)
    data.var["feature_types"] = pd.Categorical(["Gene Expression"] * 4)
    return data


def two_sections():
    import anndata

    one, two = make(), make()
    two.obsm["spatial"] = two.obsm["spatial"][::-1].copy()
    two.obs_names = [f"{name}-2" for name in two.obs_names]
    data = anndata.concat({"P1": one, "P2": two}, label="library_id")
    data.uns["spatial"] = {"P1": {"scalefactors": {}}, "P2": {"scalefactors": {}}}
    return data


def placed(xy):
    data = make()
    data.obsm["spatial"] = xy
    return data


def table_of_places(x="x", y="y"):
    """Places as a table, its columns in another order than x, y."""
    data = make()
    data.obsm["spatial"] = pd.DataFrame({y: XY[:, 1], x: XY[:, 0]}, index=data.obs_names)
    return data


def joined(label="library_id", keep_array=True, unique=True, shift=(37.0, 25.0)):
    """Two sections on one another as concat leaves them: uns is lost."""
    import anndata

    one, two = make(), make()
    two.obsm["spatial"] = two.obsm["spatial"] + shift
    if not keep_array:
        one.obs, two.obs = one.obs[[]], two.obs[[]]
    joint = anndata.concat(
        {"P1": one, "P2": two}, label=label, index_unique="-" if unique else None
    )
    if label == "lost":
        joint.obs = joint.obs.drop(columns="lost")
    return joint


def one_array():
    """Pieces of one array, named in a column that usually names sections."""
    data = no_uns(make())
    data.obs["sample"] = np.where(np.arange(64) < 32, "left", "right")
    return data


def no_uns(data):
    del data.uns["spatial"]
    return data


def without_values():
    """The columns of pandas 2 in which values may be missing, and categories with missing ones."""
    import anndata

    anndata.settings.allow_write_nullable_strings = True
    data = make(logarithms(), counts=sparse.csr_matrix(floats()))
    spot = np.arange(64)
    tissue = pd.array(spot >= OFF_TISSUE, dtype="boolean")
    tissue[1] = pd.NA
    row, col = (pd.array(array()[name], dtype="Int64") for name in ("array_row", "array_col"))
    row[9] = pd.NA
    data.obs["in_tissue"], data.obs["array_row"], data.obs["array_col"] = tissue, row, col
    section = pd.Categorical(np.where(spot < 62, "P1", None), categories=["P0", "P1"])
    data.obs["section"] = section
    data.obs["note"] = pd.array([pd.NA, *["seen"] * 63], dtype="string")
    data.var["feature_types"] = pd.Categorical([*["Gene Expression"] * 3, None])
    data.var["symbol"] = pd.array(["A", pd.NA, "C", "D"], dtype="string")
    return data


def wide_indices():
    matrix = sparse.csr_matrix(floats())
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return make(matrix)


def square():
    """x and y exchanged."""
    return no_uns(placed(XY[:, ::-1] + (30, 0)))


def no_places():
    data = make()
    del data.obsm["spatial"]
    return data


XY = array()[["x", "y"]].to_numpy()
OBJECTS = {
    # raw counts are there
    "float": make,
    "int": lambda: make(counts()),
    "uint16": lambda: make(counts().astype(np.uint16)),
    "csr": lambda: make(sparse.csr_matrix(floats())),
    "csc": lambda: make(sparse.csc_matrix(counts().astype(np.float64))),
    "layer": lambda: make(logarithms(), counts=counts()),
    "sparse_layer": lambda: make(
        sparse.csr_matrix(logarithms()), lognorm=logarithms(), umi=sparse.csr_matrix(counts())
    ),
    "unknown_layer": lambda: make(logarithms(), mine=counts()),
    "raw": lambda: with_raw(logarithms(), floats()),
    "scaled_raw_sparse": lambda: with_raw(logarithms() - 1, sparse.csr_matrix(floats())),
    "fewer_genes": fewer_genes,
    "text_in_tissue": text_in_tissue,
    # they are not
    "log": lambda: make(logarithms()),
    "sparse_log": lambda: make(sparse.csr_matrix(logarithms())),
    "normalised": lambda: make(per_10_000()),
    "scaled": lambda: make(logarithms() - 2),
    "log_layer": lambda: make(logarithms(), counts=logarithms()),
    "log_raw": lambda: with_raw(logarithms(), logarithms()),
    "zeros": lambda: make(np.zeros((64, 4), np.float32)),
    "no_genes": lambda: make(np.zeros((64, 0), np.float32), genes=[]),
    # names, sections, places
    "ensembl": ensembl,
    "repeated": repeated,
    "no_array": no_array,
    "two_sections": two_sections,
    "categories": categories,
    "swapped": lambda: placed(XY[:, ::-1] + (0, 100)),
    "five_times": lambda: placed(XY * 5),
    "three_times": lambda: placed(XY * 3),
    "not_finite": lambda: placed(np.where(np.arange(64)[:, None] == 3, np.nan, XY)),
    "no_places": no_places,
    "table_of_places": table_of_places,
    "seurat_places": lambda: table_of_places("imagecol", "imagerow"),
    "joined": joined,
    "joined_batch": lambda: joined("batch", keep_array=False),
    "joined_own_column": lambda: joined("whose", keep_array=False),
    "joined_nameless": lambda: joined("lost", keep_array=False),
    "joined_same_ids": lambda: joined("lost", keep_array=False, unique=False),
    "one_array": one_array,
    "without_values": without_values,
    "wide_indices": wide_indices,
    "exchanged": square,
}
STORES = {"zarr2": 2, "zarr3": 3}  # .zarr folders of without_values(), and their format


def main() -> None:
    import anndata

    old = anndata.__version__.startswith("0.7.")
    archive, objects = "anndata.zip", OBJECTS
    if old:
        archive, objects = "anndata-0.7.zip", {"categories": categories}
    with tempfile.TemporaryDirectory() as name:
        target = Path(__file__).with_name(archive)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
            for key, build in objects.items():
                file = Path(name) / f"{key}.h5ad"
                build().write_h5ad(file)
                packed.write(file, file.name)
            for key, version in () if old else STORES.items():
                anndata.settings.zarr_write_format = version
                without_values().write_zarr(Path(name) / f"{key}.zarr")
                for file in sorted(f for f in Path(name, f"{key}.zarr").rglob("*") if f.is_file()):
                    packed.write(file, file.relative_to(name).as_posix())


if __name__ == "__main__":
    main()
