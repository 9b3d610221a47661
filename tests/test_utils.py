"""utils.py: fingerprints, atomic writes, checked reads and the record."""

import argparse
import codecs
import contextlib
import gzip
import io
import json
import os
import pickle
import pickletools
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_section
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import utils
from method import devices
from reading import arrays, images, pickles, plain, tables

ONE_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def stage(tmp_path) -> utils.Stage:
    """A run of a stage in an empty folder."""
    directory = tmp_path / "sample"
    directory.mkdir()
    return make_stage(directory)


def make_stage(directory: Path, script: str = "a_test.py", **arguments) -> utils.Stage:
    known = {"directory": directory, "force": False, "allow_stale": False, **arguments}
    return utils.Stage(script, argparse.Namespace(**known))


def put(stage: utils.Stage, name: str, content: str | bytes) -> Path:
    path = stage.directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def outcome(read, *args):
    """What ``read`` returns and None, or None and the message of its StageError."""
    try:
        return read(*args), None
    except utils.StageError as error:
        return None, str(error)


# ----- the contract -------------------------------------------------------------------------------
def test_every_file_has_one_owner():
    names = [name for artifact in utils.CONTRACT for name in artifact.names]
    assert len(names) == len({name.lower() for name in names}) == len(utils.MADE_BY)
    artifacts = [value for value in vars(utils).values() if isinstance(value, utils.Artifact)]
    assert set(artifacts) == set(utils.CONTRACT)
    scripts = {artifact.made_by for artifact in utils.CONTRACT} - {None}
    root = Path(utils.__file__).parent
    assert all((root / script).is_file() for script in scripts)
    assert not {utils.record_name(script) for script in scripts} & set(names)


def test_geometry():
    assert utils.TOKENS_PER_TILE * utils.TOKEN_PX == utils.TILE_PX
    assert utils.SUPERPIXEL_UM == 8.0


# ----- fingerprints and atomic writes -------------------------------------------------------------
def test_fingerprint_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 123_456_789))
    assert utils.fingerprint(path) == {
        "bytes": 3,
        "mtime_ns": 123_456_789,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2
    }


def test_a_file_is_hashed_only_if_its_time_differs(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    known = utils.fingerprint(path)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "sha256", lambda _: pytest.fail("hashed"))
        assert utils.same_as(path, known)
        path.write_bytes(b"abcd")
        assert not utils.same_as(path, known)
        assert not utils.same_as(tmp_path / "absent", known)
    path.write_bytes(b"abc")
    os.utime(path, (9, 9))
    assert utils.same_as(path, known)
    path.write_bytes(b"abd")
    os.utime(path, (9, 9))
    assert not utils.same_as(path, known)


def test_fingerprint_of_a_folder_sees_names_and_contents(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return utils.fingerprint(tmp_path / name)["sha256"]

    first = folder("1", {"a": "x", "b/c": "y"})
    assert first == folder("2", {"b/c": "y", "a": "x"})
    others = [
        folder("3", {"a": "y", "b/c": "x"}),
        folder("4", {"a": "x", "c": "y"}),
        folder("5", {"a": "x", "b/c": "z"}),
        folder("6", {"a": "x", "b/c": "y", "d": ""}),
    ]
    assert len({first, *others}) == 5
    assert utils.fingerprint(tmp_path / "1")["bytes"] == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic(tmp_path, kind):
    path = tmp_path / "maps.npy"

    def write(target: Path, content: str) -> None:
        if kind == "folder":
            target.mkdir()
            target = target / "inside"
        target.write_text(content)

    def content() -> str:
        return (path / "inside" if kind == "folder" else path).read_text()

    for text in ("new", "newer"):
        with utils.atomic(path) as partial:
            assert partial.parent == path.parent
            assert partial.suffix == ".npy"  # which image writers go by
            assert partial.name.startswith(".")
            write(partial, text)
            assert not path.exists() or content() == "new"
        assert content() == text
        assert names_in(tmp_path) == ["maps.npy"]
    with contextlib.suppress(KeyboardInterrupt), utils.atomic(path) as partial:
        write(partial, "half")
        raise KeyboardInterrupt
    assert content() == "newer"
    assert names_in(tmp_path) == ["maps.npy"]


def test_a_folder_that_cannot_be_put_in_place_comes_back(tmp_path, monkeypatch):
    path, honest = tmp_path / "maps", Path.rename

    def rename(source, target):
        if target == path and (source / "new").exists():
            raise OSError(5, "input/output error")
        return honest(source, target)

    path.mkdir()
    (path / "old").write_text("old")
    monkeypatch.setattr(Path, "rename", rename)
    with contextlib.suppress(OSError), utils.atomic(path) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert names_in(tmp_path) == ["maps"]
    assert (path / "old").read_text() == "old"


def test_a_partial_file_of_another_run_may_vanish(tmp_path, monkeypatch):
    """The other run gives it its name between the listing and the look at its age."""
    (tmp_path / ".he.0123abcd.partial.jpg").write_bytes(b"half")
    honest = Path.glob

    def glob(self, pattern):
        found = list(honest(self, pattern))
        for path in found:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob)
    make_stage(tmp_path)


