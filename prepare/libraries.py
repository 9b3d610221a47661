"""The section that is taken of an AnnData object, and its spots: their places and their counts.

Objects of several sections are joined by concat, and what told them apart is often lost. So the
spots themselves are looked at: those of one section lie on one lattice, each at a place of its own.
Letters in shapes: N spots, G genes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from prepare import lattice, scans, tenx
from prepare.annotated import Annotated, find_counts, gene_names, keys_of, read_array, read_frame
from prepare.section import FLAGS
from reading.tables import MAX_PLACE_PX

LIBRARIES = (  # columns of obs that usually name a section
    "library_id", "library", "sample_id", "sample", "section", "section_id", "slide", "slide_id",
    "capture_area", "dataset", "batch", "orig.ident",
)  # fmt: skip
ALL = "all"  # --library all: every spot lies on the one image
ARRAY = ("array_row", "array_col")  # in obs: the place of a spot on Visium's array
X_NAMES = ("x", "pxl_col_in_fullres", "imagecol", "x_centroid", "pixel_x")  # of a table of places
Y_NAMES = ("y", "pxl_row_in_fullres", "imagerow", "y_centroid", "pixel_y")
MAX_SHOWN = 100  # a column of more different values names no sections
NEAR = 0.75  # of the usual distance of spots: nearer ones are of another lattice
MAX_NEAR = 0.02  # share of such spots in one section
UNEVEN = 0.65  # nearest by fourth nearest distance, median; 1 on a lattice, 0.58 or less on two
FEW = 20  # spots, of which no lattice can be told


@dataclass
class SourceSpots:
    """What every source gives: counts (N, G) and the places of the spots, px of the image."""

    counts: sparse.csr_array
    ids: list[str]
    genes: list[str]
    places: pd.DataFrame  # index: ids; x, y; array_row, array_col if known
    in_tissue: np.ndarray  # bool (N,)
    notes: list[str] = field(default_factory=list)
    copies: tenx.SmallerCopies = field(default_factory=lambda: tenx.SmallerCopies({}, None))
    pixel_size_um: float | None = None
    radius_um: float | None = None
    image: Path | scans.Slide | None = None  # of the source itself
    files: list[Path] = field(default_factory=list)  # read, beside the image; for the record


# -------------------------------------------------------------------------------------------------
# places
# -------------------------------------------------------------------------------------------------
def read_places(data: Annotated) -> np.ndarray:
    """x, y (N, 2) of obsm["spatial"], an array or a table; not finite where there is no number."""
    known = keys_of(data.root, "obsm")
    if "spatial" not in known:
        raise utils.StageError(
            f"{data.path} has no obsm['spatial'], only {utils.some(known) or 'nothing'}.",
            "Keep the spots' x and y (px of the full-resolution image) in obsm['spatial'].",
        )
    node = data.root["obsm/spatial"]
    values: Any = xy_of(read_frame(node)) if "column-order" in node.attrs else read_array(node)
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    if values.ndim != 2 or values.shape[1] < 2 or len(values) != data.size("obs"):
        raise utils.StageError(
            f"{data.path}: obsm['spatial'] is {values.shape}; expected x and y of "
            f"{data.size('obs')} spots.",
            "Mend it, then run the same command.",
        )
    numbers = pd.DataFrame(values[:, :2]).apply(pd.to_numeric, errors="coerce")
    xy = numbers.to_numpy(float)
    refuse_far(data, np.arange(len(xy)), xy)
    return xy


def refuse_far(data: Annotated, rows: np.ndarray, xy: np.ndarray) -> None:
    """Raise StageError if rows (N,) of AnnData have places (N, 2) that no image reaches."""
    far = (np.abs(xy) > MAX_PLACE_PX).any(axis=1)
    if far.any():
        bad = np.array(data.ids, object)[rows[far]]
        raise utils.StageError(
            f"{data.path} puts {len(bad)} of {len(xy)} spots beyond any image, such as {bad[0]} "
            f"at x, y {xy[far][0].tolist()}; expected px of the full-resolution image, at most "
            f"{MAX_PLACE_PX:g}.",
            "Mend the places of the spots (obsm['spatial']), then run the same command.",
        )


def xy_of(table: pd.DataFrame) -> pd.DataFrame:
    """x and y of a table of places: by their names, else its first two columns."""
    low = {str(name).lower(): name for name in table}
    named = [next((low[n] for n in names if n in low), None) for names in (X_NAMES, Y_NAMES)]
    return table if None in named else table[named]


def numbers_of(data: Annotated, column: pd.Series) -> np.ndarray:
    """A column of obs as numbers; NaN where it has no value."""
    values = pd.to_numeric(column.where(column != "", np.nan), errors="coerce").to_numpy(float)
    bad = np.isnan(values) & (column != "").to_numpy()
    if bad.any():
        raise utils.StageError(
            f"{data.path}: obs[{column.name!r}] holds {column[bad].iloc[0]!r}; expected numbers.",
            "Mend it or drop the column, then run the same command.",
        )
    return values


# -------------------------------------------------------------------------------------------------
# one section of several
# -------------------------------------------------------------------------------------------------
@dataclass
class Spots:
    """What tells whether spots are of one section."""

    ids: np.ndarray  # (N,)
    xy: np.ndarray  # (N, 2)
    array: np.ndarray | None  # (N, 2) array_row, array_col; NaN where unknown

    def part(self, chosen: np.ndarray) -> Spots:
        array = None if self.array is None else self.array[chosen]
        return Spots(self.ids[chosen], self.xy[chosen], array)

    def several(self) -> str:
        """Why they cannot be of one section; "" if nothing speaks against it."""
        return self.repeated() or ("" if self.on_one_array else self.crowded())

    def repeated(self) -> str:
        """What no two spots of a section share."""
        if repeated := utils.duplicates(self.ids):
            return f"{len(repeated)} spots have the id of another ({utils.some(repeated)})"
        for places, what in ((self.array, " and ".join(ARRAY)), (self.xy, "x and y")):
            if places is None:
                continue
            known = places[np.isfinite(places).all(axis=1)]
            if same := len(known) - len(np.unique(known, axis=0)):
                return f"{same} spots have the {what} of another"
        return ""

    def crowded(self) -> str:
        """What the distances say; a few spots far from one another may have such, too."""
        xy = self.xy[np.isfinite(self.xy).all(axis=1)]
        if len(xy) < FEW:
            return ""
        nearest, _, _, fourth = cKDTree(xy).query(xy, k=[2, 3, 4, 5])[0].T
        near = float((nearest < NEAR * np.median(nearest)).mean())
        if near > MAX_NEAR:
            return f"{near:.0%} of the spots lie nearer to another one than spots of one lattice do"
        if np.median(nearest / fourth) < UNEVEN:
            return "the spots lie on no lattice, but as those of several lattices on one another do"
        return ""

    @property
    def on_one_array(self) -> bool:
        """True if array_row and array_col are known and all spots lie on the array they say."""
        if self.array is None:
            return False
        if not (np.isfinite(self.array).all() and np.isfinite(self.xy).all()):
            return False
        um = self.array[:, ::-1] * (tenx.COLUMN_UM, tenx.ROW_UM)
        try:
            fitted = lattice.fit_array(um, self.xy, Path("obs"))
        except utils.StageError:  # all on one line
            return False
        return fitted.residual_um <= tenx.MAX_RESIDUAL_UM


def choose_library(
    data: Annotated, library: str | None, xy: np.ndarray
) -> tuple[np.ndarray, str | None, list[str]]:
    """Rows of one section, its name in uns["spatial"], and notes; xy (N, 2) of all spots.

    Without ``library`` there must be one section only: by uns["spatial"], by the columns of obs
    that usually name one, and by the spots themselves.
    """
    known = keys_of(data.root, "uns/spatial")
    rows, notes = np.arange(len(data.ids)), list[str]()
    spots = Spots(np.array(data.ids, object), xy, array_of(data))
    candidates = naming_columns(data)
    if library not in (None, ALL):
        rows, notes = rows_of(data, str(library), candidates, known)
    elif library is None and len(known) > 1:
        ask(data, f"holds the sections {utils.some(known)} in uns['spatial']", candidates, spots)
    own = next((n for n in (library, str(library).partition("=")[2]) if n in known), None)
    if len(known) == 1 and len(rows) == len(data.ids):
        own = known[0]
    part = spots.part(rows)
    if why := part.several():
        if library is None or (library != ALL and part.repeated()):
            ask(data, f"seems to hold several sections: {why}", candidates.iloc[rows], part)
        notes.append(f"by --library {library} these spots are taken for one section, but {why}")
    elif library is None and not part.on_one_array:
        usual = candidates[[name for name in candidates if name in LIBRARIES]]
        if usual.shape[1]:
            ask(data, "may hold several sections", usual, part)
    return rows, own, notes


def array_of(data: Annotated) -> np.ndarray | None:
    """array_row and array_col (N, 2) of all spots, NaN where unknown; None without the columns."""
    found = data.columns("obs", ARRAY)
    if not set(ARRAY) <= set(found):
        return None
    return np.column_stack([numbers_of(data, found[name]) for name in ARRAY])


def naming_columns(data: Annotated) -> pd.DataFrame:
    """Columns of obs that may name sections: text with a few values, the usual names first."""
    names = [*LIBRARIES, *(n for n in data.text_columns() if n not in (*LIBRARIES, "in_tissue"))]
    table = data.columns("obs", tuple(names))
    return table[[name for name in table if 1 < len(values_of(table[name])) <= MAX_SHOWN]]


def values_of(column: pd.Series) -> list[str]:
    """Different values of a column, those of spots without a value left out."""
    return sorted(set(column) - {""})


def rows_of(
    data: Annotated, library: str, candidates: pd.DataFrame, known: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Rows of a section, given by name or as COLUMN=NAME, and notes."""
    column, _, name = library.partition("=")
    obs = data.columns("obs", (*LIBRARIES, *candidates.columns, column))
    obs = obs.loc[:, ~obs.columns.duplicated()]
    if name and column in obs:
        chosen = {column: (obs[column] == name).to_numpy()}
    else:
        chosen = {str(c): (obs[c] == library).to_numpy() for c in obs}
    chosen = {c: rows for c, rows in chosen.items() if rows.any()}
    if len({rows.tobytes() for rows in chosen.values()}) > 1:
        raise utils.StageError(
            f"{data.path} has {library!r} in the columns {', '.join(chosen)} of obs, for other "
            f"spots in each.",
            f"Name the column, too: --library {next(iter(chosen))}={library}",
        )
    if chosen:
        first, rows = next(iter(chosen.items()))
        empty = int((obs[first] == "").sum())
        notes = [f"{empty} spots without a value in obs[{first!r}] are left out"] if empty else []
        return np.flatnonzero(rows), notes
    if known == [library]:
        return np.arange(len(data.ids)), []
    if library in known:
        raise utils.StageError(
            f"{data.path} has the section {library!r} in uns['spatial'], but no column of obs says "
            f"which spots are of it.",
            "Write the sections' names into obs['library_id'], then run the same command.",
        )
    raise utils.StageError(
        f"{data.path} has no section {library!r}, but "
        f"{shown({str(c): values_of(obs[c]) for c in obs}) or utils.some(known) or 'one'}.",
        "Give one of them by --library NAME.",
    )


