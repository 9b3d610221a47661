"""The house: which room may import which, how long things are, what every --help shows."""

import ast
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_stage

import analysis.files  # noqa: F401  defines artifacts, as the next one does
import prepare.sample  # noqa: F401
import utils
from reading import cli, guide
from writing import origin

TOP = {  # what stands at the top level beside folders and hidden files
    "image_calibration.py", "get_HR.py", "Histology_Extractor.py", "masking_non_tissue.py",
    "HISTEX.py", "utils.py", "README.md", "requirements.txt", "pyproject.toml", "LICENSE",
    "CITATION.cff", "CHANGELOG.md",
}  # fmt: skip
STAGES = {"image_calibration", "get_HR", "Histology_Extractor", "masking_non_tissue", "HISTEX"}
FLOOR = {"writing", "utils", "reading", "method"}  # all stand on these
ROOMS = {  # a room and those below it, from which it may import
    "writing": set(),
    "utils": {"writing"},
    "reading": {"writing", "utils"},
    "method": {"writing", "utils", "reading"},
    "stages": FLOOR,
    "prepare": FLOOR,
    "analysis": FLOOR,
    "reference": FLOOR | {"analysis"},
    "demo": FLOOR | {"analysis"},
    "workflow": FLOOR,
    "docs": FLOOR | {"analysis", "demo"},
    "benchmarks": FLOOR | {"stages", "prepare", "analysis", "demo"},
}
WINGS = ("prepare", "analysis", "reference")  # whose scripts stand alone
SLOW = (
    "torch", "numpy", "pandas", "scipy", "cv2", "PIL", "matplotlib", "h5py", "pyarrow", "pyvips",
)  # fmt: skip
LONGEST = {"utils.py": 750, "image_calibration.py": 350}  # lines; 700 for the others
FILES = sorted(
    path.relative_to(ROOT)
    for room in (".", *(ROOMS.keys() - {"utils", "stages"}))
    for path in (ROOT / room).glob("*.py" if room == "." else "**/*.py")
)
TREES = {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in FILES}


def is_script(file: Path) -> bool:
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in TREES[file].body
    )


SCRIPTS = [file for file in FILES if is_script(file)]


def room_of(file: Path) -> str:
    if len(file.parts) > 1:
        return file.parts[0]
    return "stages" if file.stem in STAGES else file.stem


def imported_by(file: Path) -> set[Path]:
    """Our own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[file]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {Path(*name.split(".")).with_suffix(".py") for name in names}
    return found & set(FILES)


def test_nothing_else_stands_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout of git")
    files = {name for name in tracked.stdout.splitlines() if "/" not in name}
    assert {name for name in files if not name.startswith(".")} == TOP


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_import_runs_upward(file):
    room = room_of(file)
    for other in imported_by(file):
        assert room_of(other) in ROOMS[room] | {room}, f"{file} imports {other}"
        if room in WINGS:
            assert not is_script(other), f"{file} imports the script {other}"


def test_no_two_files_import_each_other():
    arrows = {file: imported_by(file) for file in FILES}

    def reaches(start: Path) -> set[Path]:
        seen, open_ = set(), [start]
        while open_:
            for other in arrows[open_.pop()] - seen:
                seen.add(other)
                open_.append(other)
        return seen

    assert [str(file) for file in FILES if file in reaches(file)] == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_modules_and_functions_fit_the_eye(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST.get(str(file), 700)
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_central_is_of_any_type(file):
    """mypy sees to it that all is annotated; these names may not be Any either."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.arg) and node.arg in {"device", "network", "section", "split"}:
            assert ast.unparse(node.annotation or ast.Constant("nothing")) not in {
                "'nothing'",
                "Any",
            }


def test_the_default_network_is_found_at_once():
    (network,) = (
        node
        for node in TREES[Path("HISTEX.py")].body
        if isinstance(node, ast.ClassDef) and node.name == "DefaultNetwork"
    )
    assert network.lineno <= 150


NEEDS = {  # options that a script has no default for, beside --directory
    "analysis/annotate.py": ["--markers", "absent.csv"],
    "analysis/cells.py": ["--masks", "absent.tif"],
    "analysis/enrich.py": ["--gene-sets", "absent.gmt"],
    "analysis/export.py": ["--format", "csv"],
    "prepare/legacy_st.py": [
        "--counts", "absent.tsv", "--spots", "absent.tsv", "--image", "absent.png",
    ],
    "prepare/scverse.py": ["--h5ad", "absent.h5ad"],
    "prepare/slides.py": ["--image", "absent.svs"],
    "prepare/visium.py": ["--outs", "absent"],
    "prepare/visium_hd.py": ["--outs", "absent"],
    "prepare/xenium.py": ["--outs", "absent", "--image", "absent.tif", "--aligned"],
    "reference/learn.py": ["--sections", "absent", "--output", "absent.safetensors"],
    "reference/predict.py": ["--reference", "absent.safetensors"],
    "workflow/cohort.py": ["--samples", "absent.tsv"],
}  # fmt: skip


