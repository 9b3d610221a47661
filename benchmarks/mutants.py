"""Change one place of a module at a time and count the changes that the tests notice.

    python benchmarks/mutants.py --modules get_HR.py method/grid.py --sample 30 --out mutants.csv

Reads   the modules and their tests, in a copy of the files that git knows
Writes  the table --out: module, line, change, result, tests that were run, seconds

A change (a mutant) is a comparison, an operator, a condition, a number or a returned value that is
another, or a statement that is left out. Names, text, annotations and the reading of options stay,
and so do AT_ONCE, sizes that decide memory and not results, and the ``strict`` of zip.
First all tests of TESTS run once, but slow ones and those that begin with a whole chain of scripts,
to learn which of them reach which line and how long they take; --learnt keeps that for the next
call. A mutant then has to get by those that reach its line, the shortest first, as many as --budget
allows; the first that fails kills it. What takes more than three times as long is killed as well.
Tests that start the scripts as processes of their own do not count as reaching a line. So the whole
suite kills more than the share that is printed.

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
    option("--learnt", type=Path, help="File for what was learnt of tests; used where it holds.")
    option("--out", type=Path, default=Path("mutants.csv"), help="The table.")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()

import csv
import gc
import hashlib
import importlib
import json
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
READERS = ["test_edges", "test_reading", "test_genes", "test_get_HR", "test_image_calibration"]
NETWORKS = ["test_core", "test_HISTEX"]
TESTS = {
    "utils.py": ["test_edges", "test_utils", "test_get_HR"],
    "writing/disk.py": ["test_edges", "test_utils"],
    "writing/progress.py": ["test_edges", "test_endings"],
    "reading/cli.py": ["test_edges", "test_endings", "test_utils"],
    **{f"reading/{name}.py": READERS for name in ("genes", "plain", "tables", "images")},
    **{f"reading/{name}.py": READERS for name in ("arrays", "pickles", "pictures")},
    "get_HR.py": ["test_edges", "test_get_HR"],
    "image_calibration.py": ["test_edges", "test_image_calibration"],
    **{f"method/{name}.py": NETWORKS for name in ("section", "prediction", "anchoring")},
    **{f"method/{name}.py": NETWORKS for name in ("uncertainty", "states", "network", "maps")},
    "method/progress.py": NETWORKS,
    "method/grid.py": ["test_grid", *NETWORKS],
    "method/genes.py": ["test_edges", "test_genes", "test_get_HR"],
    "method/calibration.py": ["test_edges", "test_image_calibration"],
    "method/tiling.py": ["test_core"],
}
PRELOADED = (
    "torch", "torch._dynamo", "timm", "pandas", "scipy.spatial", "scipy.sparse", "scipy.ndimage",
    "cv2", "pytest", "hypothesis", "zarr", "h5py", "pyarrow.parquet", "safetensors.torch",
    "PIL.Image", "tifffile",
)  # fmt: skip
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "--assert=plain", "-p", "_hypothesis_pytestplugin")
SETTINGS = {  # files that learning needs, and what they hold
    "no_branches.cfg": "[run]\nsource = .\nomit = tests/*, benchmarks/*\n",
    "no_chains.py": "def pytest_collection_modifyitems(items):\n"
    "    items[:] = [item for item in items if 'finished_sample' not in item.fixturenames]\n",
}
AT_ONCE = {  # sizes of what is read or held at a time: they decide the memory, not the result
    "BLOCK_BYTES", "BLOCK_CHARACTERS", "BLOCK_PX", "PIECE", "COUNTS_AT_ONCE", "PLACES_AT_ONCE",
    "SCORED_AT_ONCE", "GENES_BYTES", "POINTS_BYTES", "PREDICT_BATCH", "STRIP", "MAX_SQUARES",
    "MAX_THREADS",
}  # fmt: skip
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
    reached_by: tuple[int, ...]  # lines: the tests that reach any of them may notice
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


def visited(
    node: ast.AST, statement: ast.stmt | None = None
) -> Iterator[tuple[ast.expr | ast.stmt, ast.stmt | None, list[ast.AST | str]]]:
    """The nodes below a node, the statement that each stands in, and what may stand in their place;
    not annotations and options."""
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in filter(lambda child: isinstance(child, ast.AST), children):
            if name in ("annotation", "returns", "decorator_list") or is_left_alone(child):
                continue
            found = list(variants(child))
            inner = child if isinstance(child, ast.stmt) else statement
            if isinstance(child, (ast.expr, ast.stmt)):
                if isinstance(child, ast.expr) and name == "test" and not is_comparison(child):
                    found.append(ast.UnaryOp(ast.Not(), child))
                if found:
                    yield child, inner, found
            yield from visited(child, inner)


def lines_of(
    node: ast.expr | ast.stmt, statement: ast.stmt | None, tree: ast.Module
) -> tuple[int, ...]:
    """The lines that run what is changed: its own and the first of its statement, for Python does
    not count every line of a long one. A default of a function runs with its body. A number that
    has a name in the module runs where the name is read."""
    own = (node.lineno, statement.lineno if statement else node.lineno)
    if isinstance(statement, ast.FunctionDef):
        return tuple(part.lineno for part in statement.body)
    if statement in tree.body and isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        named = [part for part in ast.walk(tree) if isinstance(part, ast.Name)]
        names = {name.id for name in named if any(name in ast.walk(part) for part in targets)}
        return tuple({name.lineno for name in named if name.id in names} - set(own)) or own
    return own


def is_comparison(test: ast.AST) -> bool:
    return isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp))


def is_left_alone(node: ast.AST) -> bool:
    """The block ``if __name__``, functions that only tell argparse of options, sizes of AT_ONCE,
    and the ``strict`` of zip, which asserts what holds."""
    if isinstance(node, ast.If):
        return "__name__" in ast.unparse(node.test)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id in AT_ONCE
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.FunctionDef) and node.name in ("build_parser", "parser", "run")


def mutants_of(module: str) -> list[Mutant]:
    text = (ROOT / module).read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    found, tree = [], ast.parse(text)
    for node, statement, others in visited(tree):
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        last, column = node.end_lineno or 0, node.end_col_offset or 0
        end = sum(map(len, lines[: last - 1])) + column
        before = text.encode()[start:end].decode()
        for other in others:
            after = other if isinstance(other, str) else f"({ast.unparse(other)})"
            whole = text.encode()[:start] + after.encode() + text.encode()[end:]
            change = " ".join(f"{before[:60]} -> {after[:60]}".split())
            reached_by = lines_of(node, statement, tree)
            found.append(Mutant(module, node.lineno, reached_by, change, whole.decode()))
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


@dataclass
class Learnt:
    """Which tests of a file reach which line of which module, and how many seconds each takes."""

    of: str  # hash of the sources and the tests
    reached: dict[str, dict[str, list[str]]]  # JSON has no numbers as keys
    seconds: dict[str, float]


def learn(copy: Path, file: str) -> Learnt:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--cov=.", "--cov-config=no_branches.cfg", "--cov-context=test", "--cov-report="]
    command += ["-p", "no_chains", "--durations=0", "--durations-min=0", f"tests/{file}.py"]
    for name, content in SETTINGS.items():
        (copy / name).write_text(content, encoding="utf-8")
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the tests fail as they are:\n{done.stdout[-3000:]}")
    seconds: dict[str, float] = {}
    for line in done.stdout.splitlines():
        parts = line.split(maxsplit=2)
        if len(parts) == 3 and parts[1] in ("call", "setup") and parts[0].endswith("s"):
            seconds[parts[2]] = round(seconds.get(parts[2], 0.0) + float(parts[0][:-1]), 2)
    from coverage import CoverageData

    data = CoverageData(str(copy / ".coverage"))
    data.read()
    reached: dict[str, dict[str, list[str]]] = {}
    for measured in data.measured_files():
        contexts = data.contexts_by_lineno(measured)
        name = Path(measured).relative_to(copy.resolve()).as_posix()
        reached[name] = {
            str(line): sorted({context.split("|")[0] for context in some})
            for line, some in contexts.items()
        }
    return Learnt(hash_of(copy, file), reached, seconds)


def hash_of(copy: Path, file: str) -> str:
    """Of all code that a file of tests may run."""
    others = {path.name for path in (copy / "tests").glob("test_*.py")} - {f"{file}.py"}
    paths = [path for path in sorted(copy.rglob("*.py")) if path.name not in others]
    paths = [p for p in paths if p.name not in SETTINGS and p.parent.name != "benchmarks"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def learn_all(copy: Path, files: list[str], kept: Path | None) -> dict[str, Learnt]:
    known: dict[str, Learnt] = {}
    if kept is not None and kept.exists():
        content = json.loads(kept.read_text(encoding="utf-8"))
        known = {file: Learnt(**some) for file, some in content.items()}
    for file in files:
        if file not in known or known[file].of != hash_of(copy, file):
            known[file] = learn(copy, file)
            print(f"learnt {len(known[file].seconds)} tests of {file}", flush=True)
            if kept is not None:
                content = {file: vars(some) for file, some in known.items()}
                kept.write_text(json.dumps(content), encoding="utf-8")
    return {file: known[file] for file in files}


def tests_of(mutant: Mutant, learnt: list[Learnt], budget: float) -> dict[str, float]:
    """The tests that run what is changed, the shortest first, with their seconds; all of them where
    it runs at the import."""
    found: dict[str, float] = {}
    for some in learnt:
        reached = some.reached.get(mutant.module, {})
        tests = {test for line in mutant.reached_by for test in reached.get(str(line), [])}
        found |= {t: s for t, s in some.seconds.items() if t in tests or "" in tests}
    chosen, total = {}, 0.0
    for test in sorted(found, key=lambda test: (found[test], test)):
        total += found[test]
        if total > budget:
            break
        chosen[test] = found[test]
    return chosen


def try_out(copy: Path, mutant: Mutant, tests: dict[str, float]) -> tuple[str, float]:
    """killed, slow (killed as well), survived, or unreached by any test; and the seconds."""
    if not tests:
        return "unreached", 0.0
    path, started = copy / mutant.module, time.monotonic()
    path.write_text(mutant.text, encoding="utf-8")
    code = in_fork(copy, [*tests], 120 + 3 * sum(tests.values()))
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
    gc.freeze()  # pytest collects garbage at its end, which takes long over all of the above
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
        learnt = learn_all(copy, files, args.learnt)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        seconds = {test: s for some in learnt.values() for test, s in some.seconds.items()}
        some = sorted(seconds, key=lambda test: seconds[test])[:20]
        if code := in_fork(copy, some, 600):
            sys.exit(f"the tests fail in a fork, by {code}: {(copy / 'output.txt').read_text()}")
        for module in args.modules:
            every = mutants_of(module)
            chance = random.Random(f"{args.seed} {module}")  # no secret  # nosec B311
            counts: Counter[str] = Counter()
            for mutant in chance.sample(every, min(args.sample, len(every))):
                own = [learnt[file] for file in TESTS[module]]
                tests = tests_of(mutant, own, args.budget)
                result, took = try_out(copy, mutant, tests)
                counts[result] += 1
                change = [module, mutant.line, mutant.change]
                table.writerow([*change, result, len(tests), f"{took:.1f}"])
                file.flush()
            killed = counts["killed"] + counts["slow"]
            print(
                f"{module}: {killed} of {counts.total()} killed, of {len(every)} possible",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
