"""The promise: tweak a file, rerun one stage, and nothing is lost or mixed up."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PIPELINE, RECORDS, ROOT, run, run_process, write_sample
from PIL import Image

import utils
from reading import pickles
from writing import disk

CALIBRATION, HR, EXTRACTOR, MASKING, MODEL = (script for script, *_ in PIPELINE)
OPTIONS = {script: options for script, *options in PIPELINE}
DISTURBED = ("edited", "your own", "out of date", "has changed")  # what a note on reruns may say
BACKGROUND = (slice(8, 15), slice(20, 31))  # rows and columns that are painted black


def run_stage(script, directory, *options) -> int:
    return run(script, directory, *OPTIONS[script], *options)


def read_maps(directory) -> dict[str, np.ndarray]:
    index = pd.read_csv(directory / "cnts-super" / "index.csv")
    return {
        gene: pickles.read_pickle(directory / "cnts-super" / name)
        for gene, name in index.itertuples(index=False)
    }


def contents(directory) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): disk.sha256(path)
        for path in directory.rglob("*")
        if path.is_file()
    }


def without_records(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name not in RECORDS}


def paint(directory) -> np.ndarray:
    """Paint a block of the mask black; returns the mask, bool."""
    values = np.array(Image.open(directory / "mask.png"))
    values[BACKGROUND] = 0
    Image.fromarray(values).save(directory / "mask.png")
    return values > 0


def record_of(directory, script) -> dict:
    return json.loads((directory / utils.record_name(script)).read_text())


# ----- 1. nothing has changed ---------------------------------------------------------------------
@pytest.mark.parametrize("script", [HR, EXTRACTOR, MASKING, MODEL])
def test_a_copied_sample_goes_on_silently(finished, capsys, script):
    before = contents(finished)
    assert run_stage(script, finished) == 0
    printed = capsys.readouterr()
    said = printed.out.replace("nothing it was trained on has changed", "") + printed.err
    assert not [word for word in DISTURBED if word in said]
    assert without_records(contents(finished)) == without_records(before)


def test_a_touched_file_is_known_by_its_content(finished, capsys):
    for path in finished.rglob("*"):
        os.utime(path, (1e9, 1e9))
    for script in (HR, MASKING, MODEL):
        assert run_stage(script, finished) == 0
    printed = capsys.readouterr().out
    assert "edited" not in printed
    assert printed.count("up to date") == 3
    assert run_stage(MODEL, finished, "--force") == 0
    assert "taken from 00" in capsys.readouterr().out  # the state as well


def test_a_copy_that_loses_times_is_accepted(finished_sample, tmp_path, capsys):
    directory = tmp_path / "copy"
    shutil.copytree(finished_sample, directory, copy_function=shutil.copyfile)
    assert run_stage(MODEL, directory) == 0
    assert "edited" not in capsys.readouterr().out


def test_the_same_size_with_another_content_is_noticed(finished, capsys):
    path = finished / "radius.txt"
    path.write_text(path.read_text().replace("27", "28"))
    assert run_stage(MODEL, finished) == 0
    assert "radius.txt: edited since image_calibration.py" in capsys.readouterr().out


def test_a_record_holds_what_was_read_and_written(finished):
    for script, inputs, outputs in (
        (CALIBRATION, "he-raw.png pixel-size-raw.txt radius-raw.txt locs-raw.csv",
         "he.jpg locs.csv radius.txt pixel-size.txt"),
        (HR, "locs.csv cnts.csv gene-names.txt", "HRlocs.csv HRcnts.npy gene-names.txt"),
        (EXTRACTOR, "he.jpg", "Histology_feature_map.npy Histology_rgb.npy"),
        (MASKING, "he.jpg locs.csv Histology_feature_map.npy Histology_rgb.npy",
         "mask.png mask-overlay.png"),
        (MODEL, "he.jpg locs.csv radius.txt gene-names.txt HRlocs.csv HRcnts.npy "
         "Histology_feature_map.npy mask.png",
         "cnts-super cnts-super-plots embeddings-gene.pickle held-out-r.csv"),
    ):  # fmt: skip
        record = record_of(finished, script)
        assert record["finished"] is True
        assert set(record["inputs"]) == set(inputs.split())
        assert set(record["outputs"]) == set(outputs.split())
        for known in (record["inputs"], record["outputs"]):
            for name, stored in known.items():
                assert stored == disk.fingerprint(finished / name)
        assert {"python", "numpy", "torch"} <= set(record["versions"])
        assert record["arguments"]["force"] == "False"


# ----- 2. a hand edit -----------------------------------------------------------------------------
def test_an_edited_mask_is_used_and_kept(finished_sample, finished, capsys):
    tissue = paint(finished)
    edited = disk.sha256(finished / "mask.png")
    assert run_stage(MODEL, finished) == 0
    assert "mask.png: edited" in capsys.readouterr().out
    for values in read_maps(finished).values():
        np.testing.assert_array_equal(np.isfinite(values), tissue)
    embedding = pickles.read_pickle(finished / "embeddings-gene.pickle")["cls"]
    np.testing.assert_array_equal(np.isfinite(embedding), np.broadcast_to(tissue, embedding.shape))
    assert record_of(finished, MODEL)["inputs"]["mask.png"]["sha256"] == edited

    before = contents(finished)
    assert run_stage(MASKING, finished) == 0
    assert "kept your mask.png (--force makes a new one)" in capsys.readouterr().out
    overlay = (finished / "mask-overlay.png").read_bytes()
    assert overlay != (finished_sample / "mask-overlay.png").read_bytes()  # shows what is used
    assert run_stage(MASKING, finished) == 0
    printed = capsys.readouterr().out
    assert "kept your mask.png (--force makes a new one)" in printed
    assert "up to date" in printed
    after = contents(finished)
    assert {name for name in after if after[name] != before[name]} == {
        "mask-overlay.png",
        "masking_non_tissue.json",
    }

    assert run_stage(MASKING, finished, "--force") == 0
    assert (finished / "mask.png").read_bytes() == (finished_sample / "mask.png").read_bytes()
    assert run_stage(MODEL, finished) == 0
    assert "edited since" not in capsys.readouterr().out


def test_a_mask_of_the_users_own_is_never_overwritten(finished, capsys):
    (finished / "masking_non_tissue.json").unlink()
    tissue = paint(finished)
    mine = (finished / "mask.png").read_bytes()
    overlay = (finished / "mask-overlay.png").read_bytes()
    assert run_stage(MASKING, finished) == 0
    assert "kept your mask.png (--force makes a new one)" in capsys.readouterr().out
    assert (finished / "mask-overlay.png").read_bytes() != overlay  # it shows the mask that is used
    assert run_stage(MODEL, finished) == 0
    assert (
        "mask.png: not made by masking_non_tissue.py, taken as your own" in capsys.readouterr().out
    )
    assert (finished / "mask.png").read_bytes() == mine
    np.testing.assert_array_equal(np.isfinite(read_maps(finished)["GENE3"]), tissue)


def test_edited_places_move_on_through_the_stages(finished, capsys):
    """x of every spot moved by a pixel in locs.csv: HISTEX.py wants get_HR.py to take it up."""
    locs = pd.read_csv(finished / "locs.csv", index_col=0)
    locs.assign(x=locs.x + 1).to_csv(finished / "locs.csv")
    assert run_stage(MODEL, finished) == 2
    message = capsys.readouterr().err
    assert "locs.csv has changed since get_HR.py read it" in message
    assert f"Run: python {HR}" in message
    assert run_stage(HR, finished) == 0
    assert "locs.csv: edited since image_calibration.py wrote it" in capsys.readouterr().out
    points = pd.read_csv(finished / "HRlocs.csv", index_col=0)
    np.testing.assert_allclose(points.x[: len(locs)], locs.x + 1)
    assert run_stage(MASKING, finished) == 0
    assert run_stage(MODEL, finished) == 0


def test_edited_features_are_used(finished_sample, finished, capsys):
    path = finished / "Histology_feature_map.npy"
    np.save(path, np.load(path)[:, ::-1])
    assert run_stage(MASKING, finished) == 0
    assert run_stage(MODEL, finished) == 0
    assert capsys.readouterr().out.count("Histology_feature_map.npy: edited") == 2
    assert contents(finished / "states") != contents(finished_sample / "states")  # trained anew


# ----- 3. a file that others were made from -------------------------------------------------------
def flip(path):
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)


def test_another_section(finished, capsys):
    flip(finished / "he-raw.png")
    before = contents(finished)
    assert run_stage(MODEL, finished) == 2
    message = capsys.readouterr().err
    assert "he-raw.png has changed since image_calibration.py" in message
    assert f"Run: python {CALIBRATION}" in message
    assert contents(finished) == before

    assert run_stage(CALIBRATION, finished) == 0
    for last, earlier in ((MODEL, EXTRACTOR), (MASKING, EXTRACTOR)):
        assert run_stage(last, finished) == 2
        message = capsys.readouterr().err
        assert "he.jpg has changed since Histology_Extractor.py read it" in message
        assert f"Run: python {earlier}" in message
    assert run_stage(MODEL, finished, "--allow-stale") == 0
    assert "out of date (he.jpg changed), used all the same" in capsys.readouterr().out

    assert run_stage(EXTRACTOR, finished) == 0
    assert run_stage(MODEL, finished) == 2
    assert f"Run: python {MASKING}" in capsys.readouterr().err
    assert run_stage(MASKING, finished) == 0
    assert run_stage(MODEL, finished) == 0
    printed = capsys.readouterr().out
    assert "out of date" not in printed
    assert "taken from" not in printed  # the network was trained anew


@pytest.mark.parametrize(
    ("name", "edit", "script", "culprit"),
    [
        ("gene-names.txt", lambda text: "GENE1\nGENE0\n", MODEL, HR),
        ("cnts.csv", lambda text: text.replace("spot003,", "spot003,1"), MODEL, HR),
        ("pixel-size-raw.txt", lambda text: "0.51", HR, CALIBRATION),
        ("pixel-size-raw.txt", lambda text: "0.51", EXTRACTOR, CALIBRATION),
        ("locs-raw.csv", lambda text: text.replace("60.0", "61.0"), HR, CALIBRATION),
        ("radius-raw.txt", lambda text: "28", MODEL, CALIBRATION),
    ],
)
def test_a_changed_source_names_the_stage_to_rerun(finished, capsys, name, edit, script, culprit):
    path = finished / name
    path.write_text(edit(path.read_text()))
    before = contents(finished)
    assert run_stage(script, finished) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert f"{name} has changed since {culprit} read it" in message
    assert f"Run: python {culprit}" in message
    assert "--allow-stale" in message
    assert contents(finished) == before
    if name not in ("gene-names.txt", "cnts.csv"):  # with those, shapes may no longer fit
        assert run_stage(script, finished, "--allow-stale") == 0


# ----- records that are not whole -----------------------------------------------------------------
BROKEN_RECORDS = {
    "garbage": b"\x00\xff garbage",
    "empty": b"",
    "cut": b'{"finished": true, "inputs": {"he.jpg": {"byt',
    "list": b"[]",
    "number": b"7",
    "null": b"null",
    "nothing": b"{}",
    "no inputs": b'{"finished": true}',
    "finished is text": b'{"finished": "true", "inputs": {}, "outputs": {}}',
    "inputs are a list": b'{"finished": true, "inputs": [], "outputs": {}}',
    "a fingerprint is text": b'{"finished": true, "inputs": {"he.jpg": "1"}, "outputs": {}}',
    "a fingerprint lacks its hash":
        b'{"finished": true, "inputs": {"he.jpg": {"bytes": 1, "mtime_ns": 2}}, "outputs": {}}',
    "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    BROKEN_RECORDS,
)
@pytest.mark.parametrize("script", [MASKING, EXTRACTOR])
def test_a_broken_record_is_refused(finished, capsys, script, kind):
    """By the stage that follows (masking) as by the one that wrote it (the extractor)."""
    record = finished / "Histology_Extractor.json"
    record.write_bytes(BROKEN_RECORDS[kind])
    before = contents(finished)
    assert run_stage(script, finished) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {record} is not a")
    assert f"Move it away and run: python {EXTRACTOR}" in message
    assert contents(finished) == before


def test_an_output_that_its_record_does_not_list(finished, capsys):
    record = record_of(finished, EXTRACTOR)
    del record["outputs"]["Histology_rgb.npy"]
    (finished / "Histology_Extractor.json").write_text(json.dumps(record))
    assert run_stage(MASKING, finished) == 2
    message = capsys.readouterr().err
    assert "Histology_rgb.npy is not listed in Histology_Extractor.json" in message
    assert f"Run: python {EXTRACTOR}" in message


def test_a_record_cannot_point_outside_the_directory(finished, capsys):
    record = record_of(finished, EXTRACTOR)
    record["inputs"]["../../../etc/hostname"] = {"bytes": 1, "mtime_ns": 1, "sha256": "0"}
    (finished / "Histology_Extractor.json").write_text(json.dumps(record))
    before = contents(finished)
    assert run_stage(MASKING, finished, "--force") in (0, 2)  # nothing there is read but its hash
    assert contents(finished).keys() == before.keys()


def cut_off(directory, script, monkeypatch) -> None:
    """A run that ends between its first and its second output."""
    moved, honest = [], os.replace

    def replace(source, target):
        if not str(target).endswith(".json"):
            moved.append(target)
        if len(moved) > 1:
            raise KeyboardInterrupt
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert run_stage(script, directory, "--force") == 130


def test_a_run_that_was_cut_off_is_named(finished, monkeypatch, capsys):
    cut_off(finished, CALIBRATION, monkeypatch)
    assert run_stage(EXTRACTOR, finished) == 2
    message = capsys.readouterr().err
    assert "he.jpg is unfinished" in message
    assert f"Run: python {CALIBRATION}" in message
    for script in (CALIBRATION, EXTRACTOR):
        assert run_stage(script, finished) == 0


def test_an_edit_after_a_run_that_was_cut_off_is_kept(finished, monkeypatch, capsys):
    cut_off(finished, MASKING, monkeypatch)
    paint(finished)
    mine = (finished / "mask.png").read_bytes()
    assert run_stage(MASKING, finished) == 0
    assert "kept your mask.png" in capsys.readouterr().out
    assert (finished / "mask.png").read_bytes() == mine


def edit_radius(directory) -> bytes:
    (directory / "radius.txt").write_text("28.125\n")
    return (directory / "radius.txt").read_bytes()


@pytest.mark.parametrize("since", ["nothing", "option", "input"])
def test_an_edit_after_a_run_that_was_cut_off_is_judged_by_what_that_run_had(
    finished, monkeypatch, capsys, since
):
    """Kept with a word under the same options and inputs; else the user has to choose."""
    cut_off(finished, CALIBRATION, monkeypatch)
    mine, options = edit_radius(finished), []
    if since == "option":
        options = ["--max-megapixels", "1999"]
    if since == "input":
        locs = (finished / "locs-raw.csv").read_text().replace("60.0", "60.5")
        (finished / "locs-raw.csv").write_text(locs)
    capsys.readouterr()
    code = run_stage(CALIBRATION, finished, *options)
    printed = capsys.readouterr()
    assert (finished / "radius.txt").read_bytes() == mine
    if since == "nothing":
        assert code == 0
        assert "kept your radius.txt; the last run was cut off" in printed.out
        assert "see that it still fits" in printed.out
    else:
        assert code == 2
        reason = "other options were given" if options else "locs-raw.csv has changed"
        assert f"radius.txt was edited by hand, and {reason}" in printed.err
        assert run_stage(CALIBRATION, finished, *options, "--force") == 0
        assert (finished / "radius.txt").read_bytes() != mine


# ----- the same result again ----------------------------------------------------------------------
def test_the_same_seed_gives_the_same_bytes(finished_sample, tmp_path):
    directory = write_sample(tmp_path / "again")
    for script, *options in PIPELINE:
        assert run(script, directory, *options) == 0
    assert without_records(contents(directory)) == without_records(contents(finished_sample))


def test_another_seed_gives_another_network(finished_sample, finished):
    assert run_stage(MODEL, finished, "--seed", "5") == 0
    mine, theirs = read_maps(finished), read_maps(finished_sample)
    assert mine.keys() == theirs.keys()
    assert not np.array_equal(mine["GENE0"], theirs["GENE0"])


# ----- killed -------------------------------------------------------------------------------------
TRAINING = ("--epochs", "12", "--n-states", "5", "--n-plots", "1", "--device", "cpu")
RESULTS = ("cnts-super", "states", "embeddings-gene.pickle", "held-out-r.csv")


def results(directory) -> dict[str, str]:
    return {
        name: digest for name, digest in contents(directory).items() if name.startswith(RESULTS)
    }


@contextlib.contextmanager
def one_thread():
    """Sums come out the same to the last bit only if they are split in the same way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def uninterrupted(finished_sample, tmp_path_factory):
    """The results of a whole run of TRAINING."""
    directory = tmp_path_factory.mktemp("whole") / "section"
    shutil.copytree(finished_sample, directory)
    shutil.rmtree(directory / "states")
    with one_thread():
        assert run(MODEL, directory, *TRAINING) == 0
    return results(directory)


