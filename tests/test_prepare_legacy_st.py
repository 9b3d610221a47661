"""prepare/legacy_st.py: the her2st section rebuilt from its raw tables, and tables with traps."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REAL_DATA
from PIL import Image

from prepare import legacy_st
from writing import disk

GENES = ["ACTB", "MARCH1", "NA", "ERBB2"]
PIXEL_UM = 2.0  # so that the array of 200 um has 100 px
RAW = REAL_DATA / "formats" / "legacy_st_her2"
needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real data")


def write_tables(folder, degrees: float = 2.0, jitter_um: float = 8.0, seed: int = 0):
    """C1.tsv, C1_selection.tsv, C1_labels.tsv and C1.png of 6 x 7 spots, places known."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    column, row = (a.ravel() for a in np.meshgrid(np.arange(4, 11), np.arange(9, 15)))
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    place = np.column_stack([column, row])
    off = rng.normal(0, jitter_um / 200, place.shape)
    xy = (place + off - place.mean(0)) @ turn * 200 / PIXEL_UM + (420, 370)
    spots = pd.DataFrame(
        {
            "x": column, "y": row, "new_x": (place + off)[:, 0], "new_y": (place + off)[:, 1],
            "pixel_x": xy[:, 0].round(2), "pixel_y": xy[:, 1].round(2), "selected": 1,
        }
    ).round({"new_x": 3, "new_y": 3}).sample(frac=1, random_state=1)  # fmt: skip
    spots.loc[[0, 3], "selected"] = 0
    spots.to_csv(folder / "C1_selection.tsv", sep="\t", index=False)
    counts = pd.DataFrame(
        rng.poisson(4, (len(place), len(GENES))),
        index=[f"{x}x{y}" for x, y in place], columns=GENES,
    ).sample(frac=1, random_state=2)  # fmt: skip
    counts.to_csv(folder / "C1.tsv", sep="\t")
    labels = spots[["new_x", "new_y"]].set_axis(["x", "y"], axis=1).round(2)
    labels["label"] = np.where(spots["x"] < 7, "invasive cancer", "adipose tissue")
    labels.insert(0, "Row.names", "1002x1762")
    labels.sample(frac=1, random_state=3).to_csv(folder / "C1_labels.tsv", sep="\t", index=False)
    shade = rng.integers(150, 250, (74, 84, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(shade).save(folder / "C1.png", compress_level=1)
    return spots, counts


@pytest.fixture
def tables(tmp_path):
    folder = tmp_path / "her2 st"
    write_tables(folder)
    return folder


def prepare(folder, target, *options, counts="C1.tsv") -> int:
    return legacy_st.run(
        [
            "--counts", str(folder / counts), "--spots", str(folder / "C1_selection.tsv"),
            "--image", str(folder / "C1.png"), "--directory", str(target), *options,
        ]
    )  # fmt: skip


def read(path):
    return pd.read_csv(path, index_col=0, keep_default_na=False)


# --------------------------------------------------------------------------------- real tables
@needs_data
def test_c2_rebuilt_from_its_raw_tables_is_the_section_of_the_data_folder(tmp_path):
    known = REAL_DATA / "dev_her2st_C2"
    code = legacy_st.run(
        [
            "--counts", str(RAW / "C2.tsv.gz"), "--spots", str(RAW / "C2_selection.tsv"),
            "--image", str(known / "he-raw.jpg"), "--directory", str(tmp_path / "s"),
        ]
    )  # fmt: skip
    assert code == 0
    target = tmp_path / "s"
    with gzip.open(target / "cnts.csv.gz") as a, gzip.open(known / "cnts.csv.gz") as b:
        assert a.read() == b.read()
    found, locs = read(target / "locs-raw.csv"), read(known / "locs-raw.csv")
    assert found.index.tolist() == locs.index.tolist()
    np.testing.assert_allclose(found, locs, atol=1e-3)
    assert (target / "he-raw.jpg").read_bytes() == (known / "he-raw.jpg").read_bytes()
    for name, digits in (("pixel-size-raw.txt", 2), ("radius-raw.txt", 0)):
        value, expected = (float((f / name).read_text()) for f in (target, known))
        assert value == pytest.approx(expected, rel=2e-3), name
        assert digits < 2 or round(value, digits) == round(expected, digits)


@needs_data
def test_labels_of_a1_are_carried_over(tmp_path):
    spots = legacy_st.read_selection(RAW / "A1_selection.tsv")
    counts = legacy_st.read_count_table(RAW / "A1.tsv.gz")
    labels, notes = legacy_st.join_labels(RAW / "A1_labeled_coordinates.tsv", spots)
    table = pd.read_csv(RAW / "A1_labeled_coordinates.tsv", sep="\t")
    assert labels["label"].value_counts().to_dict() == table["label"].value_counts().to_dict()
    assert len(labels) == len(spots) == 348
    assert notes == ["348 of 348 spots have a label"]
    assert set(counts.index) <= set(labels.index)
    near = spots.loc[labels.index[0]]
    row = table[
        (table["x"] - near["new_x"]).abs().lt(1e-3) & (table["y"] - near["new_y"]).abs().lt(1e-3)
    ]
    assert row["label"].tolist() == [labels["label"].iloc[0]]
    fitted, _ = legacy_st.fit_square_array(spots, RAW / "A1_selection.tsv")
    assert fitted.pixel_size_um == pytest.approx(200 / 218.36, rel=0.005)


# ------------------------------------------------------------------------------ written tables
@pytest.mark.parametrize("degrees", [0.0, 3.0, 90.0, 181.0])
def test_a_section_is_joined_by_place_on_the_array(tmp_path, degrees):
    spots, counts = write_tables(tmp_path / "a", degrees)
    assert prepare(tmp_path / "a", tmp_path / "s") == 0
    selected = spots[spots["selected"] == 1]
    locs = read(tmp_path / "s" / "locs-raw.csv")
    found = read(tmp_path / "s" / "cnts.csv.gz")
    ids = {f"{x}x{y}" for x, y in zip(selected["x"], selected["y"], strict=True)}
    assert set(locs.index) == ids
    assert found.index.tolist() == locs.index.tolist()
    pd.testing.assert_frame_equal(found, counts.loc[found.index], check_dtype=False)
    for spot, (x, y) in locs.iterrows():
        at = selected[(selected["x"].astype(str) + "x" + selected["y"].astype(str)) == spot]
        assert (x, y) == pytest.approx(at[["pixel_x", "pixel_y"]].to_numpy()[0], abs=1e-3)
    size = float((tmp_path / "s" / "pixel-size-raw.txt").read_text())
    assert size == pytest.approx(PIXEL_UM, rel=0.02)
    radius = float((tmp_path / "s" / "radius-raw.txt").read_text())
    assert radius * size == pytest.approx(50, rel=1e-4)
    record = json.loads((tmp_path / "s" / "prepare.json").read_text())
    assert record["spots"] == 40
    assert record["spots_off_tissue"] == 2


def test_pixel_x_and_y_exchanged_are_noted(tables, tmp_path):
    path = tables / "C1_selection.tsv"
    table = pd.read_csv(path, sep="\t")
    exchanged = table.rename(columns={"pixel_x": "pixel_y", "pixel_y": "pixel_x"})
    exchanged.to_csv(path, sep="\t", index=False)
    Image.new("RGB", (840, 840), "pink").save(tables / "C1.png")  # a square: all spots fall on it
    assert prepare(tables, tmp_path / "s") == 0
    notes = json.loads((tmp_path / "s" / "prepare.json").read_text())["notes"]
    assert sum("x and y of the positions are exchanged" in note for note in notes) == 1


def test_labels_are_joined_by_the_adjusted_coordinates(tables, tmp_path):
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 0
    labels = read(tmp_path / "s" / "labels.csv")
    assert labels.index.tolist() == read(tmp_path / "s" / "locs-raw.csv").index.tolist()
    record = json.loads((tmp_path / "s" / "prepare.json").read_text())
    assert disk.fingerprint(tmp_path / "s" / "labels.csv") == record["outputs"]["labels.csv"]
    assert "labels.csv holds 40 of the 40 spots" in record["notes"]
    for spot, label in labels["label"].items():
        assert label == ("invasive cancer" if int(spot.split("x")[0]) < 7 else "adipose tissue")
    old = (tmp_path / "s" / "labels.csv").read_bytes()
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 0
    assert (tmp_path / "s" / "labels.csv").read_bytes() == old
    (tmp_path / "s" / "labels.csv").write_text("edited")
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 0
    assert (tmp_path / "s" / "labels.csv").read_text() == "edited"
    options = ("--labels", str(tables / "C1_labels.tsv"), "--force")
    assert prepare(tables, tmp_path / "s", *options) == 0
    assert (tmp_path / "s" / "labels.csv").read_bytes() == old
    assert prepare(tables, tmp_path / "s") == 0  # without labels, those of before are outdated
    assert not (tmp_path / "s" / "labels.csv").exists()


def test_what_no_spot_or_no_count_fits_is_left_out_and_counted(tables, tmp_path):
    edit("C1_labels.tsv", lambda t: t.assign(x=t["x"].where(t.index > 2, 99)))(tables)
    edit("C1.tsv", lambda t: t[t.iloc[:, 0] != "5x10"])(tables)
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 0
    notes = json.loads((tmp_path / "s" / "prepare.json").read_text())["notes"]
    assert "3 labels fit no spot and are left out" in notes
    assert "1 selected spots without counts are left out" in notes
    locs = read(tmp_path / "s" / "locs-raw.csv").index
    assert len(locs) == 39
    assert "5x10" not in locs
    assert set(read(tmp_path / "s" / "labels.csv").index) <= set(locs)


def test_a_table_that_is_cut_off_is_to_be_copied_again(tables, tmp_path, capsys):
    packed = gzip.compress((tables / "C1.tsv").read_bytes())
    (tables / "C1.tsv.gz").write_bytes(packed[: len(packed) // 2])
    assert prepare(tables, tmp_path / "s", counts="C1.tsv.gz") == 2
    message = capsys.readouterr().err
    assert "C1.tsv.gz is no whole table" in message
    assert "Copy or download it again" in message


def test_labels_of_others_are_not_overwritten(tables, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "labels.csv").write_text("mine")
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 2
    assert "labels.csv was not written by prepare/legacy_st.py" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["labels.csv"]


def test_gzip_r_headers_and_tables_without_selection_are_read(tables, tmp_path):
    text = (tables / "C1.tsv").read_text()
    (tables / "C1.tsv.gz").write_bytes(gzip.compress(text.lstrip("\t").encode()))  # write.table
    spots = pd.read_csv(tables / "C1_selection.tsv", sep="\t")
    spots.drop(columns=["selected", "new_x", "new_y"]).to_csv(
        tables / "C1_selection.tsv", sep="\t", index=False
    )
    assert prepare(tables, tmp_path / "s", counts="C1.tsv.gz") == 0
    assert len(read(tmp_path / "s" / "locs-raw.csv")) == 42
    assert read(tmp_path / "s" / "cnts.csv.gz").columns.tolist() == GENES


def test_a_given_pixel_size_is_checked_against_the_pitch(tables, tmp_path, capsys):
    assert prepare(tables, tmp_path / "s", "--pixel-size", "2.05") == 0
    assert float((tmp_path / "s" / "pixel-size-raw.txt").read_text()) == 2.05
    assert prepare(tables, tmp_path / "t", "--pixel-size", "1.0") == 2
    message = capsys.readouterr().err
    assert "expected 200 um" in message
    assert not (tmp_path / "t").exists()


def test_metadata_must_agree_with_the_array(tables, tmp_path, capsys):
    with Image.open(tables / "C1.png") as image:
        metadata = {"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}
        tifffile.imwrite(tables / "C1.ome.tif", np.asarray(image), metadata=metadata)
    options = ("--image", str(tables / "C1.ome.tif"))  # the last one counts
    assert prepare(tables, tmp_path / "s", *options) == 2
    message = capsys.readouterr().err
    assert "has 1 um per pixel, but by the spots it has" in message
    assert not (tmp_path / "s").exists()
    assert prepare(tables, tmp_path / "s", *options, "--pixel-size", "2.0") == 0


@pytest.mark.parametrize(
    ("sep", "encoding", "end"),
    [
        (";", "utf-8-sig", "\r\n"),
        (",", "utf-16", "\n"),
        ("\t", "utf-16", "\r\n"),
        (";", "utf-8", "\r"),
    ],
)
def test_tables_are_read_as_spreadsheets_save_them(tables, tmp_path, sep, encoding, end):
    """Separators, encodings and line ends are those that the five scripts read, too."""
    options = ("--labels", str(tables / "C1_labels.tsv"))
    assert prepare(tables, tmp_path / "as written", *options) == 0
    for name in ("C1.tsv", "C1_selection.tsv", "C1_labels.tsv"):
        table = pd.read_csv(tables / name, sep="\t", dtype=str, keep_default_na=False)
        text = table.to_csv(sep=sep, index=False, lineterminator=end)
        (tables / name).write_bytes(text.encode(encoding))
    assert prepare(tables, tmp_path / "saved", *options) == 0
    for name in ("locs-raw.csv", "cnts.csv.gz", "labels.csv", "pixel-size-raw.txt"):
        known = (tmp_path / "as written" / name).read_bytes()
        assert (tmp_path / "saved" / name).read_bytes() == known


@pytest.mark.parametrize("words", [("TRUE", "FALSE"), ("True", "no"), (" yes", "F"), ("1.0", "0")])
def test_selected_may_be_written_in_words(tables, tmp_path, words):
    path = tables / "C1_selection.tsv"
    table = pd.read_csv(path, sep="\t", dtype=str)
    table["selected"] = table["selected"].map(dict(zip("10", words, strict=True)))
    table.to_csv(path, sep="\t", index=False)
    assert prepare(tables, tmp_path / "s") == 0
    assert len(read(tmp_path / "s" / "locs-raw.csv")) == 40


def test_repeated_genes_are_noted(tables, tmp_path):
    text = (tables / "C1.tsv").read_text()
    (tables / "C1.tsv").write_text(text.replace("MARCH1", "ACTB", 1))
    assert prepare(tables, tmp_path / "s") == 0
    assert read(tmp_path / "s" / "cnts.csv.gz").columns.tolist() == ["ACTB", "ACTB.1", *GENES[2:]]
    record = json.loads((tmp_path / "s" / "prepare.json").read_text())
    assert any("gene names occur more than once (ACTB)" in note for note in record["notes"])


def edit(name, change, sep="\t"):
    def spoil(folder):
        table = pd.read_csv(folder / name, sep="\t", keep_default_na=False)
        change(table).to_csv(folder / name, sep=sep, index=False)

    return spoil


def blank(column, cell=""):
    def change(table):
        table[column] = [cell, *table[column].astype(str)[1:]]
        return table

    return change


def swap_axes(table):
    """x and y of some spots exchanged: no square array any more."""
    half = table.index[::2]
    table.loc[half, ["pixel_x", "pixel_y"]] = table.loc[half, ["pixel_y", "pixel_x"]].to_numpy()
    return table


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "C1.tsv").unlink(), "C1.tsv"),
        (edit("C1.tsv", lambda t: t[:20]), "they are of two sections"),
        (lambda f: (f / "C1.tsv").write_text("a\n1\n"), "one column only"),
        (edit("C1.tsv", lambda t: t.replace({"ACTB": {t["ACTB"][0]: 0.5}})), "fractions"),
        (edit("C1.tsv", lambda t: t.assign(ACTB="x")), "holds 'x' for spot"),
        (edit("C1.tsv", lambda t: t.assign(ACTB=-1)), "negative"),
        (edit("C1.tsv", lambda t: pd.concat([t, t[:1]])), "more than once"),
        (edit("C1.tsv", lambda t: t.assign(**{t.columns[0]: "s" + t.iloc[:, 0]})), "in common"),
        (edit("C1_selection.tsv", lambda t: t.drop(columns="pixel_x")), "pixel_x is missing"),
        (edit("C1_selection.tsv", lambda t: t.assign(x=t["x"] + 0.5)), "fractions in x or y"),
        (edit("C1_selection.tsv", lambda t: pd.concat([t, t[:1]])), "more than once"),
        *[
            (edit("C1_selection.tsv", blank(name)), f"holds '' in column {name}, data row 1")
            for name in ("x", "pixel_x", "new_y", "selected")
        ],
        (edit("C1_selection.tsv", blank("pixel_y", "1,5")), "with a decimal point"),
        (edit("C1_selection.tsv", blank("selected", "maybe")), "expected 1 or 0, TRUE or FALSE"),
        (lambda f: (f / "C1.tsv").write_bytes(b"PK\x03\x04"), "an Excel workbook"),
        (edit("C1_selection.tsv", swap_axes), "square array"),
        (edit("C1_selection.tsv", lambda t: t[:0]), "C1_selection.tsv is empty: it has no row"),
        (edit("C1_selection.tsv", lambda t: t.assign(pixel_x=t["pixel_x"] * 1.3)), "square array"),
        (
            edit(
                "C1_selection.tsv", lambda t: t.assign(pixel_x=t.pixel_x * 5, pixel_y=t.pixel_y * 5)
            ),
            "fall on the image",
        ),
        (lambda f: (f / "C1.png").unlink(), "C1.png"),
        (lambda f: (f / "C1.png").write_bytes(b"no picture"), "C1.png"),
    ],
)
def test_bad_tables_are_named_and_nothing_is_written(tables, tmp_path, capsys, spoil, words):
    spoil(tables)
    assert prepare(tables, tmp_path / "s") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert "ownload" not in message or words == "C1.png"
    assert not (tmp_path / "s").exists() or not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit("C1_labels.tsv", lambda t: t.assign(x=t["x"] + 0.4)), "another section's"),
        (edit("C1_labels.tsv", lambda t: pd.concat([t, t[:1]])), "more than once"),
        (edit("C1_labels.tsv", lambda t: t.drop(columns="label")), "label is missing"),
    ],
)
def test_bad_labels_are_named(tables, tmp_path, capsys, spoil, words):
    spoil(tables)
    assert prepare(tables, tmp_path / "s", "--labels", str(tables / "C1_labels.tsv")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_part_of_the_image_is_cut_to_the_spots(tables, tmp_path):
    assert prepare(tables, tmp_path / "s", "--crop-um", "120") == 0
    whole = pd.read_csv(tables / "C1_selection.tsv", sep="\t").query("selected == 1")
    locs = read(tmp_path / "s" / "locs-raw.csv")
    left = np.floor(whole["pixel_x"].min() - 60)
    assert locs["x"].min() == pytest.approx(whole["pixel_x"].min() - left, abs=1.01)