def test_partial_names_differ(tmp_path):
    names = {utils.partial_name(tmp_path / "he.jpg").name for _ in range(100)}
    assert len(names) == 100


def test_check_disk(tmp_path):
    utils.check_disk(tmp_path, 1, "A byte")
    with pytest.raises(utils.StageError, match="A lake") as error:
        utils.check_disk(tmp_path, 10**18, "A lake")
    assert "1000000000.00 GB" in str(error.value)


# ----- the record ---------------------------------------------------------------------------------
def test_nothing_gets_its_name_before_finish(stage):
    with stage.writing(utils.LOCS) as partial:
        partial.write_text("x")
    assert not (stage.directory / "locs.csv").exists()
    stage.discard()
    assert names_in(stage.directory) == []


def test_the_record_redacts_the_token(tmp_path):
    for login in ("hf_secret", None):
        stage = make_stage(tmp_path, login=login, device="cpu")
        with stage.writing(utils.LOCS) as partial:
            partial.write_text("x")
        stage.finish(spots=3)
        text = (tmp_path / "a_test.json").read_text()
        assert "hf_secret" not in text
        record = json.loads(text)
        assert record["arguments"]["device"] == "cpu"
        assert record["arguments"].get("login") in ("***", None)
        assert record["spots"] == 3
        assert record["outputs"] == {"locs.csv": utils.fingerprint(tmp_path / "locs.csv")}


def test_the_record_is_unfinished_while_outputs_move(stage, monkeypatch):
    seen, honest = [], utils._put

    def put_and_look(partial, path):
        record = stage.directory / "a_test.json"
        if path != record:
            seen.append(json.loads(record.read_text())["finished"])
        honest(partial, path)

    monkeypatch.setattr(utils, "_put", put_and_look)
    for artifact in (utils.LOCS, utils.RADIUS):
        with stage.writing(artifact) as partial:
            partial.write_text("x")
    stage.finish()
    assert seen == [False, False]
    assert json.loads((stage.directory / "a_test.json").read_text())["finished"] is True


@pytest.mark.parametrize(
    ("given_name", "wanted"),
    [
        ("a", "a"), ("a/", "a"), ("a//", "a"), ("a\\", "a"), ("a/b\\", "a/b"), ("a b/", "a b"),
        ("/", "/"), (".", "."), ("./", "."), ("../", ".."), ("\u00e4/", "\u00e4"),
    ],
)  # fmt: skip
def test_sample_directory(given_name, wanted):
    assert utils.sample_directory(given_name) == Path(wanted)


def test_positive():
    assert utils.positive("3") == 3
    for text in ("0", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="1 or more"):
            utils.positive(text)
    with pytest.raises(ValueError, match="x"):
        utils.positive("x")


