"""The one grammar of all command lines: how options are read, explained and corrected."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path


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

    def alias(self, old: str, new: str) -> None:
        """Let an earlier spelling of an option go on; --help does not show it."""
        self._option_string_actions[old] = self._option_string_actions[new]

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


def add_force(parser: Parser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace the outputs of this script even if they were edited by hand.",
    )


def stage_parser(doc: str) -> Parser:
    """Parser with the arguments of all scripts that go on with a sample."""
    parser = Parser(doc)
    parser.add_argument(
        "--directory",
        type=sample_directory,
        required=True,
        help="Folder of the sample; all files live there.",
    )
    add_force(parser)
    parser.add_argument(
        "--allow-stale",
        action="store_true",
        help="Use inputs even if the stage that made them is out of date.",
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
above_0 = number(float, lambda x: 0 < x < math.inf, "a number above 0")
from_0 = number(float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="Where to compute: auto, cpu, cuda, cuda:N or mps."
    )
