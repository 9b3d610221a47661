"""utils.py: fingerprints, atomic writes and the record."""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_FOLDER, draw_section, make_stage, put, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import utils
from method import devices
from reading import cli, images
from writing import disk, origin


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ----- the contract -------------------------------------------------------------------------------
def test_every_file_has_one_owner():
    artifacts = [value for value in vars(utils).values() if isinstance(value, utils.Artifact)]
    names = [name for artifact in artifacts for name in artifact.names]
    assert len(names) == len({name.lower() for name in names}) >= 20
    assert set(names) <= utils.ARTIFACTS.keys()  # those of prepare/ and analysis/ come to them
    scripts = {artifact.made_by for artifact in artifacts} - {None}
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
    assert disk.fingerprint(path) == {
        "bytes": 3,
        "mtime_ns": 123_456_789,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2
    }


def test_a_large_file_is_hashed_only_if_its_time_differs(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(disk, "SMALL_BYTES", 2)
    known = disk.fingerprint(path)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "sha256", lambda _: pytest.fail("hashed"))
        assert disk.same_as(path, known)
        path.write_bytes(b"abcd")
        assert not disk.same_as(path, known)
        assert not disk.same_as(tmp_path / "absent", known)
    path.write_bytes(b"abc")
    os.utime(path, (9, 9))
    assert disk.same_as(path, known)
    path.write_bytes(b"abd")
    os.utime(path, (9, 9))
    assert not disk.same_as(path, known)