def test_resolve_device():
    assert devices.resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert devices.resolve_device("auto") == torch.device("cpu")
    for name in ("cuda:99", "abacus", ""):
        with pytest.raises(utils.StageError, match="--device cpu") as error:
            devices.resolve_device(name)
        assert f"--device {name} cannot be used" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda():
    with pytest.raises(utils.StageError, match="--device cuda cannot be used"):
        devices.resolve_device("cuda")


def test_a_device_that_computes_nonsense_is_not_used(monkeypatch):
    """is_available() can be true although the driver is broken."""
    monkeypatch.setattr(torch, "ones", torch.zeros)
    with pytest.raises(utils.StageError, match="--device cpu cannot be used"):
        devices.resolve_device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    assert devices.resolve_device("auto").type == devices.resolve_device("cuda").type == "cuda"


# ----- numbers and lists --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "number"),
    [("0.5", 0.5), (" 0.5 \r\n", 0.5), ("\ufeff0.5\n", 0.5), ("5e-1", 0.5), ("1", 1), (".5", 0.5)],
)
def test_read_number(stage, text, number):
    assert (
        plain.read_number(stage, put(stage, "pixel-size-raw.txt", text), 0.05, 2.5, "um") == number
    )


@given(st.text(max_size=12))
@ONE_FOLDER
def test_read_number_gives_a_number_in_range_or_refuses(stage, text):
    path = put(stage, "pixel-size-raw.txt", text.encode("utf-8", "surrogatepass"))
    value, message = outcome(plain.read_number, stage, path, 0.05, 2.5, "um")
    if message:
        assert "pixel-size-raw.txt" in message
    else:
        assert 0.05 <= value <= 2.5
        assert value == float(text.removeprefix("\ufeff"))


def test_read_gene_names(stage):
    path = put(stage, "gene-names.txt", "\ufeffMARCH1\r\n\r\n  NA \nnan\n\u03b2-Cat\n1")
    assert plain.read_gene_names(stage, path) == ["MARCH1", "NA", "nan", "\u03b2-Cat", "1"]


# ----- tables -------------------------------------------------------------------------------------
IDS = ["NA", "1", "001", "a,b", 'c"d', "sp 1", "\u00e4", "nan", "1e5", "-"]
GENES = ["ACTB", "NA", "MARCH1", "\u03b2-Cat", "true", "2", "A,B"]
COUNTS = pd.DataFrame(
    np.random.default_rng(0).poisson(4, (len(IDS), len(GENES))), index=IDS, columns=GENES
)


def with_all_quoted(frame: pd.DataFrame) -> str:
    return frame.to_csv(quoting=1)


def r_style(frame: pd.DataFrame) -> str:
    """As R's write.table writes it: the header has no cell for the ids."""
    header, rest = frame.to_csv(sep="\t").split("\n", 1)
    return header.removeprefix("\t") + "\n" + rest


