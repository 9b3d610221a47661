"""Weights of a network from a file that may come from anywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from utils import StageError
from writing import disk

# Of pytorch_model.bin in the repository MahmoodLab/UNI, as its users give it; UNI itself is gated
UNI_SHA256 = "56ef09b44a25dc5c7eedc55551b3d47bcd17659a7a33837cf9abc9ec4e2ffb40"


def known_sha256(path: Path, published: str, own: bool) -> str:
    """The sha256 of a file of weights, before it is read. Only the user's ``own`` may be another
    than the published one, which is said; what the hub gave may not."""
    found = disk.sha256(path) if path.is_file() else ""
    if found == published or not found:  # read_weights tells what is missing
        return found
    differs = f"has the sha256 {found}; that of the published weights is {published}"
    if not own:
        raise StageError(
            f"{path} {differs}: it was damaged, or replaced.",
            f"Remove it ({path.resolve()}) and run the same command, which downloads it again. Or "
            f"name a file that you trust: --weights FILE",
        )
    print(f"note: {path} {differs}; it is taken as your own")
    return found


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors or torch file; nothing in the file can run code."""
    remedy = "Give a file that holds the weights of --backbone and nothing else: --weights FILE"
    if not path.is_file():
        raise StageError(f"--weights {path} is not a file.", remedy)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen kinds on damaged bytes
        raise StageError(
            f"--weights {path} is cut off or damaged, or holds more than tensors, which is refused "
            f"because it could run code ({type(error).__name__}).",
            remedy,
        ) from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise StageError(f"--weights {path} does not hold tensors by name.", remedy)
    return weights


def load_strictly(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    def shape(of: dict[str, torch.Tensor], name: str) -> str:
        return str(tuple(of[name].shape)) if name in of else "absent"

    wanted = model.state_dict()
    differing = [
        f"\n  {name}: {shape(weights, name)}, expected {shape(wanted, name)}"
        for name in dict.fromkeys([*wanted, *weights])
        if shape(weights, name) != shape(wanted, name)
    ]
    if differing:
        raise StageError(
            f"{path} does not fit --backbone: {len(differing)} parameters differ, such as"
            + "".join(differing[:5]),
            "Give the weights of this backbone with --weights, or name theirs with --backbone.",
        )
    model.load_state_dict(weights, strict=True)