def test_fingerprint_of_a_folder_sees_names_and_contents(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return disk.fingerprint(tmp_path / name)["sha256"]

    first = folder("1", {"a": "x", "b/c": "y"})
    assert first == folder("2", {"b/c": "y", "a": "x"})
    others = [
        folder("3", {"a": "y", "b/c": "x"}),
        folder("4", {"a": "x", "c": "y"}),
        folder("5", {"a": "x", "b/c": "z"}),
        folder("6", {"a": "x", "b/c": "y", "d": ""}),
    ]
    assert len({first, *others}) == 5
    assert disk.fingerprint(tmp_path / "1")["bytes"] == 2


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
        with disk.atomic(path) as partial:
            assert partial.parent == path.parent
            assert partial.suffix == ".npy"  # which image writers go by
            assert partial.name.startswith(".")
            write(partial, text)
            assert not path.exists() or content() == "new"
        assert content() == text
        assert names_in(tmp_path) == ["maps.npy"]
    with contextlib.suppress(KeyboardInterrupt), disk.atomic(path) as partial:
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
    with contextlib.suppress(OSError), disk.atomic(path) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert names_in(tmp_path) == ["maps"]
    assert (path / "old").read_text() == "old"


def test_of_two_runs_that_go_on_putting_their_folders_one_gives_up(tmp_path, monkeypatch):
    """Whenever the name is free, the other run takes it first: its folder is whole, and stays."""
    path, honest = tmp_path / "maps", Path.rename

    def rename(source, target):
        if target == path:
            path.mkdir()
            (path / "other").write_text("whole")
            raise OSError(errno.ENOTEMPTY, "not empty")
        return honest(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="not empty"), disk.atomic(path) as partial:
        partial.mkdir()
    assert (path / "other").read_text() == "whole"


def test_a_folder_in_the_place_of_a_file_has_changed(tmp_path):
    path = tmp_path / "he.jpg"
    path.write_bytes(b"image")
    known = disk.fingerprint(path)
    assert disk.changed_in(path, known) == []
    path.unlink()
    path.mkdir()
    assert disk.changed_in(path, known) == [path]


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_drive_may_know_no_fsync_but_must_not_fail(tmp_path, monkeypatch, number, refused):
    def fail(_):
        raise OSError(number, "of the drive")

    monkeypatch.setattr(os, "fsync", fail)
    wanted = pytest.raises(OSError, match="of the drive") if refused else contextlib.nullcontext()
    with wanted, disk.atomic(tmp_path / "a.csv") as partial:
        partial.write_text("whole")
    assert names_in(tmp_path) == ([] if refused else ["a.csv"])


def test_windows_is_not_asked_what_it_cannot_tell(tmp_path, monkeypatch):
    """There os.kill would end the process that it asks for, and no folder can be opened."""
    asked, opened = [], []
    with monkeypatch.context() as windows:
        windows.setattr(os, "kill", lambda *process: asked.append(process))
        windows.setattr(os, "open", lambda path, _: opened.append(path))
        windows.setattr(os, "name", "nt")
        assert disk.is_dead(4_000_000) is False
        disk._sync(tmp_path)
    assert asked == opened == []


def test_code_that_git_does_not_know_has_no_commit(tmp_path):
    assert origin.commit(tmp_path) == {}
    (tmp_path / ".git").mkdir()
    assert origin.commit(tmp_path) == {}


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
    names = {disk.partial_name(tmp_path / "he.jpg").name for _ in range(100)}
    assert len(names) == 100


def test_check_disk(tmp_path):
    utils.check_disk(tmp_path, 1, "A byte")
    with pytest.raises(utils.StageError, match="A lake") as error:
        utils.check_disk(tmp_path, 10**18, "A lake")
    assert "1000000000 GB are needed" in str(error.value)


# ----- the record ---------------------------------------------------------------------------------
def test_nothing_gets_its_name_before_finish(stage):
    with stage.writing(utils.LOCS) as partial:
        partial.write_text("x")
    assert not (stage.directory / "locs.csv").exists()
    stage.discard()
    assert names_in(stage.directory) == []


@pytest.mark.parametrize("name", ["../cnts.csv", "states/00.csv", "/etc/passwd"])
def test_a_record_with_outputs_elsewhere_is_refused(stage, name):
    """What it lists is removed and replaced; a record from elsewhere may name anything."""
    known = {"bytes": 1, "mtime_ns": 1, "sha256": "x"}
    record = {"finished": True, "inputs": {}, "outputs": {name: known}}
    (stage.directory / utils.record_name(stage.script)).write_text(json.dumps(record))
    with pytest.raises(utils.StageError, match="lists outputs that lie in another folder"):
        utils.read_record(stage, stage.script)


def test_an_outdated_folder_with_a_file_of_the_user_stays(tmp_path):
    folder = tmp_path / utils.SPREAD.name
    folder.mkdir()
    (folder / "mine.npy").write_bytes(b"mine")
    stage = make_stage(tmp_path)
    stage.retire(utils.SPREAD)
    stage.kept.add(folder / "mine.npy")
    stage.finish()
    assert (folder / "mine.npy").read_bytes() == b"mine"


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
        assert record["outputs"] == {"locs.csv": disk.fingerprint(tmp_path / "locs.csv")}


def test_the_record_is_unfinished_while_outputs_move(stage, monkeypatch):
    seen, honest = [], disk.put

    def put_and_look(partial, path):
        record = stage.directory / "a_test.json"
        if path != record:
            seen.append(json.loads(record.read_text())["finished"])
        honest(partial, path)

    monkeypatch.setattr(disk, "put", put_and_look)
    for artifact in (utils.LOCS, utils.RADIUS):
        with stage.writing(artifact) as partial:
            partial.write_text("x")
    stage.finish()
    assert seen == [False, False]
    assert json.loads((stage.directory / "a_test.json").read_text())["finished"] is True


def edit_text(folder: Path) -> None:
    (folder / "radius.txt").write_text("28")


def replace_large(folder: Path) -> None:
    (folder / "other").write_bytes(bytes(2 * disk.SMALL_BYTES))
    os.replace(folder / "other", folder / "large.npy")


CHANGES = {
    "edited": (edit_text, "radius.txt changed"),
    "replaced": (replace_large, "large.npy changed"),
    "removed": (lambda d: (d / "radius.txt").unlink(), "radius.txt went"),
    "lost from a folder": (lambda d: (d / "store" / "c" / "1").unlink(), "store/c/1 went"),
    "new in a folder": (lambda d: (d / "store" / "c" / "2").write_text("z"), "store/c/2 changed"),
    "folder removed": (lambda d: shutil.rmtree(d / "store"), "store went"),
}


@pytest.mark.parametrize("name", [*CHANGES, "touched", "come"])
def test_inputs_that_change_under_the_run_are_not_recorded_as_read(stage, name):
    """What nobody knows the inputs of takes no real name; the earlier result stays."""
    folder = stage.directory
    (folder / "store" / "c").mkdir(parents=True)
    (folder / "store" / "c" / "1").write_text("y")
    put(stage, "radius.txt", "27")
    put(stage, "large.npy", b"1" * 2 * disk.SMALL_BYTES)
    put(stage, "locs.csv", "old")
    for path in ("radius.txt", "large.npy", "store", "absent"):
        stage.use(folder / path)
    change, words = CHANGES.get(name, (lambda d: (d / "absent").write_text("x"), None))
    if name == "touched":
        os.utime(folder / "radius.txt", (1, 1))
    else:
        change(folder)
    with stage.writing(utils.LOCS) as partial:
        partial.write_text("new")
    if words is None:  # its content is the same, or it was known to be absent
        stage.finish()
        assert (folder / "locs.csv").read_text() == "new"
        return
    with pytest.raises(utils.StageError, match=f"{words} while a_test.py ran") as error:
        stage.finish()
    assert ("Bring it back" in str(error.value)) == ("went" in words)
    assert (folder / "locs.csv").read_text() == "old"
    assert not (folder / "a_test.json").exists()


def test_an_edit_during_a_stage_costs_no_training_and_the_next_run_finds_it(sample, capsys):
    """The mask of a long run, say: what it made stays, and is known to be out of date."""
    assert run("image_calibration.py", sample) == 0
    stage = make_stage(sample, utils.HIGH_RESOLUTION)
    stage.require(utils.LOCS)
    text = (sample / "locs.csv").read_text()
    (sample / "locs.csv").write_text(text.replace("spot000", "spot00X"))
    with stage.writing(utils.HR_LOCS) as partial:
        partial.write_text("of the old places")
    stage.finish()
    assert "locs.csv changed or went while get_HR.py ran: run it again" in capsys.readouterr().out
    assert (sample / "HRlocs.csv").read_text() == "of the old places"
    assert not make_stage(sample, utils.HIGH_RESOLUTION).up_to_date()
    with pytest.raises(utils.StageError, match=r"HRlocs\.csv is out of date"):
        make_stage(sample, utils.HISTEX).require(utils.HR_LOCS)


def test_what_two_runs_of_a_script_write_is_no_changed_input(stage):
    """get_HR.py reads gene-names.txt, and writes it where there is none."""
    put(stage, "gene-names.txt", "A")
    stage.use(stage.directory / "gene-names.txt")
    with stage.writing(utils.GENE_NAMES) as partial:
        partial.write_text("A")
    put(stage, "gene-names.txt", "B")  # by the other run
    stage.finish()


@pytest.mark.parametrize(
    ("given_name", "wanted"),
    [
        ("a", "a"), ("a/", "a"), ("a//", "a"), ("a\\", "a"), ("a/b\\", "a/b"), ("a b/", "a b"),
        ("/", "/"), (".", "."), ("./", "."), ("../", ".."), ("\u00e4/", "\u00e4"),
    ],
)  # fmt: skip
def test_sample_directory(given_name, wanted):
    assert cli.sample_directory(given_name) == Path(wanted)


def test_positive():
    assert cli.positive("3") == 3
    for text in ("0", "-1", "x", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not .* 1 or more"):
            cli.positive(text)


def test_processes_of_torchrun_do_not_share_a_card(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(utils.StageError, match="cuda:0 puts all 2 processes of torchrun on one"):
        devices.resolve_device("cuda:0")
    assert devices.resolve_device("cpu").type == "cpu"


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


# ----- images ------------------------------------------------------------
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


# ----- disks that fail -----
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is full")
def test_a_write_that_fails_is_told_when_the_library_is_through():
    done = []
    full = pytest.raises(OSError, match="No space left")
    with full as caught, disk.late_errors(Path("/dev/full")) as file:
        done.append(file.write(b"of HDF5"))
        done.append(file.write(np.arange(3)))
    assert done == [7, 24]
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is full")
def test_of_a_full_disk_and_the_trouble_that_a_library_has_with_it_the_disk_is_told():
    def write(file):
        file.write(b"of HDF5")
        raise RuntimeError("a checksum that cannot be")

    with pytest.raises(OSError, match="No space"), disk.late_errors(Path("/dev/full")) as file:
        write(file)


def test_what_a_library_raises_for_itself_comes_through(tmp_path):
    with pytest.raises(ValueError, match="its own"), disk.late_errors(tmp_path / "file"):
        raise ValueError("its own")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "store" / "inner").mkdir(parents=True)
    (tmp_path / "store" / "inner" / "chunk").write_text("1")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "inner":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    assert disk.files_in(tmp_path / "store") == [tmp_path / "store" / "inner" / "chunk"]
    assert disk.files_in(tmp_path / "absent") == []
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        disk.files_in(tmp_path / "store")


@pytest.mark.parametrize("seconds", [5, 0])
def test_a_signal_does_not_raise_within_what_a_library_calls(tmp_path, seconds):
    """HDF5 would crash over it; it comes once the library is through."""
    seen = []

    def signalled():
        with disk.late_errors(tmp_path / "file"):
            code = disk._Patient.write.__code__
            handler = signal.getsignal(signal.SIGINT)
            frame = type("Frame", (), {"f_code": code})()
            handler(signal.SIGINT, frame)
            seen.append("written")
            time.sleep(seconds)

    with pytest.raises(KeyboardInterrupt):
        signalled()
    assert seen == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