VARIANTS = {
    "comma": lambda frame: frame.to_csv(),
    "tab": lambda frame: frame.to_csv(sep="\t"),
    "semicolon": lambda frame: frame.to_csv(sep=";"),
    "BOM": lambda frame: "\ufeff" + frame.to_csv(),
    "CRLF": lambda frame: frame.to_csv(lineterminator="\r\n"),
    "quoted": with_all_quoted,
    "R": r_style,
    "named ids": lambda frame: frame.to_csv(index_label="barcode"),
    "no last newline": lambda frame: frame.to_csv().rstrip("\n"),
    "decimals": lambda frame: frame.astype(float).to_csv(),
    "blank lines at the end": lambda frame: frame.to_csv() + "\n\n",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_read_counts(stage, variant, zipped):
    content = VARIANTS[variant](COUNTS).encode()
    path = (
        put(stage, "cnts.csv.gz", gzip.compress(content))
        if zipped
        else put(stage, "cnts.csv", content)
    )
    found = tables.read_counts(stage, path, pd.Index(IDS))
    assert list(found.index) == IDS
    assert list(found.columns) == GENES
    assert found.to_numpy().dtype == np.float32
    np.testing.assert_array_equal(found.to_numpy(), COUNTS.to_numpy())


@given(order=st.permutations(range(len(IDS))), n=st.integers(1, len(IDS)))
@ONE_FOLDER
def test_the_order_of_rows_does_not_matter(stage, order, n):
    """P4: counts come in the order of the locations, whatever the order of the table."""
    path = put(stage, "cnts.csv", COUNTS.iloc[order].to_csv())
    spots = pd.Index(IDS[:n])
    found = tables.read_counts(stage, path, spots)
    pd.testing.assert_frame_equal(found, COUNTS[:n].astype(np.float32), check_index_type=False)


def test_read_locs(stage):
    xy = pd.DataFrame({"in_tissue": 1, "y": range(10), "x": np.arange(10) / 3, "note": "a,b"}, IDS)
    for variant in ("comma", "tab", "semicolon", "BOM", "CRLF", "R", "quoted"):
        found = tables.read_locs(stage, put(stage, "locs-raw.csv", VARIANTS[variant](xy)))
        assert list(found.columns) == ["x", "y"]
        assert list(found.index) == IDS
        np.testing.assert_array_equal(found.to_numpy(), xy[["x", "y"]].to_numpy(float))


BAD_TABLES = {
    "longer row": "id,A,B\ns1,1,2\ns2,3,4,5\n",
    "shorter row": "id,A,B\ns1,1,2\ns2,3\n",
    "longer row, text": "id,A,B\ns1,1,2\ns2,3,4,x\n",
    "longer first row by two": "id,A,B\ns1,1,2,9,9\ns2,3,4\n",
    "no ids": "A,B\n1,2\n3,4\n",
    "decimal commas": "id;A;B\ns1;1,5;2\ns2;3;4\n",
    "thousands": 'id,A,B\ns1,"1,000",2\ns2,3,4\n',
    "hexadecimal": "id,A,B\ns1,0x10,2\ns2,3,4\n",
    "true": "id,A,B\ns1,True,2\ns2,3,4\n",
}


@pytest.mark.parametrize(
    "kind",
    BAD_TABLES,
)
def test_tables_that_are_refused(stage, kind):
    path = put(stage, "cnts.csv", BAD_TABLES[kind])
    with pytest.raises(utils.StageError, match=r"cnts\.csv"):
        tables.read_counts(stage, path, pd.Index(["s1", "s2"]))


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('id,xy\t;\n\r"1.-e \0\ufeff'), max_size=60).map(str.encode),
        st.text(st.sampled_from('id,xy\t;\n\r"1.-e '), max_size=40).map(
            lambda text: b"id,x,y\ns1,1,2\n" + text.encode()
        ),
    ),
    st.booleans(),
)
@settings(parent=ONE_FOLDER, max_examples=400)
def test_read_locs_reads_or_refuses(stage, content, zipped):
    """P6: whatever the bytes, the result is a table of finite places, or a StageError."""
    path = put(stage, "locs.csv", content)
    if zipped:
        path = put(stage, "cnts.csv.gz", gzip.compress(content))
    locs, message = outcome(tables.read_locs, stage, path)
    if message:
        assert path.name in message
    else:
        assert locs.shape[1] == 2
        assert len(locs) > 0
        assert np.isfinite(locs.to_numpy()).all()
        assert locs.index.is_unique


def test_a_damaged_gz_is_refused(stage):
    whole = gzip.compress(COUNTS.to_csv().encode(), mtime=0)
    for at in range(10, len(whole)):  # behind the header, whose bytes have little meaning
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path = put(stage, "cnts.csv.gz", bytes(damaged))
        with pytest.raises(utils.StageError, match=r"cnts\.csv\.gz"):
            tables.read_counts(stage, path, pd.Index(IDS))


def test_a_field_beyond_the_limit_of_csv_is_refused(stage):
    path = put(stage, "locs.csv", "id,x,y\n" + "s" * 200_000 + ",1,2\n")
    with pytest.raises(utils.StageError, match=r"locs\.csv"):
        tables.read_locs(stage, path)


