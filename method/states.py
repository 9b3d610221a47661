"""Trained states on disk: by what they are known, what a cut-off run left, what a run reuses.

A state is a folder with history.csv, held-out.npy, model.safetensors and model.json, which is
written last and holds the key: all that decided the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch

import utils
from method.network import Network
from method.section import Split
from writing import disk

LIBRARIES = Path(torch.__file__).parent.parent  # source files there are known by their version


@dataclass(frozen=True)
class State:
    """A trained network, its spots, and the counts (M, G) it predicts for the held-out ones."""

    network: Network
    split: Split
    predicted: np.ndarray


def held_out(states: list[State]) -> tuple[np.ndarray, np.ndarray]:
    """All held-out spots (M,), in order, and their predicted counts (M, G).

    A spot that two states hold out, as happens with more states than folds, is the first one's.
    """
    spots, first = np.unique(
        np.concatenate([state.split.held_out for state in states]), return_index=True
    )
    return spots, np.concatenate([state.predicted for state in states])[first]


def correlations(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Pearson r of every gene (G,) over the spots (M, G); NaN where it is not defined."""
    if len(predicted) < 3:
        return np.full(measured.shape[1], np.nan)
    a, b = (x.astype(np.float64) - x.mean(axis=0) for x in (predicted, measured))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))


def summarise(
    spots: pd.Index, usable: int, genes: list[str], held_out: np.ndarray, r: np.ndarray
) -> dict[str, Any]:
    """Print the closing table; return what the record keeps of it."""
    facts: dict[str, Any] = {"spots": len(spots), "genes": len(genes), "held_out_r_median": None}
    score = "none, the preset trains on all spots"
    if len(held_out):
        score = f"{len(held_out)} spots, too few or too constant for a correlation"
    if not np.isnan(r).all():
        low, median, high = (float(q) for q in np.nanpercentile(r, [10, 50, 90]))
        facts["held_out_r_median"] = round(median, 4)
        score = (
            f"{len(held_out)} spots, median r {median:.3f} (10 to 90 %: {low:.3f} to {high:.3f})"
        )
    of_all = f"{usable} of {len(spots)} with tissue" if usable < len(spots) else len(spots)
    print(f"  spots     {of_all}\n  genes     {len(genes)}\n  held out  {score}")
    print(f"  maps      {utils.MAPS.name}/, pictures in {utils.PLOTS.name}/")
    return facts | {"held_out_spots": [str(spots[i]) for i in held_out]}


# ------------------------------------------------------------------------------------------------
# the key
# ------------------------------------------------------------------------------------------------
def described(value: Any) -> Any:
    """A dataclass, function or class as JSON can hold it."""
    if isinstance(value, functools.partial):
        return [described(value.func), list(value.args), value.keywords]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: described(getattr(value, field.name)) for field in fields}
    return value.__qualname__ if callable(value) else value


def sources_of(value: Any) -> set[Path]:
    """The source files of the classes and functions in a dataclass, but those of libraries."""
    if isinstance(value, functools.partial):
        return sources_of(value.func)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        parts = list(inspect.getmro(value)) if isinstance(value, type) else []
        if inspect.isfunction(value):
            parts = [value]
        files = [Path(inspect.getfile(part)) for part in parts if part.__module__ != "builtins"]
        return {file for file in files if not file.is_relative_to(LIBRARIES)}
    return set().union(*map(sources_of, parts))


@dataclass(frozen=True)
class Key:
    """All that decides the weights of the states of a run."""

    training: dict[str, Any]
    inputs: dict[str, str]  # file name -> sha256
    code: dict[str, str]  # source file -> hash
    machine: dict[str, str]  # kind of device, version of torch

    @functools.cached_property
    def hash(self) -> str:
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def change_since(self, folder: Path) -> str | None:
        """What has changed since the state in a folder was trained, in words; None without one."""
        try:
            before = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(before, dict) or before.get("key") == self.hash:
            return None
        words = {
            "code": "the code has changed",
            "inputs": "inputs have changed",
            "training": "options or the preset have changed",
            "machine": "the device or torch has changed",
        }
        for part, text in words.items():
            old, new = before.get("decided_by", {}).get(part), getattr(self, part)
            if isinstance(old, dict) and old != new:
                names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
                return f"{text} ({', '.join(names)})"
        return "an earlier version of HISTEX trained the one that is there"