def killed_when(directory, reached, sign: signal.Signals) -> int:
    """Run HISTEX.py until ``reached()``, then send ``sign``; returns the exit code."""
    command = [sys.executable, str(ROOT / MODEL), "--directory", str(directory), *TRAINING]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell makes what it runs in the background deaf to Ctrl-C; so would be this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(sign)
    return process.wait(timeout=30)


@pytest.mark.parametrize(
    ("milestone", "sign"),
    [("00/checkpoint.pt", signal.SIGKILL), ("00/model.json", signal.SIGINT)],
)
def test_killed_training_goes_on_to_the_same_result(
    finished, uninterrupted, capsys, milestone, sign
):
    shutil.rmtree(finished / "states")
    before = {k: v for k, v in contents(finished).items() if not k.startswith("states")}
    there = finished / "states" / milestone
    code = killed_when(finished, there.exists, sign)
    assert code == (-signal.SIGKILL if sign == signal.SIGKILL else 130)
    left = contents(finished)
    outside = {k for k in left if not k.startswith("states") and "partial" not in k}
    assert {name: left[name] for name in outside} == before
    with one_thread():
        assert run(MODEL, finished, *TRAINING) == 0
    said = "goes on after epoch" if milestone.endswith(".pt") else "state 0: taken from 00"
    assert said in capsys.readouterr().out
    found = {k: v for k, v in results(finished).items() if "partial" not in k}
    assert found == uninterrupted