# ----- arrays -------------------------------------------------------------------------------------
def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def read_rgb_array(stage):
    return arrays.read_array(stage, utils.RGB, np.uint8, (2, None, 3))


def test_read_array(stage):
    values = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    put(stage, "Histology_rgb.npy", npy(values))
    found = read_rgb_array(stage)
    np.testing.assert_array_equal(found, values)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable


def test_read_array_refuses_every_truncation(stage):
    whole = npy(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    for size in range(len(whole)):
        put(stage, "Histology_rgb.npy", whole[:size])
        with pytest.raises(
            utils.StageError, match=r"Histology_rgb\.npy.*(?s:.*)Histology_Extractor"
        ):
            read_rgb_array(stage)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda junk: b"\x93NUMPY\x01\x00" + junk),
        hnp.arrays(
            st.sampled_from([np.uint8, np.int8, np.float16, np.float64, np.dtype("U2"), bool]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
        ).map(npy),
        st.builds(
            lambda header: b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
            st.sampled_from(
                [
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, -4, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 10**99, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 99999999999999, 3)}\n",
                    b"{'descr': '|u1', 'fortran_order': 2, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (2, 4, 3)}\n",
                    b"{'descr': '|u1'}\n",
                ]
            ),
        ),
    )
)
@settings(parent=ONE_FOLDER, max_examples=400)
def test_read_array_reads_or_refuses(stage, content):
    """P6, for an array: the contract's shape and type, or a StageError."""
    put(stage, "Histology_rgb.npy", content)
    values, message = outcome(read_rgb_array, stage)
    if message:
        assert "Histology_rgb.npy" in message
    else:
        assert values.dtype == np.uint8
        assert values.ndim == 3
        assert values.shape[::2] == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"(" * 400 + b"\n", id="400 brackets"),
        pytest.param(b"{" * 9 + b"\n", id="9 braces"),
        pytest.param(b"-" * 9000 + b"1\n", id="9000 signs"),
        pytest.param(b"\n", id="nothing"),
    ],
)
def test_read_array_refuses_a_hostile_header(stage, header):
    put(
        stage,
        "Histology_rgb.npy",
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header,
    )
    with pytest.raises(utils.StageError, match=r"Histology_rgb\.npy"):
        read_rgb_array(stage)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_array_refuses_what_is_not_finite(stage, value):
    values = np.ones((3, 4), np.float32)
    values[2, 3] = value
    put(stage, "HRcnts.npy", npy(values))
    with pytest.raises(utils.StageError, match="not finite"):
        arrays.read_array(stage, utils.HR_CNTS, np.float32, (3, 4))
    found = arrays.read_array(stage, utils.HR_CNTS, np.float32, (3, 4), finite=False)
    np.testing.assert_array_equal(found, values)


@given(st.binary(max_size=120), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n"]))
@ONE_FOLDER
def test_image_rows_refuse_junk(stage, junk, start):
    path = put(stage, "he.jpg", start + junk)
    with pytest.raises(utils.StageError, match=r"he\.jpg"):
        images.ImageRows(stage, path)[:]


def test_image_rows_refuse_every_truncation_of_a_jpeg(tmp_path):
    path, stage = tmp_path / "he.jpg", make_stage(tmp_path)
    Image.fromarray(draw_section((64, 64))).save(path, quality=95)
    assert images.ImageRows(stage, path)[:].shape == (64, 64, 3)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 200, 97):  # never grey rows
        path.write_bytes(whole[:size])
        with pytest.raises(utils.StageError, match=r"he\.jpg"):
            images.ImageRows(stage, path)[:]


