"""How a script ends: what the system refuses, Ctrl-C at a bad moment, SIGTERM, and long silence."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_stage, run

import utils
from analysis import inputs, labels
from reading import arrays, cli, pickles
from writing import progress

HERE = Path("a folder")


def ending(error: BaseException | None, capsys) -> tuple[int, str]:
    def work() -> None:
        if error is not None:
            raise error

    code = cli.exit_code(work, HERE, "nothing is lost")
    return code, capsys.readouterr().err


# ----- one place decides what an error of the system becomes --------------------------------------
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EPERM", "ESTALE", "EBUSY", "ENOENT", "EROFS",
                                  "EDQUOT", "EMFILE", "ETIMEDOUT", "ENAMETOOLONG"])  # fmt: skip
def test_an_error_of_the_system_is_one_message(capsys, name):
    number = getattr(errno, name)
    code, said = ending(OSError(number, os.strerror(number), "he.jpg"), capsys)
    assert code == 2
    assert said.startswith(f"error: he.jpg: {os.strerror(number)}.\n")
    assert said.endswith(", then run the same command.\n")
    assert len(said.splitlines()) == 2


def test_an_array_that_numpy_could_not_write_whole_is_a_full_disk(capsys):
    code, said = ending(OSError("3136 requested and 0 written"), capsys)
    assert (code, said.splitlines()[0]) == (2, f"error: {HERE}: No space left on device.")


def test_an_error_without_a_file_names_the_folder(capsys):
    code, said = ending(OSError(errno.EIO, "Input/output error"), capsys)
    assert (code, said.splitlines()[0]) == (2, f"error: {HERE}: Input/output error.")


def test_memory_that_is_not_there_is_one_message(capsys):
    code, said = ending(MemoryError("Unable to allocate 9. TiB"), capsys)
    assert code == 2
    assert "not enough memory. Unable to allocate 9. TiB" in said


@pytest.mark.parametrize("name", ["cell \ud83d", os.fsdecode(b"section \xff")])
def test_a_name_that_no_text_file_can_hold_is_one_message(tmp_path, capsys, name):
    """From JSON of programs whose text is UTF-16, or of a folder whose name is no UTF-8."""

    def work() -> None:
        print(f"reading {name}")  # a console shows what it can
        (tmp_path / "cells.csv").write_text(f"{name},1\n", encoding="utf-8")

    assert cli.exit_code(work, HERE, "nothing is lost") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: this name holds half of a character, or is not UTF-8: ")
    assert ascii(name)[1:-1] in said
    assert len(said.splitlines()) == 2


def test_text_that_a_codec_of_ours_cannot_hold_is_a_bug(capsys):
    with pytest.raises(UnicodeEncodeError):
        cli.exit_code(lambda: "\u03b2".encode("ascii"), HERE, "nothing is lost")


def test_memory_that_opencv_misses_is_one_message(capsys):
    def work() -> None:
        raise SystemError("returned a result with an exception set") from MemoryError("9 GB")

    assert cli.exit_code(work, HERE, "") == 2
    assert "not enough memory. 9 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug", [SystemError("x"), ValueError("x"), OSError("no number"), KeyError("y")]
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        cli.exit_code(lambda: (_ for _ in ()).throw(bug), HERE, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (KeyboardInterrupt(), 130), (cli.Terminated(), 143)],
)
def test_other_endings(capsys, error, code):
    got, said = ending(error, capsys)
    assert got == code
    assert ("nothing is lost" in said) == (code != 0)


def test_a_folder_that_vanishes_under_a_run_is_one_message(sample, capsys, monkeypatch):
    import shutil

    finish = utils.Stage.finish

    def vanish(stage, **facts):
        shutil.rmtree(sample)
        finish(stage, **facts)

    monkeypatch.setattr(utils.Stage, "finish", vanish)
    assert run("image_calibration.py", sample) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "No such file or directory" in said


# ----- signals ------------------------------------------------------------------------------------
def in_process(code: str) -> subprocess.CompletedProcess:
    start = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("seconds", [1000, 0])  # a wait is cut short; in_process has 60 s
@pytest.mark.parametrize(
    ("sign", "code", "words"),
    [
        (signal.SIGTERM, 143, "ended by the system (SIGTERM); kept\n"),
        (signal.SIGINT, 130, "\ninterrupted; kept\n"),
    ],
)
def test_a_signal_that_python_drops_comes_again(sign, code, words, seconds):
    """What is raised in __del__ is dropped: the run would go on, and end with 0."""
    done = in_process(f"""