def test_what_a_killed_run_left_is_cleaned_up_later(finished):
    left = [
        finished / ".he.0123abcd.partial.jpg",
        finished / ".cnts-super.0123abcd.partial",
        finished / ".recent.0123abcd.partial.npy",
    ]
    left[1].mkdir()
    (left[1] / "GENE0.pickle").write_bytes(b"half")
    for path in (left[0], left[2]):
        path.write_bytes(b"half")
    for path in left[:2]:
        os.utime(path, (1e9, 1e9))
    assert run_stage(HR, finished) == 0
    assert [path.exists() for path in left] == [False, False, True]  # the last may belong to a run


def test_what_a_killed_training_left_is_cleaned_up_later(finished):
    left = finished / "states" / "00" / ".checkpoint.0123abcd.partial.pt"
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    assert run_stage(MODEL, finished) == 0
    assert not left.exists()


# ----- as users run it ----------------------------------------------------------------------------
def test_the_five_commands(finished_sample, tmp_path):
    directory = write_sample(tmp_path / "section A")
    for script, *options in PIPELINE:
        done = run_process(script, directory, *options, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"{script} finished in" in done.stdout
    for values in read_maps(directory).values():
        assert values.dtype == np.float32
        assert values.shape == (28, 42)
        assert np.nanmin(values) >= 0
        assert np.isfinite(values).any()
    assert {path.name for path in directory.iterdir()} == {
        p.name for p in finished_sample.iterdir()
    }


def test_import_and_help_do_nothing(tmp_path):
    """Neither needs data, network or GPU, nor writes a file."""
    code = (
        "import importlib, socket, sys\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in sys.argv[1:]:\n"
        "    stage = importlib.import_module(name)\n"
        "    torch = sys.modules.get('torch')\n"
        "    assert torch is None or not torch.cuda.is_initialized(), name\n"
        "    print('===')\n"
        "    try: stage.run(['--help'])\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
    )
    stages = [script.removesuffix(".py") for script, *_ in PIPELINE]
    done = subprocess.run(
        [sys.executable, "-c", code, *stages], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    _, *helps = done.stdout.split("===\n")
    assert len(helps) == len(stages)
    for said in helps:
        for option in ("--directory", "--force", "--allow-stale"):
            assert option in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [script for script, *_ in PIPELINE])
def test_the_directory_must_be_given(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py")).run([])
    assert end.value.code == 2
    assert "--directory" in capsys.readouterr().err


def test_an_optional_input_that_comes_later_makes_what_follows_stale(finished, capsys):
    (finished / "radius-raw.txt").unlink()
    assert run(CALIBRATION, finished) == 0
    (finished / "radius-raw.txt").write_text("40")
    assert run(HR, finished) == 2
    error = capsys.readouterr().err
    assert "radius-raw.txt has changed" in error
    assert f"Run: python {CALIBRATION}" in error


def test_the_command_of_a_message_has_the_options_of_the_last_run(finished, capsys):
    (finished / "Histology_rgb.npy").unlink()
    assert run(MASKING, finished) == 2
    assert "--backbone efficientnet_lite0" in capsys.readouterr().err.splitlines()[-1]


def test_an_edited_mask_outlives_a_new_image(finished, capsys):
    """The user is told, and neither sent in a circle nor made to throw the edit away."""
    paint(finished)
    mask = (finished / "mask.png").read_bytes()
    image = np.array(Image.open(finished / "he-raw.png"))
    image[:3] //= 2
    Image.fromarray(image).save(finished / "he-raw.png")
    for script in (CALIBRATION, HR):
        assert run(script, finished) == 0
    assert run(EXTRACTOR, finished, "--backbone", "efficientnet_lite0") == 0
    capsys.readouterr()
    assert run(MODEL, finished, "--epochs", "1", "--n-states", "1") == 0
    assert "mask.png: your own; he.jpg has changed since" in capsys.readouterr().out
    assert (finished / "mask.png").read_bytes() == mask


def test_what_a_file_manager_leaves_is_no_edit(finished):
    (finished / "cnts-super-plots" / ".DS_Store").write_bytes(b"x")
    assert run(MODEL, finished, "--epochs", "2", "--n-states", "1") == 0
