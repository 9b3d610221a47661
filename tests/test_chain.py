"""The five commands in a row, again and again: edits are kept, nothing is done twice, and no remedy
leads in a circle."""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PIPELINE, ROOT, run, write_sample
from PIL import Image

import utils
from reading import pickles
from writing import disk

CALIBRATION, HR, EXTRACTOR, MASKING, MODEL = (script for script, *_ in PIPELINE)
OPTIONS = {script: options for script, *options in PIPELINE}
UP_TO_DATE = "up to date, nothing to do"


def chain(directory: Path) -> None:
    """All five, as ``set -e`` runs them: the first that fails ends it."""
    for script, *options in PIPELINE:
        assert run(script, directory, *options) == 0, script


def tissue_of_maps(directory: Path) -> np.ndarray:
    return np.isfinite(pickles.read_pickle(directory / "cnts-super" / "GENE0.pickle"))


def stamps(directory: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


# ----- nothing changed, nothing done --------------------------------------------------------------
def test_a_second_chain_does_nothing(finished, capsys):
    before = stamps(finished)
    chain(finished)
    assert capsys.readouterr().out.count(UP_TO_DATE) == 5
    assert stamps(finished) == before


def test_a_stage_with_nothing_to_do_imports_nothing_slow(finished):
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'numpy', 'pandas', 'cv2'} & set(sys.modules)\n"
    )
    for script, *options in PIPELINE:
        command = [sys.executable, "-c", code, str(ROOT / script), "--directory", str(finished)]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert UP_TO_DATE in done.stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "mask-overlay.png").unlink(),
        lambda d: (d / "locs.csv").write_text((d / "locs.csv").read_text().replace("spot003", "s")),
        lambda d: (d / "masking_non_tissue.json").unlink(),
    ],
    ids=["an output is gone", "an input was edited", "there is no record"],
)
def test_a_stage_with_something_to_do_does_it(finished, capsys, change):
    change(finished)
    assert run(MASKING, finished) == 0
    assert UP_TO_DATE not in capsys.readouterr().out


def test_other_options_or_code_are_something_to_do(finished, capsys, monkeypatch):
    done = []
    for options in ([], ["--n-genes", "5"], ["--n-genes", "5"], ["--n-genes", "5", "--force"]):
        assert run(HR, finished, *options) == 0
        done.append(UP_TO_DATE not in capsys.readouterr().out)
    assert done == [False, True, False, True]
    monkeypatch.setattr(utils, "code_hash", lambda script: "another")
    assert run(HR, finished, "--n-genes", "5") == 0
    assert UP_TO_DATE not in capsys.readouterr().out


def test_a_token_is_no_change(finished, capsys):
    assert run(EXTRACTOR, finished, *OPTIONS[EXTRACTOR], "--login", "***") == 0
    assert UP_TO_DATE in capsys.readouterr().out


def test_a_state_that_was_removed_is_trained_again(finished, capsys):
    shutil.rmtree(finished / "states" / "00")
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    assert UP_TO_DATE not in capsys.readouterr().out
    assert (finished / "states" / "00" / "model.json").is_file()


# ----- keeping an edit is success -----------------------------------------------------------------
def test_the_chain_goes_on_with_an_edited_mask(finished, capsys):
    values = np.array(Image.open(finished / "mask.png"))
    values[8:15, 20:31] = 0
    Image.fromarray(values).save(finished / "mask.png")
    chain(finished)
    printed = capsys.readouterr().out
    assert "kept your mask.png (--force makes a new one)" in printed
    np.testing.assert_array_equal(tissue_of_maps(finished), values > 0)
    before = stamps(finished)
    chain(finished)
    assert stamps(finished) == before
    assert "kept your mask.png" in capsys.readouterr().out  # said every time


def test_the_chain_goes_on_with_edited_places(finished, capsys):
    locs = pd.read_csv(finished / "locs.csv", index_col=0)
    locs.assign(x=locs.x + 1).to_csv(finished / "locs.csv")
    mine = (finished / "locs.csv").read_bytes()
    chain(finished)
    assert "kept your locs.csv" in capsys.readouterr().out
    assert (finished / "locs.csv").read_bytes() == mine
    points = pd.read_csv(finished / "HRlocs.csv", index_col=0)
    np.testing.assert_allclose(points.x[: len(locs)], locs.x + 1)
    before = stamps(finished)
    chain(finished)
    assert stamps(finished) == before


