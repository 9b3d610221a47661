"""Change one place of a module at a time and count the changes that the tests notice.

    python benchmarks/mutants.py --modules get_HR.py method/grid.py --sample 30 --out mutants.csv

Reads   the modules and their tests, in a copy of the files that git knows
Writes  the table --out: module, line, change, result, tests that were run, seconds

A change (a mutant) is a comparison, an operator, a condition, a number or a returned value that is
another, or a statement that is left out. Names, text, annotations and the reading of options stay.
First all tests of TESTS run once, to learn which of them reach which line and how long they take.
A mutant then has to get by those that reach its line, the shortest first, as many as --budget
allows; the first that fails kills it. What takes more than three times as long is killed as well.
Tests that start the scripts as processes of their own do not count as reaching a line.

A fork of this process runs the tests of a mutant, so that torch and others are imported once.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reading import cli


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--modules", nargs="+", required=True, help="Files to change, of those in TESTS.")
    option("--sample", type=cli.positive, default=30, help="Mutants a module, drawn by chance.")
    option("--seed", type=cli.not_negative, default=0, help="Of that chance.")
    option("--budget", type=cli.above_0, default=60.0, help="Seconds of tests a mutant, at most.")
    option("--out", type=Path, default=Path("mutants.csv"), help="The table.")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()

import csv
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# The tests that are to know a module; those of the scripts reach method/ and reading/ as well.
READERS = ["test_reading", "test_genes", "test_get_HR", "test_image_calibration"]
NETWORKS = ["test_HISTEX"]
TESTS = {
    "utils.py": ["test_utils", "test_chain", "test_reruns", "test_get_HR"],
    "writing/disk.py": ["test_utils", "test_chain", "test_reruns"],
    "writing/progress.py": ["test_endings"],
    "get_HR.py": ["test_get_HR"],
    "image_calibration.py": ["test_image_calibration"],
    "reading/cli.py": ["test_endings", *READERS],
    **{f"reading/{name}.py": READERS for name in ("genes", "plain", "tables")},
    **{
        f"reading/{name}.py": [*READERS, "test_masking_non_tissue"] for name in ("images", "arrays")
    },
    **{f"reading/{name}.py": READERS for name in ("pickles", "pictures")},
    **{f"method/{name}.py": NETWORKS for name in ("section", "prediction", "anchoring")},
    **{f"method/{name}.py": NETWORKS for name in ("uncertainty", "states", "network", "maps")},
    "method/progress.py": NETWORKS,
    "method/grid.py": ["test_grid", *NETWORKS],
    "method/genes.py": ["test_get_HR", "test_accuracy"],
    "method/calibration.py": ["test_image_calibration"],
    "method/tiling.py": ["test_Histology_Extractor"],
}
PRELOADED = ("torch", "timm", "pandas", "scipy.spatial", "scipy.sparse", "cv2", "pytest")
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
MEMORY = 12 * 2**30  # bytes that a mutant may take
OTHER: dict[type, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
OPPOSITE: dict[type, Any] = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}


@dataclass(frozen=True)
class Mutant:
    """A module's text with one place changed."""

    module: str
    line: int
    change: str
    text: str


