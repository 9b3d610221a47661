"""Many samples: the table, the steps and their memory, the page on a cohort; run.sh; threads."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_process

import utils
from reading import cli
from workflow import cohort, steps, table

HEADER = "sample\tplatform\tpaths\toptions\tteaches\treference\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the table lies: two folders with the user's files, one of them with a truth."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "locs-raw.csv").write_text("")
    (tmp_path / "a" / "truth.npz").write_text("")
    (tmp_path / "image.tif").write_text("")
    (tmp_path / "outs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*rows: str, header: str = HEADER) -> dict[str, table.Sample]:
    path = Path("samples.tsv")
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return table.read_table(path, Path("results"))


# ----- the table -----
def test_a_row_tells_what_a_sample_is_made_from(folder):
    found = read(
        "# a comment",
        "one\tvisium_hd\t--outs outs --image image.tif\tvisium_hd.py --bin 008 "
        "HISTEX.py --epochs 20\tkidney",
        "",
        "two\tsample\tb\tHISTEX.py --n-states '3'\t\tkidney",
        "three\tslides\t--image image.tif\t\t\tkidney",
    )
    one, two, three = found.values()
    assert one.directory == Path("results/samples/one")
    assert one.prepared_by == "prepare/visium_hd.py"
    assert one.options == {
        "prepare/visium_hd.py": ["--bin", "008"],
        "HISTEX.py": ["--epochs", "20"],
    }
    assert (one.teaches, one.reference, one.has_spots, one.row) == ("kidney", "", True, 3)
    assert (two.directory, two.prepared_by, two.has_spots) == (Path("b"), None, True)
    assert (two.reference, two.options) == ("kidney", {"HISTEX.py": ["--n-states", "3"]})
    assert three.has_spots is False


BAD = {  # row -> what the message says, after the table's name
    "o n e\tsample\ta": "row 2, column sample: found 'o n e', expected letters",
    "one\tvisum\ta": "row 2, column platform: found 'visum', expected one of visium, visium_hd",
    "one\tsample\tabsent": "row 2, column paths: found absent, expected one folder that is there",
    "one\tvisium\touts": "row 2, column paths: found outs, expected options of prepare/visium.py",
    "one\tvisium\t--outs gone": "row 2, column paths: found gone, expected a file or folder",
    "one\tsample\ta\t--epochs 2": "row 2, column options: found '--epochs', expected the name of a",
    "one\tsample\ta\tHISTEX.py '": "row 2, column options: found HISTEX.py ', expected quotes in",
    "one\tsample\tb\t\tkidney": "row 2, column teaches: found kidney for a sample without a truth",
    "one\tsample\ta\t\tx\tx": "row 2, column teaches: found x, which the sample also uses",
    "one\tsample\ta\t\t\tgone": "row 2, column reference: found gone, expected a file .safetensors",
    "one\tsample\touts": "row 2, column reference: found nothing, and no locs-raw.csv in outs",
    "one\tsample\ta\none\tsample\tb": "row 3, column sample: found one, as in row 2",
    "one\tsample\ta\ntwo\tsample\ta/": "row 3, column paths: found the folder of sample one",
    "one\tsample\ta\t\t\t\tmore": "row 2, column reference: found 7 cells, expected at most 6",
    "": "row 2, column sample: found no sample, expected a row for every sample",
}


@pytest.mark.parametrize("row", BAD, ids=lambda row: BAD[row][:40])
def test_a_fault_of_the_table_is_named_by_row_and_column(folder, row):
    with pytest.raises(utils.StageError) as error:
        read(row)
    assert str(error.value).startswith(f"samples.tsv, {BAD[row]}")
    assert "Mend the table" in str(error.value)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            "sample,platform,paths\n",
            "row 1, column header: found sample,platform,paths, expected a",
        ),
        ("sample\tplatform\tpaths\toption\n", "found 'option', expected options"),
        ("sample\tplatform\tpaths\tpaths\n", "found paths twice, expected each column once"),
    ],
)
def test_a_fault_of_the_header_is_named(folder, header, says):
    with pytest.raises(utils.StageError, match=re.escape(says)):
        read("one\tsample\ta", header=header)


def test_a_table_that_is_absent_is_told_of(folder):
    with pytest.raises(utils.StageError, match="--config samples=FILE"):
        table.read_table(Path("samples.tsv"), Path("results"))


def test_the_scripts_read_their_options_before_any_work(folder):
    rows = [f"{name}\tsample\t{name}\tHISTEX.py --epochs {n}" for name, n in (("a", 3), ("b", 0))]
    found = read(*rows)
    good = {"get_HR.py": ["--n-genes", "5"]}
    with pytest.raises(utils.StageError) as error:
        table.check_options(Path("samples.tsv"), found, good, sys.executable)
    assert "row 3, column options: found HISTEX.py --epochs 0" in str(error.value)
    assert "is not a whole number of 1 or more" in str(error.value)
    table.check_options(Path("samples.tsv"), {"a": found["a"]}, good, sys.executable)


def test_the_table_knows_every_script_that_prepares():
    there = {
        f"prepare/{path.name}"
        for path in (ROOT / "prepare").glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert {*table.PREPARED.values()} == there


# ----- the steps -----
def commands(sample: table.Sample, reference: Path | None = None) -> dict[str, str]:
    found = {}
    for step in steps.steps_with(["h5ad"]):
        if steps.script_of(sample, step):
            words = steps.command(sample, step, {"HISTEX.py": ["--epochs", "9"]}, reference)
            found[step.name] = shlex.join(words).removeprefix(f"{ROOT}/")
    return found


def test_the_commands_of_a_sample(folder):
    Path("k.safetensors").write_text("")
    one, two = read(
        "one\tvisium\t--outs outs --image image.tif\tHISTEX.py --epochs 20",
        "two\tslides\t--image image.tif\t\t\tk.safetensors",
    ).values()
    place = "--directory results/samples/one"
    assert commands(one, Path("k.safetensors")) == {
        "prepare": f"prepare/visium.py {place} --outs outs --image image.tif",
        "calibrate": f"image_calibration.py {place}",
        "densify": f"get_HR.py {place}",
        "extract": f"Histology_Extractor.py {place}",
        "mask": f"masking_non_tissue.py {place}",
        "maps": f"HISTEX.py {place} --reference k.safetensors --epochs 9 --epochs 20",
        "report": f"analysis/report.py {place}",
        "export_h5ad": f"analysis/export.py {place} --format h5ad",
    }
    without_spots = commands(two, Path("k.safetensors"))
    assert "densify" not in without_spots
    assert without_spots["calibrate"].endswith("two --no-spots")
    assert without_spots["mask"].endswith("two --no-spots")
    assert without_spots["maps"] == (
        "reference/predict.py --directory results/samples/two --reference k.safetensors"
    )


def test_a_reference_is_learned_from_those_that_teach_it(folder):
    samples = read("a\tsample\ta\t\tkidney", "b\tsample\tb\t\t\tkidney").values()
    shared = {utils.LEARNING: ["--epochs", "2"]}
    words = steps.learning(samples, "kidney", Path("k.safetensors"), shared)
    assert words[1:] == ["--sections", "a", "--output", "k.safetensors", "--epochs", "2"]


def test_an_unknown_format_is_told_of():
    with pytest.raises(utils.StageError, match="found 'zip', expected some of h5ad, spatialdata"):
        steps.steps_with(["h5ad", "zip"])


def test_a_step_is_due_by_what_its_record_read_and_by_an_edited_mask(folder):
    (sample,) = read("a\tsample\ta").values()
    mask = next(step for step in steps.STEPS if step.name == "mask")
    assert steps.files_read(sample, mask) == []
    for name in ("he.jpg", "mask.png", "mask-overlay.png"):
        (folder / "a" / name).write_text("")
    record = {
        "inputs": {"he.jpg": {}, "gone.npy": {}, "HISTEX.json": {}},
        "outputs": {"mask.png": {}, "mask-overlay.png": {}},
    }
    (folder / "a" / "masking_non_tissue.json").write_text(json.dumps(record))
    (folder / "a" / "HISTEX.json").write_text("{}")
    assert steps.files_read(sample, mask) == ["a/he.jpg", "a/mask.png"]


MEASURED = {  # stage of benchmarks/SCALING.md -> step, and what its sizes are
    "image_calibration": ("calibrate", "pixels"),
    "get_HR": ("densify", "spots"),
    "Histology_Extractor": ("extract", "pixels"),
    "masking_non_tissue": ("mask", "superpixels"),
    "HISTEX-train, 1 state": ("maps", "spots"),
    "HISTEX-predict, 1 state": ("maps", "superpixels"),
}


def test_the_memory_of_a_step_covers_what_was_measured(folder):
    (sample,) = read("a\tsample\ta").values()
    lite = {utils.EXTRACTOR: ["--backbone", steps.EMBEDDED]}
    by_name = {step.name: step for step in steps.STEPS}
    text = (ROOT / "benchmarks" / "SCALING.md").read_text()
    rows = re.findall(
        r"^\| ([\w, -]+) \| ([\d,]+) (pixels|spots|superpixels)[ \w]* \| .*", text, re.M
    )
    peaks = [
        line.split("|")[5]
        for line in text.splitlines()
        if re.match(r"\| [\w, -]+ \| [\d,]+ (pixels|spots|superpixels)", line)
    ]
    seen = set()
    for (stage, size, unit), peak in itertools.islice(zip(rows, peaks, strict=True), 24):
        number = int(size.replace(",", ""))
        name, wanted = MEASURED[stage]
        assert unit == wanted
        side = {"pixels": number, "spots": 200, "superpixels": 16 * number}[unit]
        spots = number if unit == "spots" else 10
        record = {"size": [side, side], "spots": spots}
        (folder / "a" / "image_calibration.json").write_text(json.dumps(record))
        needed = steps.memory_mb(sample, by_name[name], lite) / 1000 - steps.ENGINE_GB
        assert float(peak) <= needed <= 2.5 * float(peak) + 0.5, (stage, size, peak, needed)
        seen.add(stage)
    assert seen == {*MEASURED}


def test_until_its_size_is_known_a_sample_needs_what_a_large_slide_does(folder):
    (sample,) = read("a\tsample\ta").values()
    maps = next(step for step in steps.STEPS if step.name == "maps")
    unknown = steps.memory_mb(sample, maps, {})
    assert unknown > 4000
    (folder / "a" / "image_calibration.json").write_text('{"size": [4000, 4000], "spots": 100}')
    assert steps.memory_mb(sample, maps, {}) < 0.6 * unknown
    extract = next(step for step in steps.STEPS if step.name == "extract")
    lite = {utils.EXTRACTOR: ["--backbone", steps.EMBEDDED]}
    more = steps.memory_mb(sample, extract, {}) - steps.memory_mb(sample, extract, lite)
    assert more == pytest.approx(1000 * steps.MARGIN * steps.VIT_GB, abs=1)


# ----- the page -----
def write_log(sample: str, step: str, text: str) -> None:
    path = steps.log(Path("results"), sample, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def page() -> str:
    assert cohort.run(["--samples", "samples.tsv", "--output", "results"]) == 0
    return Path("results/cohort.html").read_text()


def states() -> dict[str, str]:
    found = re.findall(
        r"<th scope=\"row\">(?:<a[^>]*>)?(\w+).*?<td class=\"text (\w+)\">", page(), re.S
    )
    return dict(found)


def test_the_page_shows_figures_of_the_records_and_links_the_report(
    finished_sample, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    read(f"one\tsample\t'{finished_sample}'")
    text = page()
    record = json.loads((finished_sample / "HISTEX.json").read_text())
    seconds = sum(
        json.loads((finished_sample / utils.record_name(script)).read_text())["seconds"]
        for script in utils.STAGES
    )
    cells = re.findall(r"<td>(.*?)</td>", text)
    locs = (finished_sample / "locs.csv").read_text().splitlines()
    share = json.loads((finished_sample / "masking_non_tissue.json").read_text())["tissue_share"]
    assert cells[:3] == [str(len(locs) - 1), "8", f"{100 * share:.0f}"]
    r = record["held_out_r_median"]
    assert cells[3] == ("-" if r is None else f"{r:.3f}")
    assert cells[5] == f"{seconds:,.0f}"
    assert ">unfinished<" in text.replace("\n", "").replace("unfinished<pre>", "unfinished<")
    assert "report: not begun" in text
    assert len(re.findall("<pre>[a-z]+: ", text)) == 1 + len(record["warnings"])


def test_a_sample_that_failed_is_shown_with_its_error(folder, capsys):
    read("a\tsample\ta", "b\tsample\tb")
    write_log(
        "a", "calibrate", "up to here <all> was well\nerror: a/he-raw.tif is <missing>.\nAdd it.\n"
    )
    write_log("b", "calibrate", "")
    text = page()
    assert "calibrate: error: a/he-raw.tif is &lt;missing&gt;.\nAdd it." in text
    assert "up to here" not in text
    assert "calibrate: running, or cut off" in text
    assert states() == {"a": "failed", "b": "unfinished"}
    assert "2 samples: 0 done, 1 failed, 1 unfinished" in capsys.readouterr().out


def test_a_reference_that_could_not_be_learned_is_told_of_where_it_is_missed(folder):
    read("a\tsample\ta\t\tkidney", "b\tsample\tb\t\t\tkidney")
    for step in ("calibrate", "densify", "extract", "mask"):
        marker = steps.marker(Path("results"), "b", step)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    assert "maps: not begun" in page()
    write_log("references", "kidney", "error: a has no tissue.\n")
    assert "learn, the reference kidney: error: a has no tissue." in page()
    assert states() == {"a": "unfinished", "b": "failed"}


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("usage: x\nHISTEX.py: error: there is no option --x.\n", "HISTEX.py: error: there is no"),
        ("Traceback (most recent call last):\n  File\nKeyError: 'x'\n", "a bug: KeyError: 'x'"),
        ("wrote mask.png\n", ""),
        ("error: one\nerror: two\n", "error: two"),
    ],
)
def test_the_error_of_a_log(log, says, tmp_path):
    (tmp_path / "log").write_text(log)
    assert cohort.error_of(tmp_path / "log").startswith(says)
    assert bool(cohort.error_of(tmp_path / "log")) == bool(says)


def test_a_marker_says_that_a_step_is_done_and_the_page_is_renewed(folder, capsys):
    read("a\tsample\ta")
    write_log("a", "calibrate", "error: old\n")
    assert "calibrate: error: old" in page()
    page()
    assert "up to date" in capsys.readouterr().out
    marker = steps.marker(Path("results"), "a", "calibrate")
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert "densify: not begun" in page()


def test_a_page_of_the_users_is_kept(folder, capsys):
    read("a\tsample\ta")
    Path("results").mkdir()
    Path("results/cohort.html").write_text("mine")
    assert cohort.run(["--samples", "samples.tsv", "--output", "results"]) == 2
    assert "python workflow/cohort.py --force" in capsys.readouterr().err
    assert Path("results/cohort.html").read_text() == "mine"


# ----- one sample without the engine -----
def run_sh(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "workflow" / "run.sh"), *words]
    environment = {**os.environ, "PYTHON": "echo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_run_sh_gives_each_stage_its_own_options():
    done = run_sh(
        "a b", "--threads", "2", "HISTEX.py", "--epochs", "3", "get_HR.py", "--n-genes", "5",
        "HISTEX.py", "--seed", "1",
    )  # fmt: skip
    assert done.returncode == 0
    lines = [
        line.removeprefix(f"{ROOT}/")
        for line in done.stdout.splitlines()
        if line.startswith(str(ROOT))
    ]
    common = "--directory a b --threads 2"
    assert lines == [
        f"image_calibration.py {common}",
        f"get_HR.py {common} --n-genes 5",
        f"Histology_Extractor.py {common}",
        f"masking_non_tissue.py {common}",
        f"HISTEX.py {common} --epochs 3 --seed 1",
    ]


@pytest.mark.parametrize("words", [(), ("--threads", "2")])
def test_run_sh_asks_for_the_folder(words):
    done = run_sh(*words)
    assert done.returncode == 2
    assert "the folder of the sample comes first" in done.stderr


def test_run_sh_stops_where_a_stage_does(tmp_path):
    command = ["bash", str(ROOT / "workflow" / "run.sh"), str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "he-raw.jpg is missing" in done.stderr
    assert "--- get_HR.py" not in done.stdout


# ----- threads -----
POOLS = """
import sys
from reading import cli
cli.start(cli.stage_parser("x"))
import cv2, numpy, pyvips, torch
print(torch.get_num_threads(), cv2.getNumThreads(), pyvips.concurrency_get())
"""


def test_threads_are_those_of_every_library(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in cli.THREAD_VARIABLES}
    command = [sys.executable, "-c", POOLS, "--directory", str(tmp_path), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1"] * 3, done.stderr


def test_threads_decide_no_result(sample, capsys):
    assert run_process(utils.CALIBRATION, sample, "--threads", "1").returncode == 0
    record = json.loads((sample / "image_calibration.json").read_text())
    assert record["options"] == []
    assert record["arguments"]["threads"] == "1"
    assert "up to date" in run_process(utils.CALIBRATION, sample, "--threads", "2").stdout


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_number_of_threads_is_one_or_more(value, capsys):
    with pytest.raises(SystemExit):
        cli.stage_parser("x").parse_args(["--directory", "a", "--threads", value])
    assert "is not a whole number of 1 or more" in capsys.readouterr().err