@pytest.mark.parametrize(
    "script", [file.as_posix() for file in SCRIPTS if room_of(file) != "benchmarks"]
)
def test_the_shell_is_told_that_a_script_found_no_input(script, tmp_path, monkeypatch, capsys):
    """The exit code is that of the process, and Ctrl-C had no traceback while it imported."""
    named = [text.replace("absent", str(tmp_path / "absent")) for text in NEEDS.get(script, [])]
    directory = tmp_path / ("a file" if script == "demo/simulate.py" else "sample")
    if script == "demo/simulate.py":  # needs nothing but a folder
        directory.write_text("")
    given = [] if script in (utils.LEARNING, utils.COHORT) else ["--directory", str(directory)]
    monkeypatch.setattr(sys, "argv", [script, *given, *named])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert signal.getsignal(signal.SIGINT) is cli._end_at_once
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert done.value.code == 2
    assert said.startswith("error: ")
    assert str(tmp_path) in said


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_answers_at_once_and_shows_what_goes_in_and_out(script):
    """At once: before anything slow is imported. Seconds are not measured here."""
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--help"]
sys.path.insert(0, {str((ROOT / script).parent)!r})
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
finally:
    print("imported:", *({SLOW!r} & sys.modules.keys()), file=sys.stderr)
""".replace(repr(SLOW), f"set({SLOW!r})")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "imported:"
    assert f"    python {script.as_posix()} --" in done.stdout
    assert "\nReads " in done.stdout
    assert "\nWrites " in done.stdout
    assert "None" not in done.stdout
    assert done.stdout.count("(default: (default") == 0


# ----- what every script says of itself -----
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_tells_the_version(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--version"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.value.code == 0
    assert capsys.readouterr().out == f"HISTEX {origin.VERSION}\n"


def test_every_script_says_what_comes_next():
    """Of those that a user runs one after the other; the files that it names are known."""
    named = {file.as_posix() for file in SCRIPTS if room_of(file) in ("stages", *WINGS)}
    assert set(guide.NEXT) == named
    for step in [*guide.NEXT.values(), *guide.WITHOUT_SPOTS.values()]:
        assert step.then in named | {""}
        assert all(name in utils.ARTIFACTS for name in step.look.split())


def run_a_stage(directory, script, main=utils.Stage.finish) -> int:
    parser = cli.stage_parser("A script.")
    cli.add_no_spots(parser)
    return cli.run_stage(main, script, parser, ["--directory", str(directory)])


def test_the_last_line_says_what_to_look_at_and_what_to_run(tmp_path, capsys):
    command = f"run: python HISTEX.py --directory {tmp_path}"
    assert run_a_stage(tmp_path, utils.MASKING) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {command}"
    (tmp_path / "mask-overlay.png").write_bytes(b"")
    assert run_a_stage(tmp_path, utils.MASKING) == 0
    done, last = capsys.readouterr().out.splitlines()
    assert "up to date" in done
    assert last == f"next: look at {tmp_path / 'mask-overlay.png'}, then {command}"


def test_a_script_that_fails_says_nothing_of_what_comes_next(tmp_path, capsys):
    def main(stage):
        raise utils.StageError("It is wrong.", "Mend it.")

    assert run_a_stage(tmp_path, utils.MASKING, main) == 2
    shown = capsys.readouterr()
    assert "next" not in shown.out + shown.err


def test_a_section_without_spots_takes_another_way(tmp_path, capsys):
    record = {"finished": True, "options": ["--no-spots"], "inputs": {}, "outputs": {}}
    (tmp_path / "image_calibration.json").write_text(json.dumps(record))
    for script, then in (
        (utils.CALIBRATION, "Histology_Extractor.py"),
        (utils.EXTRACTOR, "masking_non_tissue.py"),
        (utils.MASKING, "reference/predict.py"),
    ):
        guide.say_next(make_stage(tmp_path, script))
        assert f"run: python {then} --directory {tmp_path}" in capsys.readouterr().out