# --------------------------------------------------------------------------------------------------
# changes
# --------------------------------------------------------------------------------------------------
def variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node of the syntax tree."""
    if isinstance(node, ast.Compare):
        kind = type(node.ops[0])
        for table in (OTHER, OPPOSITE):
            if kind in table:
                yield ast.Compare(node.left, [table[kind](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
            return
        yield ast.Constant(value * 2 if value else 1)
        if isinstance(value, int) and value not in (0, 1):
            yield ast.Constant(value + 1)
    elif isinstance(node, ast.Return) and not isinstance(node.value, (ast.Constant, type(None))):
        yield "return None"
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "pass"


def is_comparison(test: ast.AST) -> bool:
    return isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp))


def visited(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, list[ast.AST | str]]]:
    """The nodes below a node with what may stand in their place; not annotations and options."""
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in filter(lambda child: isinstance(child, ast.AST), children):
            if name in ("annotation", "returns", "decorator_list") or is_left_alone(child):
                continue
            found = list(variants(child))
            if isinstance(child, (ast.expr, ast.stmt)):
                if isinstance(child, ast.expr) and name == "test" and not is_comparison(child):
                    found.append(ast.UnaryOp(ast.Not(), child))
                if found:
                    yield child, found
            yield from visited(child)


def is_left_alone(node: ast.AST) -> bool:
    """The block ``if __name__``, and functions that only tell argparse of options."""
    if isinstance(node, ast.If):
        return "__name__" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef) and node.name in ("build_parser", "parser", "run")


def mutants_of(module: str) -> list[Mutant]:
    text = (ROOT / module).read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    found = []
    for node, others in visited(ast.parse(text)):
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        last, column = node.end_lineno or 0, node.end_col_offset or 0
        end = sum(map(len, lines[: last - 1])) + column
        before = text.encode()[start:end].decode()
        for other in others:
            after = other if isinstance(other, str) else f"({ast.unparse(other)})"
            whole = text.encode()[:start] + after.encode() + text.encode()[end:]
            change = " ".join(f"{before[:60]} -> {after[:60]}".split())
            found.append(Mutant(module, node.lineno, change, whole.decode()))
    return found


# --------------------------------------------------------------------------------------------------
# tests
# --------------------------------------------------------------------------------------------------
def in_fork(copy: Path, arguments: list[str], seconds: float) -> int | None:
    """pytest's exit code in a fork that runs in the copy; None if it takes longer."""

    def work() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if path != str(ROOT))]
        for name, module in [*sys.modules.items()]:  # ours were read from the real tree
            if str(getattr(module, "__file__", "")).startswith(f"{ROOT}/") and name != "__main__":
                del sys.modules[name]
        nowhere = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        import pytest

        os._exit(pytest.main([*PYTEST, *arguments]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive() and process.pid:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def learn(copy: Path, files: list[str]) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
    """Which tests reach which line of which module, and how many seconds each takes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--cov=."]
    command += ["--cov-context=test", "--cov-report=", "--durations=0", "--durations-min=0"]
    command += [f"tests/{file}.py" for file in files]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the tests fail as they are:\n{done.stdout[-3000:]}")
    seconds: dict[str, float] = {}
    for line in done.stdout.splitlines():
        parts = line.split(maxsplit=2)
        if len(parts) == 3 and parts[1] in ("call", "setup") and parts[0].endswith("s"):
            seconds[parts[2]] = seconds.get(parts[2], 0.0) + float(parts[0][:-1])
    from coverage import CoverageData

    data = CoverageData(str(copy / ".coverage"))
    data.read()
    reached: dict[str, dict[int, set[str]]] = {}
    for measured in data.measured_files():
        contexts = data.contexts_by_lineno(measured)
        name = Path(measured).relative_to(copy.resolve()).as_posix()
        reached[name] = {
            line: {context.split("|")[0] for context in some} for line, some in contexts.items()
        }
    return reached, seconds


def tests_of(
    mutant: Mutant, reached: dict[int, set[str]], seconds: dict[str, float], budget: float
) -> list[str]:
    """The tests that reach a line, the shortest first; all where it runs at the import."""
    some = reached.get(mutant.line, set())
    some = set(seconds) if "" in some else some
    chosen, total = [], 0.0
    for test in sorted(some & set(seconds), key=lambda test: (seconds[test], test)):
        total += seconds[test]
        if total > budget:
            break
        chosen.append(test)
    return chosen


def try_out(
    copy: Path, mutant: Mutant, tests: list[str], seconds: dict[str, float]
) -> tuple[str, float]:
    """killed, slow (killed as well), survived, or unreached by any test; and the seconds."""
    if not tests:
        return "unreached", 0.0
    path, started = copy / mutant.module, time.monotonic()
    path.write_text(mutant.text, encoding="utf-8")
    limit = 120 + 3 * sum(seconds[test] for test in tests)
    code = in_fork(copy, tests, limit)
    shutil.copyfile(ROOT / mutant.module, path)
    result = "slow" if code is None else "killed" if code else "survived"
    return result, time.monotonic() - started


def main() -> int:
    args = build_parser().parse_args()
    if unknown := [module for module in args.modules if module not in TESTS]:
        sys.exit(f"error: TESTS in {__file__} does not say which tests know {', '.join(unknown)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder, args.out.open("w", encoding="utf-8") as file:
        copy = Path(folder) / "tree"
        command = ["git", "ls-files", "-z"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in names.split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["module", "line", "change", "result", "tests", "seconds"])
        files = list(dict.fromkeys(test for module in args.modules for test in TESTS[module]))
        reached, seconds = learn(copy, files)
        some = sorted(seconds, key=lambda test: seconds[test])[:20]
        if code := in_fork(copy, some, 600):
            sys.exit(f"the tests fail in a fork, by {code}: {(copy / 'output.txt').read_text()}")
        for module in args.modules:
            every = mutants_of(module)
            chance = random.Random(f"{args.seed} {module}")  # no secret  # nosec B311
            counts: Counter[str] = Counter()
            for mutant in chance.sample(every, min(args.sample, len(every))):
                own = {test: s for test, s in seconds.items() if in_files(test, TESTS[module])}
                tests = tests_of(mutant, reached.get(module, {}), own, args.budget)
                result, took = try_out(copy, mutant, tests, seconds)
                counts[result] += 1
                change = [module, mutant.line, mutant.change]
                table.writerow([*change, result, len(tests), f"{took:.1f}"])
                file.flush()
            killed = counts["killed"] + counts["slow"]
            print(f"{module}: {killed} of {counts.total()} killed, of {len(every)} possible")
    return 0


def in_files(test: str, files: list[str]) -> bool:
    return Path(test.split("::")[0]).stem in files


if __name__ == "__main__":
    sys.exit(main())