def key_of(
    training: Any, files: Iterable[Path], inputs: dict[str, Any], device: torch.device
) -> Key:
    """The key of the states of one run.

    ``training`` is a dataclass; ``files`` hold the code that trains, to which come those of the
    network and of whatever else the training names. ``inputs`` are fingerprints by file name.
    """
    paths = {file.resolve() for file in files} | {file.resolve() for file in sources_of(training)}
    return Key(
        # through JSON, since that is how the key of an earlier run comes back
        training=json.loads(json.dumps(described(training))),
        inputs={name: known["sha256"] for name, known in inputs.items()},
        code={
            name: disk.hash_of(path for path in paths if path.name == name)
            for name in sorted({path.name for path in paths})  # two files may be of one name
        },
        machine={"device": device.type, "torch": torch.__version__},
    )


# ------------------------------------------------------------------------------------------------
# files
# ------------------------------------------------------------------------------------------------
# On the disk while a state is trained, in copies of its weights: the present ones, their average,
# the best so far and two moments of the optimizer, in the old checkpoint and in the new one.
CHECKPOINT_COPIES = 10


def bytes_of(network: Network, n_states: int) -> int:
    """Bytes on the disk for states with such a network, and for the checkpoints of one."""
    weights = sum(value.numel() * value.element_size() for value in network.parameters())
    return (n_states + CHECKPOINT_COPIES) * weights


def files_of(n_states: int) -> list[str]:
    """Without which a run is not up to date, in the folder of the sample."""
    folders = [f"{utils.STATES.name}/{index:02d}" for index in range(n_states)]
    return [f"{place}/{file}" for place in folders for file in ("model.json", "model.safetensors")]


def make_folder(folder: Path) -> None:
    """Make the folder of a state, unless what is there leads to files elsewhere."""
    for place in (folder.parent, folder):
        if place.is_symlink():
            raise utils.StageError(
                f"{place} is a link to {place.resolve()}, whose files would be overwritten.",
                "Remove the link, then run the same command.",
            )
    folder.mkdir(parents=True, exist_ok=True)


class Checkpoint:
    """What a run has come to, saved now and then; only a run with the same key goes on from it."""

    def __init__(self, folder: Path, key: Key) -> None:
        make_folder(folder)
        self.path, self.key = folder / "checkpoint.pt", key

    def read(self) -> dict[str, Any] | None:
        """What was saved; on the CPU, from where it is copied to the device."""
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - damaged bytes can raise nearly anything
            print(
                f"{self.path.name} is not readable ({error!r:.100}); the state is trained from "
                f"its start"
            )
            return None
        return saved if isinstance(saved, dict) and saved.get("key") == self.key.hash else None

    def write(self, content: dict[str, Any]) -> None:
        saved = io.BytesIO()  # torch tells a full disk by an error that says nothing of it
        torch.save({"key": self.key.hash, **content}, saved)
        with disk.atomic(self.path) as partial:
            partial.write_bytes(saved.getbuffer())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_key(path: Path) -> str | None:
    """The hash of the key in model.json, or None if there is no such file or it is not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a finished state: it is trained


def read_state(
    folder: Path, key: Key, network: Network, shape: tuple[int, int]
) -> np.ndarray | None:
    """Load the weights of a finished state with the same key; return its held-out predictions.

    None if there is no such state, or if its files are damaged; then it is trained anew.
    """
    if read_key(folder / "model.json") != key.hash:
        return None
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        predicted = np.load(folder / "held-out.npy", allow_pickle=False)
        if predicted.shape != shape or weights.keys() != network.state_dict().keys():
            raise ValueError(f"tensors, or the shape {predicted.shape}, not of this network")
        network.load_state_dict(weights)  # last: training anew must start from the fresh network
    except Exception as error:  # noqa: BLE001 - damaged bytes can raise nearly anything
        print(f"the files in {folder.name} are damaged ({error!r:.100}); it is trained anew")
        return None
    return predicted


def write_state(
    folder: Path,
    network: Network,
    history: list[dict[str, float]],
    predicted: np.ndarray,
    key: Key,
    epoch: int,
) -> None:
    """Write a finished state; ``epoch`` is the one whose weights were kept."""
    (folder / "model.json").unlink(missing_ok=True)  # it vouches for the other files
    with disk.atomic(folder / "history.csv") as partial:
        pd.DataFrame(history).to_csv(partial, index=False, lineterminator="\n")
    with disk.atomic(folder / "held-out.npy") as partial:
        np.save(partial, predicted)
    with disk.atomic(folder / "model.safetensors") as partial:
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        partial.write_bytes(safetensors.torch.save(weights))  # save_file makes it private
    with disk.atomic(folder / "model.json") as partial:
        info = {"key": key.hash, "network": type(network).__name__, "epoch": epoch}
        info |= {"decided_by": dataclasses.asdict(key)}
        partial.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
