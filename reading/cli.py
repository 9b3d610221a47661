"""How every script starts and ends: the one grammar of command lines, and the exit codes.

Exit codes: 0 done, 2 the user can mend it (one message says how), 130 Ctrl-C, 143 told to end by
the system (SIGTERM), 1 a bug (the traceback is kept).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import utils
from reading import guide, plain
from writing import late, origin, progress


def sample_directory(text: str) -> Path:
    """A path with or without a trailing / or \\ (the published README writes ``dataset\\``)."""
    return Path(text.rstrip("\\/") or text)


class Help(argparse.RawDescriptionHelpFormatter):
    """Tells the default of an option once, and none where the option has none of its own."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        no_value = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if no_value or action.required or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """The one command-line grammar: no abbreviations, and a hint where an option is misspelt.

    ``doc`` is the docstring of the script. Its first paragraph describes it in --help; below the
    options stand the example (the indented paragraph) and the paragraphs Reads and Writes.
    """

    def __init__(self, doc: str) -> None:
        first, *others = doc.strip().split("\n\n")
        shown = [text for text in others if text.startswith(("    ", "Reads", "Writes"))]
        super().__init__(
            description=first, epilog="\n\n".join(shown), formatter_class=Help, allow_abbrev=False
        )
        told = f"HISTEX {origin.VERSION}"
        self.add_argument("--version", action="version", version=told, help="Print the version.")

    def alias(self, old: str, new: str, value: str | None = None) -> None:
        """Let an earlier spelling of an option, or of a ``value`` of it, go on; not in --help."""
        action = self._option_string_actions[new]
        if value is not None:
            action = argparse._StoreConstAction([old], action.dest, const=value)
        self._option_string_actions[old] = action

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse does, but a misspelt option is named before anything that is missing."""
        for text in sys.argv[1:] if args is None else args:
            name = str(text).split("=")[0]
            if (
                name.startswith("--")
                and " " not in name
                and name not in self._option_string_actions
            ):
                known = [option for option in self._option_string_actions if option[:2] == "--"]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {close[0]}?" if close else "See --help for those that it has."
                self.error(f"there is no option {name}. {hint}")
        return super().parse_known_args(args, namespace)


def add_shared(parser: Parser) -> None:
    """Options of every script that keeps a record. Neither decides what the results are."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="Run again, and replace the outputs of this script, even those that you edited.",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="How many threads to compute with. Say 1 if several samples run side by side "
        "(default: as many as there are cores; HISTEX.py leaves one of them free).",
    )


def stage_parser(doc: str) -> Parser:
    """Parser with the arguments of all scripts that go on with a sample."""
    parser = Parser(doc)
    parser.add_argument(
        "--directory",
        type=sample_directory,
        required=True,
        help="The sample folder: files are read from it and written to it.",
    )
    add_shared(parser)
    parser.add_argument(
        "--allow-stale",
        action="store_true",
        help="Use an input file even if the script that wrote it should run again, since something "
        "that it read has changed.",
    )
    return parser


def number(
    kind: Callable[[str], float], fits: Callable[[float], bool], what: str
) -> Callable[[str], float]:
    """argparse type: an int or float that ``fits``; ``what`` says in words which ones do."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return read


positive = number(int, lambda n: n >= 1, "a whole number of 1 or more")
not_negative = number(int, lambda n: n >= 0, "a whole number of 0 or more")


def names_or_file(text: str) -> str | Path:
    """argparse type: a file where there is one of that name, else the text itself."""
    with contextlib.suppress(OSError, ValueError):  # a long list of names is no possible path
        if Path(text).is_file():
            return Path(text)
    return text


above_0 = number(float, lambda x: 0 < x < math.inf, "a number above 0")
from_0 = number(float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def add_no_spots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-spots",
        action="store_true",
        help="The section has no spots: maps come from the H&E alone, by reference/predict.py.",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="Where to compute: auto, cpu, cuda, cuda:N or mps."
    )


# ------------------------------------------------------------------------------------------------
# start and end of a script
# ------------------------------------------------------------------------------------------------
REMEDIES = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room: your share of the disk is used up",
    errno.EACCES: "Give yourself access to it, or close it elsewhere",
    errno.EPERM: "Give yourself access to it, or close it elsewhere",
    errno.EROFS: "Choose a folder that can be written to",
    errno.ENOENT: "Something removed it while the script ran: bring it back",
    errno.EMFILE: "Allow more open files (ulimit -n)",
}
NOT_DECISIVE = ("directory", "force", "allow_stale", "threads")  # options that no result is of
THREAD_VARIABLES = (  # read by torch, numpy, OpenCV, libvips and others when they are imported
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "OPENCV_FOR_THREADS_NUM", "VIPS_CONCURRENCY", "RAYON_NUM_THREADS",
)  # fmt: skip
CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # by numpy, whose errors lack the number
IO_REMEDY = "See that the disk or network drive works"