# The image is 660 x 440 px, he.jpg is padded to 672 x 448 px: 42 x 28 superpixels of 16 px.
SIZES = {"grid": (28, 42), "three times": (84, 126), "he.jpg": (448, 672), "he-raw": (440, 660)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_chain_goes_on_with_a_mask_of_ones_own(finished_sample, tmp_path, size, capsys):
    directory = write_sample(tmp_path / "own mask")
    rows, columns = np.indices(size)
    scale = 448 / size[0] if size != (440, 660) else 1.0  # px of he.jpg in a px of the mask
    painted = (rows + 0.5) * scale < 224  # the upper 14 of 28 rows of superpixels
    painted &= (columns + 0.5) * scale < 500
    Image.fromarray((painted * 255).astype(np.uint8)).save(directory / "mask.png")
    mine = (directory / "mask.png").read_bytes()
    chain(directory)
    printed = capsys.readouterr().out
    assert "kept your mask.png (--force makes a new one)" in printed
    assert "mask.png: not made by masking_non_tissue.py, taken as your own" in printed
    expected = np.zeros((28, 42), bool)
    # Column 31 ends at 512 px, column 30 at 496 px: of column 31 a quarter is painted.
    expected[:14, :31] = True
    np.testing.assert_array_equal(tissue_of_maps(directory), expected)
    assert (directory / "mask.png").read_bytes() == mine
    before = stamps(directory)
    chain(directory)
    assert stamps(directory) == before


def test_a_mask_of_another_size_names_the_sizes(finished, capsys):
    Image.fromarray(np.full((300, 300), 255, np.uint8)).save(finished / "mask.png")
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 2
    message = capsys.readouterr().err
    for text in ("is 300 x 300 px", "660 x 440 px as he-raw", "672 x 448 px as he.jpg", "42 x 28"):
        assert text in message


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.0, 1.9])
def test_a_mask_as_large_as_he_raw_lies_on_the_same_tissue(tmp_path, scale):
    """Against brute force: every pixel of he.jpg looks up its pixel of the mask."""
    from conftest import make_stage, write_record

    from reading import images

    rng = np.random.default_rng(0)
    raw = (300, 430)
    scaled = (round(raw[0] * scale), round(raw[1] * scale))
    padded = tuple(-(-side // 224) * 224 for side in scaled)
    Image.fromarray(np.zeros((*padded, 3), np.uint8)).save(tmp_path / "he.png")
    blocks = rng.random((6, 9)) < 0.5
    painted = np.kron(blocks, np.ones((50, 50), bool))[: raw[0], : raw[1]]
    Image.fromarray((painted * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    write_record(tmp_path, CALIBRATION, [], ["he.png"])
    record = tmp_path / "image_calibration.json"
    sizes = f'"raw_size": {list(raw)}, "scaled_size": {list(scaled)}, '
    record.write_text(record.read_text().replace("{", "{" + sizes, 1))
    got = images.read_mask(make_stage(tmp_path), (padded[0] // 16, padded[1] // 16))
    rows = ((np.arange(padded[0]) + 0.5) * raw[0] / scaled[0]).astype(int)
    columns = ((np.arange(padded[1]) + 0.5) * raw[1] / scaled[1]).astype(int)
    whole = np.zeros(padded, bool)
    inside = np.ix_(rows < raw[0], columns < raw[1])
    whole[inside] = painted[np.ix_(rows[rows < raw[0]], columns[columns < raw[1]])]
    share = whole.reshape(padded[0] // 16, 16, padded[1] // 16, 16).mean(axis=(1, 3))
    clear = np.abs(share - 0.5) > 0.2  # where rounding to a pixel of the mask cannot matter
    assert clear.mean() > 0.75
    inside = np.ones_like(share, bool)
    inside[-(-scaled[0] // 16) - 1 :] = inside[:, -(-scaled[1] // 16) - 1 :] = False  # cut by edges
    np.testing.assert_array_equal(got[clear & inside], share[clear & inside] > 0.5)


def test_an_edit_is_not_kept_where_the_input_is_another(finished, capsys):
    """Places edited for one pixel size are wrong for another: the user has to choose."""
    locs = pd.read_csv(finished / "locs.csv", index_col=0)
    locs.assign(x=locs.x + 1).to_csv(finished / "locs.csv")
    (finished / "pixel-size-raw.txt").write_text("0.51\n")
    before = stamps(finished)
    assert run(CALIBRATION, finished) == 2
    message = capsys.readouterr().err
    assert "locs.csv was edited by hand, and pixel-size-raw.txt has changed" in message
    assert "move it to another folder" in message
    assert stamps(finished) == before
    assert run(CALIBRATION, finished, "--force") == 0


def test_files_of_ones_own_in_a_folder_of_ours_stay(finished, capsys):
    mine = finished / "cnts-super" / "notes" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("look at GENE3")
    edited = finished / "cnts-super" / "GENE1.pickle"
    edited.write_bytes(b"mine")
    assert run(MODEL, finished, *OPTIONS[MODEL], "--map-format", "pickle") == 0
    assert UP_TO_DATE in capsys.readouterr().out
    os.utime(finished / "mask.png", (1e9, 1e9))
    (finished / "cnts-super" / "GENE2.pickle").unlink()
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    printed = capsys.readouterr().out
    assert "kept your cnts-super/GENE1.pickle, cnts-super/notes/mine.txt" in printed
    assert mine.read_text() == "look at GENE3"
    assert edited.read_bytes() == b"mine"
    assert np.isfinite(pickles.read_pickle(finished / "cnts-super" / "GENE2.pickle")).any()


# ----- missing is not changed ---------------------------------------------------------------------
def test_what_is_missing_has_not_changed(finished, capsys):
    for name in ("he-raw.png", "cnts.csv", "Histology_rgb.npy"):
        (finished / name).unlink()
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    assert UP_TO_DATE in capsys.readouterr().out
    assert run(MODEL, finished, *OPTIONS[MODEL], "--force") == 0
    assert "out of date" not in capsys.readouterr().out
    assert run(CALIBRATION, finished) == 2
    assert "he-raw.jpg is missing" in capsys.readouterr().err
    (finished / "he.jpg").unlink()
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 2
    message = capsys.readouterr().err
    assert "he.jpg is missing" in message
    assert f"Run: python {CALIBRATION}" in message


def test_another_name_of_the_image_is_a_change(finished, capsys):
    Image.open(finished / "he-raw.png").save(finished / "he-raw.tif")
    (finished / "he-raw.png").unlink()
    assert run(HR, finished) == 2
    assert "he-raw.tif has changed since image_calibration.py read it" in capsys.readouterr().err


def test_a_folder_that_lost_files_is_still_ours(finished, capsys):
    (finished / "cnts-super" / "GENE0.pickle").unlink()
    for path in (finished / "cnts-super-plots").iterdir():
        path.unlink()
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    printed = capsys.readouterr().out
    assert "kept" not in printed
    assert "edited" not in printed
    assert (finished / "cnts-super" / "GENE0.pickle").is_file()


# ----- no circles ---------------------------------------------------------------------------------
def cut(name: str):
    def spoil(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def garbage(name: str):
    return lambda directory: (directory / name).write_bytes(b"garbage")


def fewer_points(directory: Path) -> None:
    table = pd.read_csv(directory / "HRlocs.csv", index_col=0)
    table.iloc[:-3].to_csv(directory / "HRlocs.csv")


def other_shape(directory: Path) -> None:
    path = directory / "Histology_feature_map.npy"
    np.save(path, np.load(path)[:-1])


def follow(script: str, directory: Path, options: list[str]) -> list[str]:
    """Run a stage; where it says what to run, run that, and so on. Returns what was run."""
    todo, done = [(script, options)], []
    while todo:
        script, options = todo[-1]
        assert len(done) < 12, f"a circle: {done}"
        done.append(shlex.join([script, *options]))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = importlib.import_module(script.removesuffix(".py")).run(
                ["--directory", str(directory), *options]
            )
        if code == 0:
            todo.pop()
            continue
        assert code == 2, said.getvalue()
        command = re.search(r"[Rr]un: python (.*?)(?: and then| \(|$)", said.getvalue(), re.M)
        assert command, said.getvalue()
        name, _, place, *rest = shlex.split(command[1])
        if name == EXTRACTOR and "--backbone" not in rest:  # its record was lost: as the user knows
            rest += OPTIONS[EXTRACTOR]
        assert Path(place) == directory
        if (name, rest) == (script, options):  # mended by hand, it says
            raise AssertionError(said.getvalue())
        todo.append((name, rest))
    return done


@pytest.mark.parametrize(
    "spoil",
    [
        cut("HRcnts.npy"), garbage("HRcnts.npy"), cut("he.jpg"), garbage("he.jpg"),
        garbage("locs.csv"), garbage("radius.txt"), cut("Histology_feature_map.npy"), other_shape,
        garbage("mask.png"), fewer_points, garbage("gene-names.txt"),
        garbage("image_calibration.json"), garbage("Histology_Extractor.json"),
        lambda d: Image.fromarray(np.full((300, 300), 255, np.uint8)).save(d / "mask.png"),
        lambda d: Image.fromarray(np.zeros((28, 42), np.uint8)).save(d / "mask.png"),
    ],
)  # fmt: skip
def test_a_remedy_leads_to_the_end(finished, spoil, capsys):
    spoil(finished)
    for name in ("image_calibration.json", "Histology_Extractor.json"):
        if (finished / name).read_bytes() == b"garbage":
            (finished / name).unlink()  # as the message says
    if (finished / "gene-names.txt").read_text() == "garbage":
        (finished / "gene-names.txt").unlink()  # a list of the user's own; removing it is offered
    run_last = follow(MODEL, finished, OPTIONS[MODEL])
    assert run_last[-1].startswith(MODEL)
    chain(finished)


# ----- the disk -----------------------------------------------------------------------------------
def test_a_small_file_of_the_same_size_and_time_is_compared(finished, capsys):
    path = finished / "radius.txt"
    stat = path.stat()
    path.write_text(path.read_text().replace("2", "3"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert run(MODEL, finished, *OPTIONS[MODEL]) == 0
    assert "radius.txt: edited" in capsys.readouterr().out


def test_only_our_own_partial_files_are_swept_away(finished):
    ours = finished / ".he.0123abcd.partial.jpg"
    theirs = [
        finished / ".my.partial-results.csv",
        finished / ".my.01234567x.partial.csv",
        finished / "sub" / ".foo.0123abcd.partial.npy",
    ]
    (finished / "sub").mkdir()
    for path in (ours, *theirs):
        path.write_bytes(b"x")
        os.utime(path, (1e9, 1e9))
    assert run(HR, finished, "--force") == 0
    assert [path.exists() for path in (ours, *theirs)] == [False, True, True, True]


def test_what_a_dead_process_left_is_swept_at_once(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from writing import disk\n"
        f"print(disk.partial_name(Path({str(tmp_path)!r}) / 'cnts.csv.gz').name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    dead, alive = tmp_path / done.stdout.strip(), disk.partial_name(tmp_path / "cnts.csv.gz")
    elsewhere = tmp_path / dead.name.replace(disk.machine(), "0123abcd")
    for path in (dead, alive, elsewhere):
        path.write_bytes(b"half")
    disk.sweep(tmp_path)
    assert [path.exists() for path in (dead, alive, elsewhere)] == [False, True, True]


def test_a_checkpoint_beside_a_finished_state_is_removed(finished):
    left = finished / "states" / "00" / "checkpoint.pt"
    left.write_bytes(b"x")
    assert run(MODEL, finished, *OPTIONS[MODEL], "--force") == 0
    assert not left.exists()


@pytest.mark.parametrize("name", ["states", "states/00"])
def test_a_state_that_leads_elsewhere_is_refused(finished, tmp_path, capsys, name):
    elsewhere = tmp_path / "elsewhere"
    (finished / name).rename(elsewhere)
    (finished / name).symlink_to(elsewhere)
    before = stamps(elsewhere)
    assert run(MODEL, finished, *OPTIONS[MODEL], "--seed", "7") == 2
    assert f"{finished / name} is a link to" in capsys.readouterr().err
    assert stamps(elsewhere) == before


@pytest.mark.skipif(os.name == "nt", reason="the shell of Windows quotes otherwise")
@pytest.mark.parametrize("name", ["$(touch owned)", "it's", 'a "b"', "a;b", "`x`", "a b", "-x"])
def test_a_command_in_a_message_is_quoted(tmp_path, name, capsys):
    directory = tmp_path / name
    directory.mkdir()
    assert run(HR, directory) == 2
    command = capsys.readouterr().err.splitlines()[-1].split("Run: ")[1]
    words = shlex.split(command)
    assert words[:4] == ["python", CALIBRATION, "--directory", str(directory)]


def test_what_is_written_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace, opened = os.fsync, os.replace, os.open
    names = {}

    def open_(path, *args, **kwargs):
        handle = opened(path, *args, **kwargs)
        names[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda h: (events.append(names[h]), fsync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with disk.atomic(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert events == [partial.name, "rename", tmp_path.name]


def test_sizes_in_words():
    sizes = [0, 812, 4100, 26_400_000, 999_600_000, 9_610_000_000]
    words = ["0 bytes", "812 bytes", "4.1 kB", "26 MB", "1.0 GB", "9.6 GB"]
    assert [utils.size(n) for n in sizes] == words