from pathlib import Path
from reading import cli
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), {int(sign)})
        for _ in range(100): pass
def work():
    Dropped()
    time.sleep({seconds})
sys.exit(cli.exit_code(work, Path("."), "kept"))
""")
    assert done.returncode == code
    assert done.stderr == words


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_and_its_partial_files_are_removed(tmp_path, sign, code):
    done = in_process(f"""
import argparse
from pathlib import Path
import utils
from reading import cli
def main(stage):
    with stage.writing(utils.LOCS) as partial:
        partial.write_text("half")
        os.kill(os.getpid(), {int(sign)})
        time.sleep(20)
parser = cli.stage_parser("x")
sys.exit(cli.run_stage(main, "get_HR.py", parser, ["--directory", {str(tmp_path)!r}]))
""")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_modules_are_imported_is_one_line(sample):
    command = [sys.executable, "-X", "importtime", str(ROOT / "HISTEX.py"), "--directory"]
    with subprocess.Popen(
        [*command, str(sample)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in process.stderr:  # importtime says when the slow imports have begun
            if "numpy" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "interrupted\n" in rest


@pytest.mark.parametrize("script", ["", "get_HR.py"])
def test_nothing_is_imported_for_a_script_with_nothing_to_do(finished, monkeypatch, capsys, script):
    """Only a script that keeps a record can have nothing to do: benchmarks have none."""
    monkeypatch.setattr(sys, "argv", ["get_HR.py", "--directory", str(finished)])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) if script else contextlib.nullcontext() as done:
            cli.start(cli.stage_parser("x"), script)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.value.code if script else None) == (0 if script else None)
    assert ("up to date" in capsys.readouterr().out) == bool(script)


def test_work_beside_the_main_thread_ends_as_in_it(tmp_path, capsys):
    """Python lets only the main thread set what a signal does."""

    def work():
        raise utils.StageError("no spots.", "Give some.")

    codes = []
    arguments = (work, tmp_path, "kept")
    beside = threading.Thread(target=lambda: codes.append(cli.exit_code(*arguments)))
    beside.start()
    beside.join()
    assert codes == [2]
    assert capsys.readouterr().err == "error: no spots.\nGive some.\n"


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError, 0), (KeyboardInterrupt, 130), (cli.Terminated, 143)]
)
def test_an_error_that_python_drops_is_said_as_ever_and_a_signal_comes(
    tmp_path, monkeypatch, error, code
):
    class Dropped:
        def __del__(self):
            raise error("in __del__")

    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: said.append(dropped.exc_type))
    assert cli.exit_code(lambda: Dropped() and None, tmp_path, "kept") == code
    assert said == ([ValueError] if code == 0 else [])


def test_a_script_in_the_background_goes_on_at_ctrl_c(monkeypatch, tmp_path):
    """A shell has it ignore that signal: what is ignored at the start stays so."""
    monkeypatch.setattr(sys, "argv", ["get_HR.py", "--directory", str(tmp_path)])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cli.start(cli.stage_parser("x"))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_only_the_first_of_several_processes_speaks(capsys, monkeypatch, rank, speaks):
    monkeypatch.setattr(progress, "SPEAK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_bars", [])  # without those that other tests broke off
    monkeypatch.setenv("RANK", rank)
    with progress.spoken("HISTEX.py"):
        bar = progress.Bar(range(2), "epochs", quiet=not speaks)
        time.sleep(0.1)
        bar.close()
    assert ("HISTEX.py: epochs, 0 of 2" in capsys.readouterr().err) == speaks


# ----- long work speaks ---------------------------------------------------------------------------
def test_long_work_says_what_it_does_where_nobody_sees_bars(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SPEAK_SECONDS", 0.02)
    with progress.spoken("HISTEX.py"):
        time.sleep(0.05)
        for number in progress.Bar(range(3), "rows of tiles"):
            if number == 2:
                time.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("(0.0 min so far)")
    assert any("rows of tiles, 2 of 3 (0.0 min so far)" in line for line in said)


def test_a_bar_counts_and_ends(capsys):
    bar = progress.Bar((), "epochs", total=5, done=2)
    bar.update(loss=0.25)
    assert bar.words() == "epochs, 3 of 5"
    bar.close()
    bar.close()
    assert bar not in progress._bars
    before = list(progress._bars)
    with contextlib.suppress(ZeroDivisionError):
        for _ in progress.Bar([1, 0], "items"):
            raise ZeroDivisionError
    assert progress._bars == before


# ----- found by the harnesses of benchmarks/ ------------------------------------------------------
def test_a_spot_far_beyond_any_image_is_refused_where_it_is_read(finished, capsys):
    table = (finished / "locs.csv").read_text().splitlines()
    table[3] = table[3].rsplit(",", 1)[0] + ",1e308"
    (finished / "locs.csv").write_text("\n".join(table) + "\n")
    for script in ("get_HR.py", "masking_non_tissue.py"):
        assert run(script, finished) == 2
        assert "more than 1e+07 px away from the image" in capsys.readouterr().err


def test_a_picture_of_one_endless_row_is_refused_from_its_header(sample, capsys):
    from test_bad_inputs import png_header

    (sample / "he-raw.png").write_bytes(png_header(8_860_712, 48))
    assert run("image_calibration.py", sample) == 2
    assert "8860712 x 48 px" in capsys.readouterr().err


def read_all_kinds(sample):
    """A call for everything that reads an array: file -> what it raises StageError or other for."""
    stage = make_stage(sample)
    path = sample / "a.pickle"
    return {
        "read_array": lambda: arrays.read_array(stage, utils.FEATURES, np.float16, (2,)),
        "read_pickle": lambda: pickles.read_pickle(path),
        "open_labels": lambda: labels.open_labels(sample / "a.npy"),
        "load_labels": lambda: inputs.load_labels(sample / "a.npy", (2, 2), 9),
        "read_map of .npy": lambda: inputs.read_map(sample / "a.npy"),
        "read_map of .pickle": lambda: inputs.read_map(path),
        "read_truth": lambda: inputs.read_truth(sample),
    }


@pytest.mark.parametrize("kind", read_all_kinds(Path()))
def test_a_failing_disk_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, kind):
    for name in (utils.FEATURES.name, "a.npy", "a.pickle", "truth.npz"):
        (tmp_path / name).write_bytes(b"\x93NUMPY no more")
    read = read_all_kinds(tmp_path)[kind]
    with pytest.raises((utils.StageError, ValueError)):
        read()

    def fail(*_args, **_options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(arrays, "mapped", fail)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read()


def test_a_store_whose_folder_was_removed_is_not_finished(finished, monkeypatch, capsys):
    import shutil

    from analysis import export
    from analysis.formats import spatialdata

    honest = spatialdata.write_circles

    def vanish(shapes, target, spots):
        shutil.rmtree(target)
        honest(shapes, target, spots)

    monkeypatch.setattr(spatialdata, "write_circles", vanish)
    assert export.run(["--directory", str(finished), "--format", "spatialdata"]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert not (finished / "histex.zarr").exists()
