"""What all HISTEX scripts share: files, records, geometry. No algorithm lives here.

A sample directory (``--directory``) is all that the scripts have in common. This file says which
files it holds and who writes them (the contract), and keeps a record per script, ``<script>.json``,
by which a script sees whether a file is fresh, edited by hand, or out of date, and whether there is
anything to do.

Frames and units. Arrays are (row, col); x (column) and y (row) occur in CSV columns only. Pixel
coordinates are continuous: 0 is the left or upper edge of the first pixel. he.jpg has 0.5 um per
pixel; the superpixel of a coordinate p is floor(p / 16).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writing import disk, origin
from writing.disk import fingerprint

ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------
# geometry
# ------------------------------------------------------------------------------------------------
PIXEL_SIZE_UM = 0.5  # um per pixel of he.jpg: 20x, the scale UNI was trained on
TILE_PX = 224  # side of one input of the histology network
TOKEN_PX = 16  # side of one superpixel (one token of a ViT/16)
TOKENS_PER_TILE = TILE_PX // TOKEN_PX
SUPERPIXEL_UM = TOKEN_PX * PIXEL_SIZE_UM  # 8 um
VISIUM_PITCH_UM, VISIUM_RADIUS_UM = 100.0, 27.5  # centre to centre; printed spots of 55 um
LEGACY_PITCH_UM, LEGACY_RADIUS_UM = 200.0, 50.0  # legacy ST, which came before Visium

# ------------------------------------------------------------------------------------------------
# the contract: which files a sample directory holds, and who writes them
# ------------------------------------------------------------------------------------------------
CALIBRATION = "image_calibration.py"
HIGH_RESOLUTION = "get_HR.py"
EXTRACTOR = "Histology_Extractor.py"
MASKING = "masking_non_tissue.py"
HISTEX = "HISTEX.py"
PREDICTION = "reference/predict.py"  # writes what HISTEX.py does, without spots
LEARNING, COHORT = "reference/learn.py", "workflow/cohort.py"  # have no --directory
STAGES = (CALIBRATION, HIGH_RESOLUTION, EXTRACTOR, MASKING, HISTEX)
ARTIFACTS: dict[str, Artifact] = {}  # file name -> artifact, of every one that is defined


@dataclass(frozen=True)
class Artifact:
    """One file of the sample directory; of several ``names``, exactly one may exist."""

    names: tuple[str, ...]
    made_by: str | None  # script, or None for what the user brings
    what: str
    user_may_bring: bool = False  # accepted without a record of the producing script

    def __post_init__(self) -> None:
        ARTIFACTS.update(dict.fromkeys(self.names, self))

    @property
    def name(self) -> str:
        return self.names[0]


HE_RAW = Artifact(
    ("he-raw.jpg", "he-raw.jpeg", "he-raw.png", "he-raw.tif", "he-raw.tiff"),
    None,
    "the H&E image that the spot coordinates refer to",
)
PIXEL_SIZE_RAW = Artifact(("pixel-size-raw.txt",), None, "um per pixel of he-raw, one number")
LOCS_RAW = Artifact(("locs-raw.csv",), None, "spot id, x (column), y (row), pixels of he-raw")
CNTS = Artifact(
    ("cnts.csv", "cnts.tsv", "cnts.csv.gz", "cnts.tsv.gz"), None, "spots x genes, raw counts"
)
RADIUS_RAW = Artifact(("radius-raw.txt",), None, "spot radius, pixels of he-raw, one number")
GENE_NAMES = Artifact(
    ("gene-names.txt",), HIGH_RESOLUTION, "genes to predict, one a line", user_may_bring=True
)
HE = Artifact(
    ("he.jpg", "he.png"), CALIBRATION, "RGB, 0.5 um per pixel, sides padded to multiples of 224"
)
LOCS = Artifact(("locs.csv",), CALIBRATION, "spot id, x, y, pixels of he.jpg")
RADIUS = Artifact(("radius.txt",), CALIBRATION, "spot radius, pixels of he.jpg")
PIXEL_SIZE = Artifact(("pixel-size.txt",), CALIBRATION, "um per pixel of he.jpg")
HR_LOCS = Artifact(
    ("HRlocs.csv",), HIGH_RESOLUTION, "HR points: x, y (pixels of he.jpg), measured, parents"
)
HR_CNTS = Artifact(("HRcnts.npy",), HIGH_RESOLUTION, "float32 (HR points, genes), counts")
FEATURES = Artifact(
    ("Histology_feature_map.npy",),
    EXTRACTOR,
    "float16 (rows, columns, features), one token a superpixel",
)
RGB = Artifact(
    ("Histology_rgb.npy",), EXTRACTOR, "uint8 (rows, columns, 3), mean colour of a superpixel"
)
MASK = Artifact(
    ("mask.png",), MASKING, "8 bit (rows, columns), tissue is nonzero", user_may_bring=True
)
MASK_OVERLAY = Artifact(
    ("mask-overlay.png",), MASKING, "picture: tissue outlined on the H&E, with the spots"
)
STATES = Artifact(("states",), HISTEX, "trained networks, one folder a state")
MAPS = Artifact(("cnts-super",), HISTEX, "float32 (rows, columns) per gene, counts per superpixel")
SPREAD = Artifact(
    ("cnts-super-sd",), HISTEX, "float32 (rows, columns) per gene, standard deviation of the maps"
)
EMBEDDINGS = Artifact(
    ("embeddings-gene.pickle",), HISTEX, "dict(cls=float32 (dims, rows, columns))"
)
PLOTS = Artifact(("cnts-super-plots",), HISTEX, "PNG maps of the best explained genes")
HELD_OUT = Artifact(("held-out-r.csv",), HISTEX, "gene, correlation with held-out spots")
EXPECTED = Artifact(("expected-r.csv",), HISTEX, "gene, correlation to expect without any spot")

CUT_OFF = "the last run was cut off while it put its results in place"
NOT_FORCED = {*GENE_NAMES.names, *STATES.names}  # --force does not replace them

MIN_PIXEL_SIZE_UM, MAX_PIXEL_SIZE_UM = 0.05, 2.5  # 200x and 4x objectives; a hires image is above
MAX_RADIUS_SUPERPIXELS = 64  # 0.5 mm; a spot is at least one superpixel
MAX_MEGAPIXELS = 2000  # about 6 GB as RGB; more is taken for a decompression bomb
MAX_HE_PIXELS = 65_500**2  # of he.jpg, which is ours; the format has no larger sides


class StageError(ValueError):
    """What the user can put right: the problem (file, found, expected) and what to run."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")


