"""The lock files against the ranges: every range is met, and nothing is missing or without hash."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = sorted((ROOT / "tests").glob("*.lock"))
# What a range stands for, on the Python and the systems that people have
PLACES = [
    {"python_version": version, "python_full_version": f"{version}.4", "sys_platform": system}
    | {"platform_machine": machine, "platform_system": name}
    for version in ("3.11", "3.12", "3.13", "3.14")
    for system, name, machine in (
        ("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"),
        ("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64"),
    )
]  # fmt: skip


def ranges(path: Path) -> list[Requirement]:
    """The requirements of a file and of those that it names with -r."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split(" #")[0].strip()
        if text.startswith("-r "):
            found += ranges(path.parent / text[3:])
        elif text and not text.startswith("#"):
            found.append(Requirement(text))
    return found


def locked(path: Path) -> list[tuple[Requirement, int]]:
    """What a lock file pins, with the number of hashes of each."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
    return [(Requirement(line.split(" --hash")[0]), line.count("--hash=sha256:")) for line in lines]


def versions(path: Path, place: dict[str, str]) -> dict[str, str]:
    """The version of every package there."""
    found: dict[str, str] = {}
    for pinned, _ in locked(path):
        if pinned.marker is None or pinned.marker.evaluate(place):
            name = canonicalize_name(pinned.name)
            assert name not in found, f"{path.name} has {name} twice for {place}"
            found[name] = re.fullmatch(r"==(\S+)", str(pinned.specifier))[1]
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_meets_every_range_with_hashes(lock):
    assert all(n_hashes for _, n_hashes in locked(lock))
    for place in PLACES:
        there = versions(lock, place)
        for wanted in ranges(lock.with_suffix(".txt")):
            version = there.get(canonicalize_name(wanted.name))
            assert version is not None, f"{lock.name} lacks {wanted}: bash tests/lock.sh"
            assert wanted.specifier.contains(version), f"{lock.name} has {version} for {wanted}"


def test_the_lock_has_what_its_packages_need():
    """By what the packages that are installed here say; CI has installed all of the lock."""
    there = versions(ROOT / "tests" / "requirements.lock", {})
    for name, version in there.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.split("+")[0] != version:
            continue
        for text in installed.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                found = there.get(canonicalize_name(needed.name))
                assert found is not None, f"{name} needs {needed}"
                assert needed.specifier.contains(found, prereleases=True), f"{name}: {needed}"


def test_no_range_is_wider_than_another_of_the_same_package():
    """A package that two files name has one range, so that the wings go with the scripts."""
    known: dict[str, Requirement] = {}
    for path in ROOT.glob("*/requirements.txt"):
        for wanted in ranges(path):
            other = known.setdefault(wanted.name, wanted)
            assert wanted.specifier == other.specifier, f"{path}: {wanted}, elsewhere {other}"


def test_the_lock_keeps_to_the_caps_under_which_pip_installs_here():
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    there = versions(ROOT / "tests" / "requirements.lock", {})
    for path in re.findall(r"^global\.constraint='(.+)'$", listed, re.MULTILINE):
        for cap in ranges(Path(path)):
            if version := there.get(canonicalize_name(cap.name)):
                assert cap.specifier.contains(version), f"{version} is locked, {cap} is allowed"