# ----- pickles ------------------------------------------------------------------------------------
class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def evil_contents(canary: Path) -> dict[str, bytes]:
    objects = np.empty(2, object)
    objects[:] = Evil(canary)
    system = f"c{os.system.__module__}\nsystem\n(S\"touch '{canary}'\"\ntR.".encode()
    return {
        "bare": pickle.dumps(Evil(canary)),
        "in a dict": pickle.dumps({"cls": [np.zeros(2), Evil(canary)]}),
        "in an object array": pickle.dumps(objects),
        "by hand": system,
        "eval": f"cbuiltins\neval\n(S'open({str(canary)!r}, \"w\")'\ntR.".encode(),
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "import": b"cimportlib\nimport_module\n(S'this'\ntR.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.tofile\x93.",
        "numpy's own exec": b"cnumpy.testing._private.utils\nruncode\n(S'1'\ntR.",
        "numpy's own load": b"cnumpy\nload\n(S'x'\ntR.",
    }


@pytest.mark.parametrize("kind", evil_contents(Path()))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, kind):
    canary, path = tmp_path / "canary", tmp_path / "x.pickle"
    path.write_bytes(evil_contents(canary)[kind])
    with pytest.raises(utils.StageError, match=r"x\.pickle"):
        pickles.read_pickle(path)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("spelling", ["core", "_core"])  # of numpy 1 and 2
@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_read_pickle_reads_arrays(tmp_path, protocol, spelling):
    path = tmp_path / "x.pickle"
    written = {
        "cls": np.arange(6, dtype=np.float32).reshape(2, 3),
        "more": [
            np.float64(2.5),
            np.arange(3)[::-1],
            np.asfortranarray(np.eye(3)),
            np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
            "text",
            1,
            None,
        ],
    }
    path.write_bytes(respelt(written, protocol, spelling))
    assert f"numpy.{spelling}.".encode() in path.read_bytes()
    found = pickles.read_pickle(path)
    np.testing.assert_array_equal(found["cls"], written["cls"])
    assert found["cls"].dtype == np.float32
    for mine, theirs in zip(found["more"], written["more"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def respelt(content, protocol: int, spelling: str) -> bytes:
    """The content pickled by a numpy that calls its core ``numpy.<spelling>``."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            module = getattr(obj, "__module__", "") or ""
            if not module.startswith("numpy._core."):
                return super().save_global(obj, name)
            module = module.replace("numpy._core", f"numpy.{spelling}")
            name = name or obj.__name__
            if self.proto >= 4:
                self.save(module)
                self.save(name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            self.memoize(obj)

    functions = dict.fromkeys((type(codecs.encode), type(respelt)), Pickler.save_global)
    Pickler.dispatch = {**pickle._Pickler.dispatch, **functions}
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


LENGTHS = b"\x8d\x8e\x95\x96"  # opcodes with a length of 8 bytes, see the next test


@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(string.printable, max_size=40).map(str.encode),
    )
)
@settings(parent=ONE_FOLDER, max_examples=300)
def test_read_pickle_reads_or_refuses(tmp_path, content):
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    _, message = outcome(pickles.read_pickle, path)
    assert message is None or "x.pickle" in message


@pytest.mark.parametrize("opcode", LENGTHS)
@pytest.mark.parametrize("length", [1 << 60, 1 << 63], ids=["long", "longer"])
def test_read_pickle_refuses_impossible_lengths(tmp_path, opcode, length):
    path = tmp_path / "x.pickle"
    path.write_bytes(bytes([opcode]) + length.to_bytes(8, "little"))
    with pytest.raises(utils.StageError, match=r"x\.pickle"):
        pickles.read_pickle(path)


def test_read_pickle_takes_no_flags_of_a_dtype(tmp_path):
    """A dtype float32 with the flag of objects: numpy itself then takes its bytes for addresses."""
    path = tmp_path / "x.pickle"
    content = pickletools.optimize(pickle.dumps(np.full(4, 1.5, np.float32), protocol=2))
    state = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
    assert content.count(state + b"\x00") == 1
    path.write_bytes(content.replace(state + b"\x00", state + b"\x3f"))
    code = (
        f"import sys; sys.path.insert(0, {str(Path(utils.__file__).parent)!r})\n"
        "import utils\nfrom pathlib import Path\n"
        f"print(pickles.read_pickle(Path({str(path)!r})).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[1.5, 1.5, 1.5, 1.5]\n")