def shown(columns: dict[str, list[str]]) -> str:
    """Names of sections and the columns that hold them: those usual for it, if there are any."""
    usual = {column: names for column, names in columns.items() if column in LIBRARIES}
    listed = {column: names for column, names in (usual or columns).items() if names}
    return "; ".join(f"{utils.some(names)} (obs[{c!r}])" for c, names in listed.items())


def ask(data: Annotated, problem: str, candidates: pd.DataFrame, spots: Spots) -> None:
    """Stop, and list the sections by the columns of obs that tell them apart."""
    telling = {}
    for column in map(str, candidates):
        values = candidates[column].to_numpy()
        parts = [spots.part(values == name) for name in values_of(candidates[column])]
        if parts and not any(part.several() for part in parts):
            telling[column] = values_of(candidates[column])
    if not telling:
        raise utils.StageError(
            f"{data.path} {problem}. No column of obs tells them apart.",
            "Give the object of one section, or write the sections' names into obs['library_id'] "
            "and choose one by --library NAME."
            + ("" if utils.duplicates(spots.ids) else f" --library {ALL} takes all spots."),
        )
    raise utils.StageError(
        f"{data.path} {problem}. Sections may be {shown(telling)}.",
        f"Choose one: run the same command with --library NAME; --library {ALL} if all of them lie "
        f"on the one image.",
    )