def output_folder(args: argparse.Namespace) -> Path | None:
    """Where outputs go, by the option for a folder or for one file; None is the sample's folder."""
    output: Path | None = getattr(args, "output", None)
    return getattr(args, "folder", None) or (output and output.parent)


def start(
    parser: argparse.ArgumentParser,
    script: str = "",
    check: Callable[[utils.Stage], None] | None = None,
) -> None:
    """What needs no slow import: --help, a misspelt option, and a ``script`` with nothing to do.

    And a ``check`` that may end the script with a StageError. Ctrl-C during the imports that follow
    ends the process at once: nothing has been written yet.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    args = parser.parse_args()
    if getattr(args, "threads", None):
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(args.threads))
    if not script:
        return
    args.options = given_options(parser, args)
    with contextlib.suppress(utils.StageError, OSError):  # main says what is wrong
        stage = utils.Stage(script, args, output_folder(args))
        if stage.up_to_date():
            guide.say_next(stage)
            sys.exit(0)
        if check is not None:
            try:
                check(stage)
            except utils.StageError as error:
                sys.exit(_say(f"error: {error}", 2))


def _end_at_once(*_: object) -> NoReturn:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults, as they would be typed; a token is not shown."""
    options = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in NOT_DECISIVE or value == action.default:
            continue
        options.append(action.option_strings[-1])
        if action.nargs != 0:
            values = value if isinstance(value, list) else [value]
            options += ["***"] if action.dest == "login" else map(_from_anywhere, values)
    return options


def _from_anywhere(value: Any) -> str:
    """A path as it is written in whatever folder the command is run."""
    return str(value.absolute() if isinstance(value, Path) else value)


def files_of_options(args: argparse.Namespace) -> list[Path]:
    """The files that options name: what they hold decides the results. None of them is written."""
    others = ("directory", "folder", "output")
    named = [value for name, value in vars(args).items() if name not in others]
    return [path for path in named if isinstance(path, Path) and path.is_file()]


def run_stage(
    main: Callable[[utils.Stage], None],
    script: str,
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    *,
    makes_folders: bool = False,
) -> int:
    """Run ``main(stage)``, unless its outputs are up to date, and return the exit code."""
    args = parser.parse_args(argv)
    args.options = given_options(parser, args)

    def work() -> None:
        stage = utils.Stage(script, args, output_folder(args), makes_folders)
        try:
            if not stage.up_to_date():
                for path in files_of_options(args):
                    stage.use(path)
                main(stage)
            guide.say_next(stage)
        finally:
            stage.discard()

    return exit_code(work, output_folder(args) or args.directory, "files already finished are kept")


def exit_code(work: Callable[[], None], directory: Path, when_interrupted: str) -> int:
    """0 if ``work()`` ends well; else print one message and return the code: see above."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A console that cannot show a gene name must not stop us; a log is read as it grows
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        with _signals(), progress.spoken(Path(sys.argv[0]).name):
            work()
    except utils.StageError as error:
        return _say(f"error: {error}", 2)
    except OSError as error:
        number = error.errno
        if number is None and CUT_SHORT.fullmatch(str(error)):
            number = errno.ENOSPC
        if number is None:  # not from the system: a bug of ours or of a library
            raise
        place, reason = error.filename2 or error.filename or directory, os.strerror(number)
        remedy = REMEDIES.get(number, IO_REMEDY)
        return _say(f"error: {place}: {reason}.\n{remedy}, then run the same command.", 2)
    except UnicodeEncodeError as error:
        if not plain.HALF.search(error.object[error.start : error.end]):
            raise
        text = error.object[max(0, error.start - plain.SHOWN) : error.end + plain.SHOWN]
        problem = f"error: this name holds half of a character, or is not UTF-8: {text!r}."
        return _say(f"{problem}\nMend that name, then run the same command.", 2)
    except (MemoryError, SystemError) as error:
        memory = error if isinstance(error, MemoryError) else error.__cause__
        if not isinstance(memory, MemoryError):  # OpenCV wraps numpy's into a SystemError
            raise
        problem = f"error: there is not enough memory. {memory}".rstrip()
        remedy = "Close other programs or take a larger machine, then run the same command."
        return _say(f"{problem}\n{remedy}", 2)
    except Terminated:
        return _say(f"ended by the system (SIGTERM); {when_interrupted}", 143)
    except KeyboardInterrupt:
        return _say(f"\ninterrupted; {when_interrupted}", 130)
    return 0


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a cluster ends a job whose time is up."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def send_again(kind: type[BaseException]) -> None:
    """Have the signal behind an exception that cannot be raised here come again, a little later."""
    late.send_again(signal.SIGTERM if issubclass(kind, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise, so that partial files are removed; none of them gets lost.

    Python drops what is raised while an object is deleted. What it drops is sent again, or raised
    at the end of the work, if that comes first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            hook(dropped)
        else:
            send_again(dropped.exc_type)

    hook, sys.unraisablehook = sys.unraisablehook, again
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    if handlers[signal.SIGINT] is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if handlers[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
        late.raise_waiting()
    finally:
        late.forget()
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