def broken(path: Path, problem: str) -> StageError:
    """A StageError about a file of the user's that is damaged or not what it is taken for."""
    return StageError(f"{path} {problem}", "Copy or download it again, then run the same command.")


def size(n_bytes: float) -> str:
    """In a unit that fits: 812 bytes, 4.1 kB, 26 MB, 9.6 GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * one:
            return f"{n_bytes / one:.{1 if n_bytes < 9.95 * one else 0}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def check_disk(directory: Path, need: int, what: str) -> None:
    """Raise StageError if the disk has less than ``need`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise StageError(
            f"{what}: about {size(need)} are needed in {directory}, but only {size(free)} are "
            f"free.",
            "Free some space or move the folder to another disk, then run the same command.",
        )


# ------------------------------------------------------------------------------------------------
# one run of one stage
# ------------------------------------------------------------------------------------------------
class Stage:
    """One run of one script on one sample directory: its inputs, its outputs, the record of both.

    ``require`` names the inputs, ``guard`` the outputs; both are called before any work is done.
    ``writing`` gives a temporary path per output. ``finish`` puts all outputs in place, but those
    that the user edited and that are kept, and writes the record last. A run that ends in any other
    way leaves the sample directory as it was.

    Inputs lie in ``directory``. Outputs and the record go there too, or into another ``folder``.
    A folder is made when the first output is written, if ``makes_folders`` or if it is that other.
    A stage that ``reads_only`` writes nothing, so that the sample may be write-protected.
    """

    def __init__(
        self,
        script: str,
        args: argparse.Namespace,
        folder: Path | None = None,
        makes_folders: bool = False,
        reads_only: bool = False,
    ) -> None:
        self.script = script
        self.args = args
        self.directory: Path = args.directory
        self.folder = folder or self.directory
        self.options: list[str] = getattr(args, "options", [])
        self.started = time.time()
        self.inputs: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}  # script -> what its record says, see fact
        self.pending: list[tuple[Path, Path]] = []
        self.kept: set[Path] = set()  # edited or brought by the user: finish leaves them in place
        self.outdated: list[Path] = []
        self.made_folder = False
        self.notes: list[str] = []
        self.keeps_others = False  # outputs of earlier runs that this one does not write stay known
        if not (self.directory.is_dir() or (makes_folders and not self.directory.exists())):
            found = "is a file" if self.directory.exists() else "does not exist"
            raise StageError(
                f"--directory {self.directory} {found}; it must be the folder of one sample.",
                f"Run: python {script} --directory FOLDER",
            )
        if reads_only:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise StageError(
                f"{self.folder} is a file; {script} writes into a folder.",
                "Name another one, or leave it out to write into the folder of the sample.",
            )
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            raise StageError(
                f"{self.folder} cannot be written to; {script} writes its results there.",
                f"Make the folder writable, then run: {self.command(script)}",
            )
        for place in [self.folder, *self.folder.glob(f"{STATES.name}/*/")]:
            disk.sweep(place)

    def command(self, script: str | None = None) -> str:
        """The command that runs a script here, with the options it was last run with."""
        script = script or self.script
        options = self.options if script == self.script else []
        if script != self.script:  # not by read_record, whose own messages name a command
            with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
                text = (self.directory / record_name(script)).read_text(encoding="utf-8")
                found = json.loads(text)
                options = [*map(str, found["options"])] if type(found["options"]) is list else []
                if script == HISTEX and found["script"] == PREDICTION:
                    script = PREDICTION
        place = [] if script in (LEARNING, COHORT) else ["--directory", str(self.directory)]
        words = ["python", script, *place, *options]
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

    def remake(self, script: str) -> str:
        """The command that makes the outputs of a script anew, also where it would say that they
        are up to date or keep a file of the user's, and which of those it replaces."""
        with contextlib.suppress(StageError):
            record = read_record(self, script) or {"finished": True, "outputs": {}}
            known = record.get("outputs", {})
            names = [name for name, artifact in ARTIFACTS.items() if artifact.made_by == script]
            found = {name: known.get(name, disk.ABSENT) for name in names if name not in NOT_FORCED}
            names = [n for n, k in found.items() if disk.changed_in(self.directory / n, k)]
            if record["finished"] and (names or (known and not _stale(self, script))):
                replaced = f" (this replaces your {', '.join(names)})" if names else ""
                return f"{self.command(script)} --force{replaced}"
        return self.command(script)

    def warn(self, text: str) -> None:
        """Print a warning, and keep it in the record."""
        print(f"warning: {text}")
        self.notes.append(text)

    def error(self, path: Path, problem: str, remedy: str | None = None) -> StageError:
        """A StageError about ``path``, whose remedy is to rerun its origin or to mend it."""
        made_by = maker(path.name)
        if remedy is None and made_by and made_by != self.script:
            remedy = f"It is written by {made_by}. Run: {self.remake(made_by)}"
        elif remedy is None:
            remedy = f"It is a file you provide: mend it, then run: {self.command(self.script)}"
        return StageError(f"{path} {problem}", remedy)

    # ----- inputs -----
    def find(self, artifact: Artifact, folder: Path | None = None) -> Path | None:
        """The path of an artifact, or None. Two alternatives side by side are an error."""
        folder = folder or self.directory
        there = [folder / name for name in artifact.names if (folder / name).exists()]
        if len(there) > 1:
            names = ", ".join(path.name for path in there)
            raise StageError(
                f"{folder} holds {names}; only one may be there ({artifact.what}).",
                f"Move the others away, then run: {self.command(self.script)}",
            )
        return there[0] if there else None

    def require(self, *artifacts: Artifact, folder: Path | None = None) -> None:
        """Check that the inputs exist, are finished and fresh; note hand edits and fingerprints.

        They and their record may lie in another ``folder``.
        """
        for artifact in artifacts:
            path = self.find(artifact, folder)
            if path is None:
                origin = (
                    f"It is written by {artifact.made_by}. Run: {self.command(artifact.made_by)}"
                    if artifact.made_by
                    else f"It is a file you provide. Add it, then run: {self.command(self.script)}"
                )
                if artifact in (LOCS, HELD_OUT) and {"--no-spots", PREDICTION} & {*origin.split()}:
                    origin = (
                        f"The section goes without spots; {self.script} needs them. If there are "
                        f"some, run the five scripts without --no-spots. If there are none, run "
                        f"{MASKING} with it, too, then {PREDICTION} --reference FILE."
                    )
                place, names = folder or self.directory, " or ".join(artifact.names)
                what = f"{self.script} needs {names} ({artifact.what})."
                raise StageError(f"{place / artifact.name} is missing: {what}", origin)
            self._check_fresh(artifact, path)

    def optional(self, artifact: Artifact) -> Path | None:
        """The path of an input that may be missing; its coming or going makes the outputs stale."""
        path = self.find(artifact)
        if path is None:
            self.inputs[artifact.name] = disk.ABSENT
        else:
            self.require(artifact)
        return path

    def use(self, path: Path, known: dict[str, Any] | None = None) -> None:
        """Note the fingerprint of an input that lies anywhere, or that it is not there.

        ``known`` is one that still holds. The fingerprint of a file that only lost its time is
        taken anew: the next look is faster.
        """
        if path.is_relative_to(self.directory):  # by a name that stays when the sample moves
            name = path.relative_to(self.directory).as_posix()
        else:
            name = str(path.resolve())
        if known is None and name in self.inputs:
            return  # by the first look: what changed since is found by the next run
        holds = known is not None and disk.is_whole(path, known)
        if not path.exists():
            known = disk.ABSENT
        elif known is None or not holds or not (path.is_dir() or disk.has_time(path, known)):
            known = fingerprint(path)
        self.inputs[name] = known

    def fact(self, script: str, key: str) -> Any:
        """A fact of the record of another script, or None; if it changes, this one runs again."""
        value = (read_record(self, script) or {}).get(key)
        self.facts.setdefault(script, {})[key] = value
        return value

    def path(self, artifact: Artifact) -> Path:
        """Path of a required artifact."""
        return self.find(artifact) or self.directory / artifact.name

    def _check_fresh(self, artifact: Artifact, path: Path) -> None:
        record = read_record(self, artifact.made_by, path.parent) if artifact.made_by else None
        if artifact.made_by is None:
            known = None
        elif record is None:
            if not artifact.user_may_bring:
                raise self.error(
                    path,
                    f"has no record {record_name(artifact.made_by)}; its stage did not finish.",
                )
            print(f"{path.name}: not made by {artifact.made_by}, taken as your own")
            known = None
        elif not record["finished"]:
            raise self.error(
                path, f"is unfinished: the last run of {artifact.made_by} was cut off."
            )
        else:
            stale = _stale(self, artifact.made_by, path.parent)
            known = record["outputs"].get(path.name)
            if known is None and not artifact.user_may_bring:
                raise self.error(path, f"is not listed in {record_name(artifact.made_by)}.")
            brought = known is None
            if brought or disk.changed_in(path, known):
                known = None
            if stale and stale[1] == path.name:
                stale = None  # what changed is this file itself: it was edited
            if stale and known is None and artifact.user_may_bring:
                print(
                    f"{path.name}: your own; {stale[1]} has changed since, see that it still fits"
                )
            elif stale and self.args.allow_stale:
                print(f"{path.name}: out of date ({stale[1]} changed), used all the same")
            elif stale:
                script, changed = stale
                raise StageError(
                    f"{path} is out of date: {self.directory / changed} has changed since {script} "
                    f"read it.",
                    f"Run: {self.command(script)} and then the stages after it "
                    f"(or add --allow-stale to use the old files all the same).",
                )
            elif brought:
                print(f"{path.name}: not made by {artifact.made_by}, taken as your own")
            elif known is None:
                print(f"{path.name}: edited since {artifact.made_by} wrote it, the edit is used")
        self.use(path, known)

    def _is_settled(self, name: str) -> bool:
        """True if nothing is to be said of an input's own origin: see ``_check_fresh``."""
        artifact = ARTIFACTS.get(name)
        if artifact is None or artifact.made_by in (None, self.script):
            return True
        record = read_record(self, artifact.made_by)
        if record is None or not record["finished"]:
            return record is None and artifact.user_may_bring
        listed = name in record["outputs"] or artifact.user_may_bring
        return listed and _stale(self, artifact.made_by) is None

    # ----- outputs -----
    def is_mine(self, artifact: Artifact) -> bool:
        """True if the artifact is an unedited output of the last run of this script."""
        path = self.find(artifact, self.folder)
        return path is not None and path in self._own()

    def made(self) -> list[tuple[Path, dict[str, Any]]]:
        """What this script wrote: outputs of its last run, or of runs that were cut off.

        A run that was cut off while it put its outputs in place left some old and some new ones.
        """
        record = read_record(self, self.script) or {"finished": True, "outputs": {}}
        written = [record["outputs"]] if record["finished"] else record["written"]
        return [(self.folder / name, known) for files in written for name, known in files.items()]

    def _own(self) -> list[Path]:
        """The unedited outputs of the last run of this script."""
        known = self.made()
        return [path for path, file in known if path.exists() and not disk.changed_in(path, file)]

    def _is_of(self, script: str | None, path: Path) -> bool:
        """True for an unedited output of another script."""
        record = read_record(self, script, self.folder) if script else None
        outputs = record["outputs"] if record and record["finished"] else {}
        return path.name in outputs and not disk.changed_in(path, outputs[path.name])

    def _edits(self, path: Path) -> list[Path]:
        """What the user edited or added: the output itself, or files in the folder that it is."""
        found = [disk.changed_in(path, known) for place, known in self.made() if place == path]
        return min(found, key=len, default=[path])

    def _goes_on_with(self, artifact: Artifact) -> bool:
        """True if the other outputs of this script follow a file of the user's in place of one."""
        mine = artifact.made_by == self.script and self.script in STAGES
        return mine and artifact.user_may_bring

    def kept_by_user(self, artifact: Artifact) -> bool:
        """True if ``guard`` found that the user's own file is kept."""
        return self.find(artifact, self.folder) in self.kept

    def guard(self, *artifacts: Artifact) -> None:
        """Keep outputs that the user edited or brought, unless --force: see ``kept``.

        Raise StageError where the user has to choose: a file that this script never wrote lies
        where it would write, or an edit was made to an output that other inputs or options now
        make another. What the user may bring anyway, such as mask.png, is kept then, too.
        """
        for artifact in artifacts:
            path = self.find(artifact, self.folder)
            if path is None or self.args.force or not (edits := self._edits(path)):
                continue
            if artifact.made_by != self.script and self._is_of(artifact.made_by, path):
                continue
            record = read_record(self, self.script)
            since = self._changed_since(record, path)
            written = [known for place, known in self.made() if place == path]
            lost = [e for e in edits if not all(disk.is_added(e, path, k) for k in written)]
            if self._goes_on_with(artifact) or (written and not (since and lost)):
                cut_off = None if record is None or record["finished"] else CUT_OFF
                self._keep(edits, since or cut_off)
                continue
            if record is None and self.kept_by_user(MASK):
                continue  # a picture of the mask that is kept
            if not written:
                reason = f"was not written by {self.script}, which would overwrite it"
                if record is None:
                    reason += f", or the record {record_name(self.script)} was lost"
            else:
                reason = f"was edited by hand, and {since}; {self.script} would replace it"
            raise StageError(
                f"{(lost or edits)[0]} {reason}.",
                f"To keep it, move it to another folder and run the same command. "
                f"To replace it, run: {self.command(self.script)} --force",
            )

    def _changed_since(self, record: dict[str, Any] | None, path: Path) -> str | None:
        """Which option or input, but the output ``path``, is no longer that of the record."""
        if record is None:
            return None
        if _decisive(record["options"]) != _decisive(self.options):
            return "other options were given"
        stale = _stale(self, self.script, self.folder)
        return f"{stale[1]} has changed" if stale and stale[1] != path.name else None

    def _keep(self, edits: list[Path], since: str | None) -> None:
        edits = [edit for edit in edits if edit not in self.kept]
        if not edits:
            return
        self.kept |= set(edits)
        names = some([edit.relative_to(self.folder).as_posix() for edit in edits])
        fits = f"; {since}, see that it still fits" if since else ""
        print(f"kept your {names}{fits} (--force makes a new one)")

    def up_to_date(self) -> bool:
        """True if the last run had these inputs, options and code, and its outputs are there.

        Then there is nothing to do; outputs that the user edited since are said to be kept.
        """
        record = read_record(self, self.script)
        if record is None or not record["finished"] or self.args.force:
            return False
        if _decisive(record["options"]) != _decisive(self.options):
            return False
        for script, facts in record["facts_read"].items():
            other = read_record(self, script) or {}
            if any(other.get(key) != value for key, value in facts.items()):
                return False
        code = record.get("code")
        if not isinstance(code, dict) or code.get("sha256") != code_hash(self.script):
            return False
        for name, known in record["inputs"].items():
            if not disk.same_as(self.directory / name, known) or _replaced(self, name):
                return False
            if known != disk.ABSENT and not self._is_settled(name):
                return False
        outputs = {self.folder / name: known for name, known in record["outputs"].items()}
        parts = all((self.folder / name).exists() for name in record["parts"])
        if not (parts and all(map(disk.is_whole, outputs, outputs.values()))):
            return False
        edits = {self.folder / name for name in record["kept"]}
        for path, known in outputs.items():
            changed = disk.changed_in(path, known)
            artifact = ARTIFACTS.get(path.name)
            if changed and artifact and self._goes_on_with(artifact):
                return False  # the other outputs have to follow
            edits |= set(changed)
        self._keep(sorted(edit for edit in edits if edit.exists()), None)
        for path in outputs:  # of a run with --force that was cut off
            disk.sweep_work(path.parent, path.stem)
        print(f"{self.script}: up to date, nothing to do (--force runs it all the same)")
        return True

    @contextlib.contextmanager
    def writing(self, artifact: Artifact, name: str | None = None) -> Iterator[Path]:
        """Yield a temporary path for an output; ``finish`` gives it its real name."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self.made_folder = True
        path = self.folder / (name or artifact.name)
        partial = disk.partial_name(path)
        self.pending.append((partial, path))
        yield partial

    def retire(self, artifact: Artifact) -> None:
        """Have ``finish`` remove what an earlier run wrote and this one does not: it is outdated.

        ``guard`` the artifact before, so that nothing of the user is lost.
        """
        if (path := self.find(artifact, self.folder)) is not None:
            self.outdated.append(path)

    def retire_rest(self) -> None:
        """The same for all that the last run wrote, except what was edited since."""
        self.outdated += self._own()

    def _carry_over(self, partial: Path, path: Path) -> None:
        """Put the user's own files of a folder into the one that is going to replace it."""
        for kept in self.kept:
            if kept.is_relative_to(path) and kept != path:
                new = partial / kept.relative_to(path)
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(kept, new)

    def discard(self) -> None:
        """Remove the temporary files of a run that did not finish, and the folder that it made."""
        for partial, _ in self.pending:
            disk.remove(partial)
        if self.made_folder:
            with contextlib.suppress(OSError):  # not empty: the run did finish
                self.folder.rmdir()

    def _inputs_of_others(self) -> dict[str, dict[str, Any]]:
        """Inputs that are no outputs as well, which another run of this script may write, too."""
        own = {path for _, path in self.pending}
        return {n: known for n, known in self.inputs.items() if self.directory / n not in own}

    def _check_inputs(self) -> None:
        """Raise StageError if an input changed or went since it was noted, before it was read.

        A stage warns only, lest hours of training are lost: by its record, which has what was there
        at first, the next run finds its outputs out of date. So it does with what has come.
        """
        for name, known in self._inputs_of_others().items():
            path = self.directory / name
            if known != disk.ABSENT:
                for file in disk.lost_from(path, known) or disk.changed_in(path, known):
                    if self.script not in (*STAGES, LEARNING):
                        raise self.disturbed(file)
                    self.warn(f"{file.name} changed or went while {self.script} ran: run it again")

    def disturbed(self, path: Path) -> StageError:
        """A StageError about an input that changed or went while this script ran."""
        happened = "changed" if path.exists() else "went"
        return StageError(
            f"{path} {happened} while {self.script} ran and read it; no result was replaced.",
            f"{'Run' if path.exists() else 'Bring it back, then run'} the same command.",
        )

    def finish(self, **facts: Any) -> None:
        """Put the outputs in place, then write the record: the last write says that all is well."""
        json.dumps(facts)  # what cannot be recorded fails here, before any output is replaced
        self._check_inputs()
        outputs = {path.name: fingerprint(partial) for partial, path in self.pending}
        before = read_record(self, self.script) or {"finished": True, "outputs": {}}
        earlier = [before["outputs"]] if before["finished"] else before["written"]
        if self.keeps_others and before["finished"]:
            others = before["outputs"].items()
            outputs = {n: k for n, k in others if (self.folder / n).exists()} | outputs
        unfinished = {
            "finished": False,
            "script": self.script,
            "options": self.options,
            "inputs": self._inputs_of_others(),
            "written": [outputs, *earlier],
        }
        record_path = self.folder / record_name(self.script)
        _write_json(record_path, unfinished)
        for path in sorted(set(self.outdated) - {path for _, path in self.pending}):
            if any(kept.is_relative_to(path) for kept in self.kept):
                continue
            aside = disk.partial_name(path)  # half a folder would be taken for the user's own
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            disk.remove(aside)
            print(f"removed {path.name}, which belonged to an earlier run")
        for partial, path in self.pending:  # after the above: never two alternatives side by side
            if path in self.kept:
                continue
            self._carry_over(partial, path)
            disk.put(partial, path)  # keeps size and mtime, so that the fingerprint holds
            print(f"wrote {path.name}: {size(outputs[path.name]['bytes'])}")
        arguments = {k: str(v) for k, v in vars(self.args).items() if k not in ("login", "options")}
        if getattr(self.args, "login", None):
            arguments["login"] = "***"
        record = {
            "finished": True,
            "script": self.script,
            "arguments": arguments,
            "options": self.options,
            "seconds": round(time.time() - self.started, 2),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": origin.versions(),
            "code": {"sha256": code_hash(self.script), **origin.commit(ROOT)},
            **facts,
            "warnings": self.notes,
            "kept": sorted(path.relative_to(self.folder).as_posix() for path in self.kept),
            "inputs": self.inputs,
            "facts_read": self.facts,
            "outputs": outputs,
        }
        _write_json(record_path, record)
        print(f"{self.script} finished in {record['seconds']:.1f} s")


def record_name(script: str) -> str:
    """Of a script; those that write the same files share one record."""
    if script == PREDICTION:
        return record_name(HISTEX)
    return "prepare.json" if script.startswith("prepare/") else f"{Path(script).stem}.json"


def read_record(stage: Stage, script: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The record of a script in this directory, or in another ``folder``; None if it has none."""
    folder = folder or (stage.folder if script == stage.script else stage.directory)
    path = folder / record_name(script)
    if not path.is_file():
        return None
    force = "" if script == MASKING else " --force"  # all but a mask has to be replaced
    remedy = f"Move it away and run: {stage.command(script)}{force}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{path} is not a readable record: {error}", remedy) from error
    if not isinstance(record, dict) or not isinstance(record.get("finished"), bool):
        raise StageError(f"{path} is not a record of {script}.", remedy)
    record = {"options": [], "written": [], "parts": [], "kept": [], "facts_read": {}, **record}
    lists = (record[key] for key in ("options", "parts", "kept"))
    texts = all(isinstance(part, list) and all(isinstance(t, str) for t in part) for part in lists)
    written = [record.get("outputs")] if record["finished"] else record["written"]
    read = record.setdefault("inputs", None if record["finished"] else {})
    facts = record["facts_read"]
    told = isinstance(facts, dict) and all(type(found) is dict for found in facts.values())
    if not (told and texts and isinstance(written, list) and all(map(_is_files, [*written, read]))):
        raise StageError(f"{path} is not a whole record of {script}.", remedy)
    if any(Path(name).name != name for files in written for name in files):
        raise StageError(f"{path} lists outputs that lie in another folder.", remedy)
    return record


def _is_files(part: Any) -> bool:
    return isinstance(part, dict) and all(map(disk.is_fingerprint, part.values()))


def _stale(stage: Stage, script: str, folder: Path | None = None) -> tuple[str, str] | None:
    """(script to rerun, changed file) if inputs of ``script`` or of a stage before it changed."""
    record = read_record(stage, script, folder) or {"inputs": {}}
    for name, known in record["inputs"].items():
        producer = maker(name)
        if producer and producer != script and (earlier := _stale(stage, producer)):
            return earlier
        if other := _replaced(stage, name):
            return script, other
        if disk.changed_in(stage.directory / name, known):
            return script, name
    return None


def _replaced(stage: Stage, name: str) -> str | None:
    """What took the place of a file: another name of its artifact, he-raw.png for he-raw.jpg."""
    artifact = ARTIFACTS.get(name)
    if artifact is None or len(artifact.names) == 1:
        return None
    there = stage.find(artifact)  # two alternatives side by side are an error
    return there.name if there is not None and there.name != name else None


def maker(name: str) -> str | None:
    """The script that writes a file of this name; None for one that the user provides."""
    return ARTIFACTS[name].made_by if name in ARTIFACTS else None


def _decisive(options: list[str]) -> list[str]:
    """Options without the token, which decides no result."""
    return [o for i, o in enumerate(options) if "--login" not in options[max(0, i - 1) : i + 1]]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with disk.atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def code_hash(script: str) -> str:
    """Hash of the script, of utils.py, and of the rooms that the script stands on."""
    rooms = {"method", "reading", "writing", *Path(script).parts[:-1]}
    files = [ROOT / script, ROOT / "utils.py"]
    files += [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    return disk.hash_of({file for file in files if file.is_file()})


# ------------------------------------------------------------------------------------------------
# words
# ------------------------------------------------------------------------------------------------
def duplicates(names: Iterable[str]) -> list[str]:
    """What occurs more than once, in the order of the first time."""
    return [name for name, n in Counter(names).items() if n > 1]


def some(names: Collection) -> str:
    """The first five of a list, for a message."""
    shown = ", ".join(str(name) for name in list(names)[:5])
    return shown + (", ..." if len(names) > 5 else "")