# -------------------------------------------------------------------------------------------------
# the spots
# -------------------------------------------------------------------------------------------------
def spots_of(data: Annotated, rows: np.ndarray, xy: np.ndarray, layer: str | None) -> SourceSpots:
    """Spots from rows (N,) of AnnData and their places (N, 2), x and y."""
    if not np.isfinite(xy).all():
        bad = np.array(data.ids, object)[rows[~np.isfinite(xy).all(axis=1)]]
        raise utils.StageError(
            f"{data.path} holds what is no number as x or y of {len(bad)} spots: "
            f"{utils.some(bad)}.",
            "Mend obsm['spatial'], then run the same command.",
        )
    refuse_far(data, rows, xy)
    matrix, var, notes = find_counts(data, layer, rows)
    genes, columns, left_out = gene_names(data, var)
    obs = data.columns("obs", ("in_tissue", *ARRAY)).iloc[rows]
    ids = obs.index.tolist()
    places = pd.DataFrame(xy, index=ids, columns=["x", "y"])
    if set(ARRAY) <= set(obs):
        for name in ARRAY:
            places[name] = numbers_of(data, obs[name])
    in_tissue, unknown = tissue_of(data, obs)
    return SourceSpots(
        matrix[:, columns], ids, genes, places, in_tissue, [*notes, *left_out, *unknown]
    )


def tissue_of(data: Annotated, obs: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Which spots (N,) are in tissue, by in_tissue if it is there, and notes."""
    if "in_tissue" not in obs:
        return np.ones(len(obs), bool), []
    values = obs["in_tissue"].str.strip()
    flags = values.map(lambda text: FLAGS.get(text.casefold(), text))
    numbers = pd.to_numeric(flags, errors="coerce").to_numpy(float)
    if strange := values_of(values[~np.isin(numbers, (0, 1))]):
        raise utils.StageError(
            f"{data.path}: obs['in_tissue'] holds {utils.some(strange)}; expected 1 and 0, or True "
            f"and False.",
            "Mend it or drop the column, then run the same command.",
        )
    unknown = int((values == "").sum())
    notes = [f"{unknown} spots without a value in in_tissue are left out"] if unknown else []
    return numbers == 1, notes
