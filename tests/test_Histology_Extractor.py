"""Tokens: right network and order, no seam, the same after a kill, clear words when it fails."""

import argparse
import contextlib
import copy
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import httpx2
import numpy as np
import pytest
import skimage.color
import skimage.data
import timm
import torch
import torch.nn.functional as nnf
from conftest import ROOT, draw_section, run, write_record
from huggingface_hub import constants, errors, get_token
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import Histology_Extractor as extractor
import utils
from Histology_Extractor import LITE, Tiling
from method import devices, tiling
from reading import cli, hub, images
from writing import disk

SCRIPT = utils.EXTRACTOR
TINY_UNI = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TOKEN = "hf_notarealtokenbutsecret"


def write_he(directory: Path, image: np.ndarray) -> Path:
    """he.png, which is lossless, with the record of its stage."""
    directory.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(directory / "he.png")
    write_record(directory, "image_calibration.py", inputs=[], outputs=["he.png"])
    return directory


def section(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return draw_section((rows, columns), seed)


def outputs(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.load(directory / utils.FEATURES.name),
        np.load(directory / utils.RGB.name),
    )


def record(directory: Path) -> dict:
    return json.loads((directory / utils.record_name(SCRIPT)).read_text())


@pytest.fixture(autouse=True)
def _no_token(monkeypatch, tmp_path_factory):
    """No test sees the tokens or the network of the machine it runs on."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.getbasetemp() / "none"))


@pytest.fixture
def tiny_uni(monkeypatch, tmp_path):
    """UNI's class with two narrow blocks, its weights in a file of UNI's format, and the model."""
    architecture = extractor.UNI_ARCHITECTURE | TINY_UNI
    monkeypatch.setattr(extractor, "UNI_ARCHITECTURE", architecture)
    torch.manual_seed(0)
    model = timm.create_model(**architecture).eval()
    with (
        torch.no_grad()
    ):  # trained blocks do something; at their first values they are the identity
        for block in model.blocks:
            block.ls1.gamma.fill_(1.0)
            block.ls2.gamma.fill_(1.0)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    return model, path


CPU = ("--device", "cpu")  # where numbers are compared with those of a CPU


def encoder(
    backbone, image, overlap=None, batch_size=None, tiling=None, precision="float32", turns=1
):
    if tiling is not None:
        backbone = extractor.replace(backbone, tiling=tiling)
    args = argparse.Namespace(
        batch_size=batch_size, overlap=overlap, precision=precision, turns=turns
    )
    h, w = (side // 16 for side in image.shape[:2])
    return extractor.Encoder(backbone, torch.device("cpu"), args, h, w)


def feature_map(tmp_path, backbone, image, **options):
    """The whole map, rows of tiles and all, without the stage around it."""
    runner = encoder(backbone, image, **options)
    path = tmp_path / "map.npy"
    numbers = range(len(runner.tiling.starts(runner.shape[0])))
    folder = tmp_path / f"{time.monotonic_ns()}.work"
    extractor.write_map(path, extractor.rows_of_tiles(image, runner, folder, numbers), runner)
    return np.load(path).astype(np.float32)


@pytest.fixture(scope="session")
def lite():
    return extractor.load_backbone(LITE, None, None)


# ----- UNI: architecture, transform, token order -----
def test_uni_architecture_is_vit_large_with_layer_scale():
    with torch.device("meta"):
        model = timm.create_model(**extractor.UNI_ARCHITECTURE)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(model.blocks) == 24
    assert shapes["pos_embed"] == (1, 197, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 16, 16)
    assert shapes["blocks.23.ls1.gamma"] == (1024,)
    assert shapes["blocks.0.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blocks.0.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["norm.weight"] == (1024,)
    assert not any(name.startswith("head") for name in shapes)
    assert model.blocks[0].attn.num_heads == 16
    assert sum(np.prod(shape) for shape in shapes.values()) == 303_350_784
    assert extractor.is_vit(model)


def test_uni_tokens_are_those_of_a_direct_forward_of_every_tile(tiny_uni, tmp_path):
    model, weights = tiny_uni
    image = section(448, 672)
    directory = write_he(tmp_path / "s", image)
    options = ["--weights", str(weights), "--overlap", "0", "--turns", "1", *CPU]
    assert run(SCRIPT, directory, *options) == 0
    tokens, _ = outputs(directory)
    assert tokens.shape == (28, 42, 32)
    assert tokens.dtype == np.float16

    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    mean = np.array([0.485, 0.456, 0.406])
    std = np.array([0.229, 0.224, 0.225])
    for row in range(2):
        for column in range(3):
            tile = image[row * 224 : (row + 1) * 224, column * 224 : (column + 1) * 224]
            x = torch.tensor(((tile / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
            with torch.inference_mode():
                model(x)
            expected = (
                seen[-1][0, 1:].reshape(14, 14, 32).numpy()
            )  # the first one is the class token
            got = tokens[row * 14 : (row + 1) * 14, column * 14 : (column + 1) * 14]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    facts = record(directory)
    assert facts["backbone"] == "uni"
    assert facts["weights_sha256"] == disk.sha256(weights)
    assert facts["feature_shape"] == [28, 42, 32]
    assert facts["overlap_tokens"] == 0
    assert facts["turns"] == 1


def test_a_changed_superpixel_changes_its_own_token_most(tiny_uni):
    _, weights = tiny_uni
    backbone = extractor.load_backbone("uni", weights, None)
    image = np.full((224, 224, 3), 180, np.uint8)
    changed = image.copy()
    changed[3 * 16 : 4 * 16, 9 * 16 : 10 * 16] = (90, 40, 120)
    runner = encoder(backbone, image)
    difference = np.abs(runner.row(changed).astype(float) - runner.row(image)).sum(2)
    assert np.unravel_index(difference.argmax(), difference.shape) == (3, 9)


def test_safetensors_and_torch_files_give_the_same_tokens(tiny_uni, tmp_path):
    model, weights = tiny_uni
    other = tmp_path / "model.safetensors"
    save_file(model.state_dict(), other)
    image = section(224, 448)
    maps = [
        feature_map(tmp_path, extractor.load_backbone("uni", path, None), image)
        for path in (weights, other)
    ]
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize(("name", "patch"), [("vit_tiny_patch16_224", 16), ("flexivit_small", 16)])
def test_other_vit_of_timm_from_a_file(name, patch, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")  # with a classifier, which is left out
    backbone = extractor.load_backbone(name, tmp_path / "w.pth", None)
    assert tuple(backbone.mean_std[0]) == tuple(timm.data.resolve_model_data_config(model)["mean"])
    x = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert extractor.tile_tokens(backbone.model, x).shape == (2, 14, 14, model.num_features)


def test_patches_of_another_size_are_brought_to_the_token_grid():
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, dynamic_img_size=True).eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        got = extractor.tile_tokens(model, x)
        fine = model.forward_features(x)[:, 1:].reshape(1, 14, 2, 14, 2, 192)
    torch.testing.assert_close(got, fine.mean((2, 4)), rtol=1e-5, atol=1e-5)


def test_patches_of_14_px_with_registers_are_brought_to_the_token_grid():
    """The class token and the registers are left out; every pixel of a superpixel counts once."""
    torch.manual_seed(0)
    options = {"patch_size": 14, "reg_tokens": 4, "dynamic_img_size": True, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        got = extractor.tile_tokens(model, x)
        fine = model.forward_features(x)[:, 5:].reshape(2, 16, 16, 192)
    pixels = fine.repeat_interleave(14, 1).repeat_interleave(14, 2)  # (2, 224, 224, 192)
    expected = pixels.reshape(2, 14, 16, 14, 16, 192).mean((2, 4))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_a_mean_by_area_is_that_of_pixels(h, w, rows, columns):
    fine = torch.rand(1, 2, h, w)
    pixels = fine.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    expected = pixels.reshape(1, 2, rows, h, columns, w).mean((3, 5))
    torch.testing.assert_close(extractor.mean_by_area(fine, (rows, columns)), expected)


def test_cnn_of_timm_from_a_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = extractor.load_backbone("resnet10t", tmp_path / "w.pth", None)
    with torch.inference_mode():
        tokens = extractor.tile_tokens(backbone.model, torch.rand(1, 3, 224, 448))
    assert tokens.shape == (1, 14, 28, 128 + 256)
    assert not backbone.stains


# ----- ways up -----
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_token_is_the_mean_over_the_ways_up(turns, tiny_uni, tmp_path):
    """Against whole sections that were turned as pictures, each extracted in one way up."""
    image = section(224, 448)
    for name, weights in ((LITE, None), ("uni", tiny_uni[1])):
        backbone = extractor.load_backbone(name, weights, None)
        alone = []
        for quarters in range(0, 4, 4 // turns):
            turned = np.ascontiguousarray(np.rot90(image, quarters))
            alone.append(np.rot90(feature_map(tmp_path, backbone, turned, overlap=0), -quarters))
        got = feature_map(tmp_path, backbone, image, overlap=0, turns=turns)
        np.testing.assert_allclose(got, np.mean(alone, axis=0), rtol=2e-3, atol=5e-3)


def test_a_turned_section_has_the_same_tokens_turned(lite, tmp_path):
    image = section(224, 448)
    upright = feature_map(tmp_path, lite, image, turns=4)
    for quarters in (1, 2, 3):
        turned = np.ascontiguousarray(np.rot90(image, quarters))
        back = np.rot90(feature_map(tmp_path, lite, turned, turns=4), -quarters)
        np.testing.assert_allclose(back, upright, rtol=2e-3, atol=5e-3)
    once = feature_map(tmp_path, lite, image)
    over = np.rot90(feature_map(tmp_path, lite, np.ascontiguousarray(image[::-1, ::-1])), 2)
    assert np.abs(once - over)[..., :152].max() > 0.1  # without turns they differ


def started_over(tiny_uni, tmp_path, monkeypatch, *other):
    """Tokens and records with other options, which find rows of the usual ones, and with these."""
    options = ["--weights", str(tiny_uni[1]), *CPU]
    directory = write_he(tmp_path / "s", section(448, 224))
    folder = interrupted(monkeypatch, directory, *options)
    for row in folder.iterdir():
        np.save(row, np.ones_like(np.load(row)))  # would be seen if it were used
    assert run(SCRIPT, directory, *options, *other) == 0
    first = outputs(directory)[0].astype(float), record(directory)
    for row in folder.iterdir():
        row.unlink()
    assert run(SCRIPT, directory, *options) == 0
    return first, (outputs(directory)[0].astype(float), record(directory))


def test_other_turns_start_over_and_are_recorded(tiny_uni, tmp_path, monkeypatch):
    once, four = started_over(tiny_uni, tmp_path, monkeypatch, "--turns", "1")
    assert (once[1]["turns"], four[1]["turns"]) == (1, 4)
    assert np.corrcoef(once[0].ravel(), four[0].ravel())[0, 1] > 0.5
    assert not np.array_equal(once[0], four[0])


# ----- the embedded network -----
def raw_lite() -> OrderedDict:
    return torch.load(extractor.embedded_weights(), weights_only=True)


def same_conv(x, weight, stride, groups=1):
    """Convolution with TensorFlow's SAME padding, written from its definition."""
    size, pads = weight.shape[-1], []
    for length in (x.shape[-1], x.shape[-2]):
        need = max((-(-length // stride) - 1) * stride + size - length, 0)
        pads += [need // 2, need - need // 2]
    return torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, pads), weight, stride=stride, groups=groups
    )


def lite_reference(x: torch.Tensor) -> list[torch.Tensor]:
    """EfficientNet-lite0 up to stride 16 from the raw keys, without timm: [40 ch, 112 ch]."""
    raw = raw_lite()

    def norm(x, name):
        shape = (1, -1, 1, 1)
        mean, var = raw[f"{name}.running_mean"], raw[f"{name}.running_var"]
        scale = raw[f"{name}.weight"] / torch.sqrt(var + 1e-3)  # TensorFlow's epsilon
        return (x - mean.view(shape)) * scale.view(shape) + raw[f"{name}.bias"].view(shape)

    def relu6(x):
        return x.clamp(0, 6)

    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]  # of blocks 0..10 of EfficientNet-B0 without SE
    maps = []
    x = relu6(norm(same_conv(x, raw["_conv_stem.weight"], 2), "_bn0"))
    for number, stride in enumerate(strides):
        block, y = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in raw:
            y = relu6(norm(same_conv(y, raw[f"{block}._expand_conv.weight"], 1), f"{block}._bn0"))
        weight = raw[f"{block}._depthwise_conv.weight"]
        y = relu6(norm(same_conv(y, weight, stride, groups=len(weight)), f"{block}._bn1"))
        y = norm(same_conv(y, raw[f"{block}._project_conv.weight"], 1), f"{block}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
        if number in (4, 10):
            maps.append(x)
    return maps


def test_lite_tokens_equal_a_forward_written_from_the_raw_keys(lite):
    image = section(224, 448)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        fine, coarse = lite_reference(x)
        fine = fine.reshape(1, 40, 14, 2, 28, 2).mean((3, 5))
        expected = torch.cat([fine, coarse], 1)[0].permute(1, 2, 0).numpy()
    tokens = encoder(lite, image).row(image)
    assert tokens.shape == (14, 28, 158)
    np.testing.assert_allclose(tokens[..., :152], expected, rtol=2e-3, atol=5e-3)


def test_lite_keys_are_renamed_to_the_same_layer():
    model = timm.create_model("tf_efficientnet_lite0")
    raw = raw_lite()
    renamed = extractor.rename_lite(raw, model)
    model.load_state_dict(renamed, strict=True)
    blocks = [f"blocks.{s}.{b}." for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    for old, new in zip(raw, renamed, strict=True):
        assert old.rsplit(".", 1)[1] == new.rsplit(".", 1)[1]  # weight, bias, running_mean, ...
        assert old.startswith("_blocks") == new.startswith("blocks")
        if old.startswith("_blocks"):
            assert new.startswith(blocks[int(old.split(".")[1])])
        assert ("_bn" in old) == ("bn" in new)
        assert ("depthwise" in old) == ("conv_dw" in new)
        assert ("_expand" in old) <= new.endswith("conv_pw.weight")


def test_lite_knows_a_cat():
    """The classifier, which the tokens do not use, proves the weights: 281..285 are cats."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(extractor.rename_lite(raw_lite(), model), strict=True)
    cat = Image.fromarray(skimage.data.chelsea()[:, 75:375]).resize((224, 224))
    x = torch.tensor(np.asarray(cat)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        chances = model(x).softmax(1)[0]
    assert float(chances[281:286].sum()) > 0.7


def test_an_altered_embedded_file_is_refused(monkeypatch):
    monkeypatch.setattr(extractor, "LITE_SHA256", "0" * 64)
    with pytest.raises(utils.StageError, match="pip install --force-reinstall"):
        extractor.embedded_weights()


def test_stain_statistics_equal_skimage():
    image = section(64, 96)
    image[:16, :16] = 0
    stains = skimage.color.rgb2hed(image).reshape(4, 16, 6, 16, 3)
    expected = np.concatenate([stains.mean((1, 3)), stains.std((1, 3))], 2)
    np.testing.assert_allclose(extractor.stain_statistics(image), expected, rtol=1e-4, atol=1e-5)
    plain = np.full((16, 16, 3), 200, np.uint8)
    assert extractor.stain_statistics(plain)[0, 0, 3:].max() < 1e-6


def test_mean_colours_equal_brute_force():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 80, 3), np.uint8)
    got = extractor.mean_colours(image)
    for row in range(3):
        for column in range(5):
            cell = image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            expected = np.floor(cell.reshape(-1, 3).mean(0) + 0.5)
            np.testing.assert_array_equal(got[row, column], expected)


# ----- tiles and seams -----
@given(st.integers(1, 300), st.integers(2, 60), st.floats(0, 0.95), st.booleans())
def test_tiles_cover_the_image_and_shares_add_up_to_one(extent, tile, share, blend):
    tiling = Tiling(tile, int(share * tile), blend)
    starts, shares = tiling.starts(extent), tiling.shares(extent)
    total = np.zeros(extent)
    for start, part in zip(starts, shares, strict=True):
        assert len(part) == tiling.side(extent) <= min(tile, extent)
        assert len(part) == min(tile, extent) or not blend
        assert (part >= 0).all()
        total[start : start + len(part)] += part
    assert starts[0] == 0
    assert starts[-1] == extent - tiling.side(extent)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    for start, following in itertools.pairwise(starts):
        assert start < following <= start + tiling.side(extent) - tiling.overlap


def cost(tiling: Tiling, extent: int) -> float:
    """Tokens that are computed, over those of a square image."""
    return (len(tiling.starts(extent)) * tiling.side(extent) / extent) ** 2


def test_overlap_costs_less_than_a_fifth():
    sides = range(14, 65_500 // 16, 14)  # of all images that he.jpg can hold
    assert max(cost(extractor.CNN_TILING, side) for side in sides) < 1.2
    slides = range(42 * 14, 65_500 // 16, 14)  # 4.7 mm and more; below, each tile more counts
    assert max(cost(extractor.VIT_TILING, side) for side in slides) < 1.2
    assert cost(extractor.VIT_TILING, 1372) == pytest.approx((106 / 98) ** 2)


def test_tiles_of_a_cnn_are_no_longer_than_needed_and_those_of_a_vit_as_trained():
    assert Tiling(10, 2, False).side(8) == 8
    assert Tiling(10, 2, False).starts(11) == [0, 4]  # two tiles of 7, not of 10
    assert Tiling(10, 2, False).side(11) == 7
    assert Tiling(10, 2, True).side(11) == 10
    assert Tiling(10, 2, True).starts(11) == [0, 1]


def test_shares_without_overlap_are_the_224_px_grid():
    tiling = Tiling(14, 0, True)
    assert tiling.starts(56) == [0, 14, 28, 42]
    assert all((part == 1).all() for part in tiling.shares(56))


def test_lite_in_tiles_equals_one_pass_over_the_whole_image(lite, tmp_path):
    image = section(896, 448)
    whole = feature_map(tmp_path, lite, image)  # 56 x 28 tokens: one tile
    tiled = feature_map(tmp_path, lite, image, tiling=Tiling(40, 22, False))
    np.testing.assert_allclose(tiled, whole, rtol=2e-3, atol=2e-2)
    trimmed = feature_map(tmp_path, lite, image, tiling=Tiling(40, 10, False))
    error = np.sqrt((((trimmed - whole) / whole.std((0, 1))) ** 2).mean())
    assert 0 < error < 0.03


def test_rows_of_tiles_are_blended_as_their_shares_say(lite, tmp_path):
    image = section(672, 224)
    runner = encoder(lite, image, tiling=Tiling(14, 5, True))
    starts, shares = runner.tiling.starts(42), runner.tiling.shares(42)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(len(starts), 14, *runner.shape[1:])).astype(np.float16)
    colours = rng.integers(0, 256, (42, 14, 3), np.uint8)
    given = ((row, colours[start : start + 14]) for start, row in zip(starts, rows, strict=True))
    got = extractor.write_map(tmp_path / "map.npy", given, runner)
    expected = np.zeros(runner.shape)
    for start, share, row in zip(starts, shares, rows, strict=True):
        expected[start : start + 14] += share[:, None, None] * row.astype(float)
    np.testing.assert_array_equal(got, colours)
    tokens = np.load(tmp_path / "map.npy", mmap_mode="r")
    np.testing.assert_allclose(tokens, expected, atol=2e-3)
    np.save(tmp_path / "numpy.npy", tokens)
    assert (tmp_path / "map.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


class Recorded:
    """An image that notes which rows are asked for."""

    def __init__(self, image: np.ndarray) -> None:
        self.image, self.shape, self.asked = image, image.shape, []

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.asked.append((rows.start, rows.stop))
        return self.image[rows]


def test_bands_are_read_in_turn_some_rows_at_a_time():
    image = Recorded(np.arange(640 * 3, dtype=np.uint8).reshape(640, 1, 3))
    got = extractor.bands(image, [0, 10, 22], 18)  # tokens
    first = next(got)
    np.testing.assert_array_equal(first, image.image[:288])
    rest = list(got)
    np.testing.assert_array_equal(rest[0], image.image[160:448])
    np.testing.assert_array_equal(rest[1], image.image[352:640])
    assert image.asked == [(0, 224), (224, 288), (288, 448), (448, 640)]  # none of them twice
    assert len(list(extractor.bands(image, [0, 22], 18))) == 2
    assert image.asked[4:] == [(0, 224), (224, 288), (352, 576), (576, 640)]  # of one rank of two
    assert list(extractor.bands(image, [], 18)) == []


def test_an_image_that_cannot_be_read_stops_the_run(tmp_path, monkeypatch, capsys):
    directory = write_he(tmp_path / "s", section(448, 224))
    path = directory / "he.png"

    def damaged(self, rows):
        raise self.stage.error(path, "is not a whole image")

    monkeypatch.setattr(images.ImageRows, "__getitem__", damaged)
    assert run(SCRIPT, directory, "--backbone", LITE) == 2
    assert "he.png is not a whole image" in capsys.readouterr().err
    assert not (directory / utils.FEATURES.name).exists()


def test_a_jpeg_read_in_rows_gives_the_tokens_of_its_pixels(tmp_path):
    maps, pixels = [], section(448, 672)
    for name in ("he.jpg", "he.png"):
        directory = tmp_path / name
        directory.mkdir()
        Image.fromarray(pixels).save(
            directory / name, quality=95, subsampling="4:4:4", restart_marker_rows=1
        )
        with Image.open(directory / name) as image:
            pixels = np.asarray(image)
        write_record(directory, "image_calibration.py", inputs=[], outputs=[name])
        assert run(SCRIPT, directory, "--backbone", LITE) == 0
        maps.append(outputs(directory))
    np.testing.assert_array_equal(maps[0][0], maps[1][0])
    np.testing.assert_array_equal(maps[0][1], maps[1][1])


def border_ratio(tokens: np.ndarray, borders: list[int]) -> float:
    """Mean |difference| of neighbouring tokens across vertical borders, over that elsewhere."""
    step = np.abs(np.diff(tokens, axis=1)).mean((0, 2))
    across = np.isin(np.arange(len(step)), [border - 1 for border in borders])
    return step[across].mean() / step[~across].mean()


def test_overlap_takes_the_seam_away(lite, tmp_path):
    image = section(224, 1120, seed=3)
    borders = [14, 28, 42, 56]
    whole, side_by_side, blended = (
        feature_map(tmp_path, lite, image, tiling=tiling)[..., :152]
        for tiling in (Tiling(70, 0, False), Tiling(14, 0, True), Tiling(14, 2, True))
    )
    scale = whole.std((0, 1))
    base = border_ratio(whole / scale, borders)
    assert border_ratio(side_by_side / scale, borders) > 1.1 * base
    starts = Tiling(14, 2, True).starts(70)
    assert border_ratio(blended / scale, starts[1:]) < 1.05 * border_ratio(
        whole / scale, starts[1:]
    )


def test_tokens_do_not_depend_on_the_batch_size(tiny_uni, tmp_path):
    backbone = extractor.load_backbone("uni", tiny_uni[1], None)
    image = section(224, 896)
    maps = [feature_map(tmp_path, backbone, image, batch_size=size) for size in (1, 3, 32)]
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], atol=5e-3)


def test_blank_tiles_are_not_run(tiny_uni, tmp_path, capsys):
    model, weights = tiny_uni
    image = np.full((448, 672, 3), 255, np.uint8)
    image[:224, :224] = section(224, 224)
    image[300, 500] = 251  # noise of a JPEG
    directory = write_he(tmp_path / "s", image)
    assert run(SCRIPT, directory, "--weights", str(weights), "--overlap", "0", *CPU) == 0
    assert "tiles: 1 in" in (shown := capsys.readouterr().out)
    assert "5 blank tiles" in shown
    tokens, _ = outputs(directory)
    white = torch.from_numpy((np.ones(3) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    with torch.inference_mode():
        x = white.float().view(1, 3, 1, 1).expand(1, 3, 224, 224)
        once = model.forward_features(x)[0, 1:].reshape(14, 14, 32)
    expected = torch.stack([torch.rot90(once, n) for n in range(4)]).mean(dim=0)  # the four ways up
    for row, column in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        got = tokens[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_a_nearly_white_tile_is_run(lite):
    image = np.full((224, 224, 3), 255, np.uint8)
    image[100, 100, 1] = extractor.BLANK_LEVEL - 1
    runner = encoder(lite, image)
    runner.row(image)
    assert (runner.tiles, runner.blank_tiles) == (1, 0)


# ----- memory -----
def starve(monkeypatch, most: int):
    """Let the network fail like CUDA on more than ``most`` tiles at once."""
    genuine, sizes = extractor.tile_tokens, []

    def limited(model, x):
        sizes.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return genuine(model, x)

    monkeypatch.setattr(extractor, "tile_tokens", limited)
    return sizes


def test_batches_are_halved_when_memory_runs_out(tiny_uni, tmp_path, monkeypatch, capsys):
    backbone = extractor.load_backbone("uni", tiny_uni[1], None)
    image = section(224, 1344)
    plain = feature_map(tmp_path, backbone, image, overlap=0)
    sizes = starve(monkeypatch, most=2)
    starved = feature_map(tmp_path, backbone, image, overlap=0, batch_size=8)
    np.testing.assert_allclose(starved, plain, atol=5e-3)
    assert sizes == [1, 6, 4, 2, 2, 2]
    assert "--batch-size 2" in capsys.readouterr().err


def test_one_tile_that_does_not_fit_is_said(tiny_uni, tmp_path, monkeypatch, capsys):
    directory = write_he(tmp_path / "s", section(224, 448))
    starve(monkeypatch, most=0)
    assert run(SCRIPT, directory, "--weights", str(tiny_uni[1])) == 2
    assert "--batch-size 1" in capsys.readouterr().err


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(tiny_uni, tmp_path, monkeypatch):
    def broken(model, x):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(extractor, "tile_tokens", broken)
    backbone = extractor.load_backbone("uni", tiny_uni[1], None)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        encoder(backbone, section(224, 224))


# ----- kills and resumption -----
def rows_folders(directory: Path) -> list[Path]:
    return sorted(directory.glob(".Histology_feature_map.*.work"))


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


KILLED = """
import os, signal, sys
import Histology_Extractor as extractor
extractor.CNN_TILING = extractor.Tiling(42, 10, False)
genuine, saved = extractor.save_row, []
def save_row(path, row):
    genuine(path, row)
    saved.append(path)
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
extractor.save_row = save_row
sys.exit(extractor.run(sys.argv[1:]))
"""


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(extractor, "CNN_TILING", Tiling(42, 10, False))
    image = section(1792, 224)
    whole, killed = (write_he(tmp_path / name, image) for name in ("whole", "killed"))
    options = ["--backbone", LITE]
    assert run(SCRIPT, whole, *options) == 0
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "--directory", str(killed), *options],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (killed / utils.FEATURES.name).exists()
    (folder,) = rows_folders(killed)
    assert sorted(path.name for path in folder.iterdir()) == ["row_0000.npy", "row_0001.npy"]

    computed = []
    genuine = extractor.Encoder.row
    monkeypatch.setattr(
        extractor.Encoder, "row", lambda self, image: computed.append(1) or genuine(self, image)
    )
    assert run(SCRIPT, killed, *options) == 0
    assert len(computed) == len(extractor.CNN_TILING.starts(112)) - 2
    for name in (utils.FEATURES.name, utils.RGB.name):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not rows_folders(killed)


def interrupted(monkeypatch, directory, *options) -> Path:
    """Run until the map would be finished, and give the folder of rows."""
    with monkeypatch.context() as patch:
        patch.setattr(extractor, "facts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(SCRIPT, directory, *options)
    (folder,) = rows_folders(directory)
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "dtype", "pickle", "nan"])
def test_a_damaged_row_is_computed_again(damage, tiny_uni, tmp_path, monkeypatch):
    options = ["--weights", str(tiny_uni[1])]
    image = section(448, 224)
    whole, directory = (write_he(tmp_path / name, image) for name in ("whole", "damaged"))
    assert run(SCRIPT, whole, *options) == 0
    row = interrupted(monkeypatch, directory, *options) / "row_0001.npy"
    good = np.load(row)
    if damage == "cut":
        row.write_bytes(row.read_bytes()[:-100])
    elif damage == "empty":
        row.write_bytes(b"")
    elif damage == "pickle":
        np.save(row, np.array([{}], object), allow_pickle=True)
    else:
        bad = {"shape": good[:-1], "dtype": good.astype(np.float32) + 1, "nan": good * np.nan}
        np.save(row, bad[damage])
    assert run(SCRIPT, directory, *options) == 0
    np.testing.assert_array_equal(outputs(directory)[0], outputs(whole)[0])
    assert not leftovers(directory)


def test_rows_of_another_computation_are_not_used(tiny_uni, tmp_path, monkeypatch):
    options = ["--weights", str(tiny_uni[1])]
    directory = write_he(tmp_path / "s", section(448, 224))
    folder = interrupted(monkeypatch, directory, *options)
    for row in folder.iterdir():
        np.save(row, np.ones_like(np.load(row)))  # would be seen if it were used
    assert run(SCRIPT, directory, *options, "--overlap", "3") == 0
    assert outputs(directory)[0].std() > 0.1
    assert folder.is_dir()  # a run that goes on elsewhere may still need it
    write_he(directory, section(448, 224, seed=1))
    hour_ago = time.time() - 2 * disk.STALE_PARTIAL_SECONDS
    os.utime(folder, (hour_ago, hour_ago))
    assert run(SCRIPT, directory, *options) == 0
    assert outputs(directory)[0].std() > 0.1
    assert not leftovers(directory)
    folder.mkdir()  # by a run with --force that was cut off
    assert run(SCRIPT, directory, *options) == 0
    assert folder.is_dir()
    os.utime(folder, (hour_ago, hour_ago))
    assert run(SCRIPT, directory, *options) == 0  # up to date
    assert not leftovers(directory)


def test_a_folder_that_another_run_removes_is_no_harm(tiny_uni, tmp_path, monkeypatch):
    """Two runs at once: the one that ends first takes the rows away under the other."""
    options = ["--weights", str(tiny_uni[1])]
    image = section(672, 224)
    whole, directory = (write_he(tmp_path / name, image) for name in ("whole", "robbed"))
    assert run(SCRIPT, whole, *options) == 0
    genuine = extractor.save_row

    def robbed(path, row):
        genuine(path, row)
        extractor.shutil.rmtree(path.parent)

    monkeypatch.setattr(extractor, "save_row", robbed)
    assert run(SCRIPT, directory, *options) == 0
    np.testing.assert_array_equal(outputs(directory)[0], outputs(whole)[0])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *args, **kwargs: None)  # gone between mkdir and write
        genuine(tmp_path / "gone.work" / "row_0000.npy", np.zeros(3))


def test_rerun_gives_the_same_bytes(tmp_path):
    directory = write_he(tmp_path / "s", section(224, 448))
    assert run(SCRIPT, directory, "--backbone", LITE) == 0
    first = (directory / utils.FEATURES.name).read_bytes()
    assert run(SCRIPT, directory, "--backbone", LITE) == 0
    assert (directory / utils.FEATURES.name).read_bytes() == first


def test_lack_of_space_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    directory = write_he(tmp_path / "s", section(224, 224))
    free = utils.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: free)
    assert run(SCRIPT, directory, "--backbone", LITE) == 2
    assert "free" in capsys.readouterr().err
    assert not leftovers(directory)


def test_the_size_of_the_map_is_said_and_rows_on_the_disk_need_no_more_space(
    tiny_uni, tmp_path, monkeypatch, capsys
):
    options = ["--weights", str(tiny_uni[1])]
    directory = write_he(tmp_path / "s", section(448, 224))
    interrupted(monkeypatch, directory, *options)
    assert "Histology_feature_map.npy: 28 x 14 x 32 float16, 25 kB" in capsys.readouterr().out
    free = utils.shutil.disk_usage(tmp_path)
    for bytes_free, code in ((28 * 14 * 32 * 2 - 1000, 2), (28 * 14 * 32 * 2, 0)):
        usage = free._replace(free=bytes_free)
        monkeypatch.setattr(utils.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert run(SCRIPT, directory, *options) == code


# ----- what the user can put right -----
class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def bad_weights(kind: str, model, folder: Path) -> Path:
    path = folder / ("w.safetensors" if kind == "cut safetensors" else "w.bin")
    state = model.state_dict()
    if kind == "malicious":
        torch.save({"weights": Canary(folder / "canary")}, path)
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "cut safetensors":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no tensors":
        torch.save([1, 2], path)
    elif kind == "other network":
        other = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        torch.save(other.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "is not a file"),
        ("malicious", "could run code"),
        ("cut", "cut off or damaged"),
        ("cut safetensors", "cut off or damaged"),
        ("empty", "cut off or damaged"),
        ("no tensors", "does not hold tensors by name"),
        ("other network", "does not fit --backbone"),
    ],
)
def test_bad_weights_stop_with_the_old_map_untouched(kind, said, tiny_uni, tmp_path, capsys):
    model, good = tiny_uni
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--weights", str(good)) == 0
    before = {path: path.read_bytes() for path in directory.iterdir()}
    capsys.readouterr()
    path = bad_weights(kind, model, tmp_path)
    assert run(SCRIPT, directory, "--weights", str(path)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert str(path) in shown
    assert "--weights" in shown
    assert not (tmp_path / "canary").exists()
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_weights_of_another_network_show_the_first_five_differences(tiny_uni, tmp_path, capsys):
    directory = write_he(tmp_path / "s", section(224, 224))
    path = bad_weights("other network", tiny_uni[0], tmp_path)
    assert run(SCRIPT, directory, "--weights", str(path)) == 2
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("  ")]
    assert len(lines) == 5
    assert lines[0] == "  cls_token: (1, 1, 192), expected (1, 1, 32)"
    assert "  absent, expected" not in shown


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", f"https://hub/?token={TOKEN}"))


def offline_within() -> Exception:
    error = errors.LocalEntryNotFoundError("no")
    error.__cause__ = errors.OfflineModeIsEnabled("no")
    return error


HUB_FAILURES = [
    ("no access", errors.GatedRepoError("no", response=response(403)), True,
     "the account of your token has no access", "Ask for access at https://huggingface.co/MahmoodLab"),
    ("no token", errors.GatedRepoError("no", response=response(401)), False,
     "no token was given", "set HF_TOKEN"),
    ("wrong token", errors.HfHubHTTPError("no", response=response(401)), True,
     "the token is wrong or has expired", "settings/tokens"),
    ("unseen", errors.RepositoryNotFoundError("no", response=response(404)), True,
     "is not on the hub", "Correct the name"),
    ("server", errors.HfHubHTTPError("no", response=response(503)), True,
     "the hub answered 503", "Try again later"),
    ("no network", errors.LocalEntryNotFoundError("no"), True,
     "the hub cannot be reached", "Connect this machine"),
    ("cut connection", httpx2.ReadTimeout(f"at {TOKEN}"), True,
     "the hub cannot be reached", "Connect this machine"),
    ("offline", errors.OfflineModeIsEnabled("no"), False,
     "HF_HUB_OFFLINE forbids", "Unset HF_HUB_OFFLINE"),
    ("offline, wrapped", offline_within(), False,
     "HF_HUB_OFFLINE forbids", "Unset HF_HUB_OFFLINE"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "with_token", "said", "remedy"),
    [case[1:] for case in HUB_FAILURES], ids=[case[0] for case in HUB_FAILURES],
)  # fmt: skip
@pytest.mark.parametrize("way", ["login", "environment"])
def test_each_failure_of_the_hub_has_its_own_message(
    way, failure, with_token, said, remedy, tmp_path, monkeypatch, capsys
):
    asked = []

    def download(repository, name, token=None, local_files_only=False):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        asked.append((repository, name, token))
        raise failure

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    directory = write_he(tmp_path / "s", section(224, 224))
    options = ["--login", TOKEN] if with_token and way == "login" else ["--login", "***"]
    if with_token and way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(SCRIPT, directory, *options) == 2
    shown = capsys.readouterr()
    assert asked == [("MahmoodLab/UNI", "pytorch_model.bin", TOKEN if with_token else None)]
    assert said in shown.err
    assert remedy in shown.err
    assert "--weights FILE" in shown.err
    assert f"--backbone {LITE}" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert ("HF_TOKEN is safer" in shown.err) == (with_token and way == "login")
    assert sorted(path.name for path in directory.iterdir()) == ["he.png", "image_calibration.json"]


@pytest.fixture
def closed_hub(tmp_path, monkeypatch):
    """A hub of whose port nobody listens, and an empty cache; yields a socket to listen with."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "unreachable", False)
        yield unheard


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_without_a_network_one_message_comes_soon(silent, closed_hub, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    if silent:  # it takes the connection and never answers
        closed_hub.listen()
    started = time.monotonic()
    with pytest.raises(utils.StageError, match="the hub cannot be reached: no internet"):
        hub.check_uni(None)
    assert time.monotonic() - started < 2  # the hub's own retries take 23 s
    hub.check_others()
    assert constants.HF_HUB_OFFLINE
    told = str(hub.hub_error(errors.OfflineModeIsEnabled("no"), "resnet10t", False))
    assert "resnet10t is not in the hub's local cache, and the hub cannot be reached" in told


@pytest.mark.parametrize(("status", "said"), [(401, "no token was given"), (503, None)])
def test_the_hub_is_asked_before_slow_imports(status, said, closed_hub, monkeypatch):
    """What waiting may mend is left to the download, which tries again."""
    kind = errors.GatedRepoError if status == 401 else errors.HfHubHTTPError
    failure = kind("no", response=response(status))
    asked = []

    def look(url, token, timeout):
        asked.append(url)
        raise failure

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", look)
    with contextlib.nullcontext() if said is None else pytest.raises(utils.StageError, match=said):
        hub.check_uni(None)
    hub.check_others()
    assert not constants.HF_HUB_OFFLINE
    assert len(asked) == 2
    assert asked[0].endswith("/MahmoodLab/UNI/resolve/main/pytorch_model.bin")


def test_a_lack_of_network_is_told_before_torch_is_imported(tmp_path):
    directory = write_he(tmp_path / "s", section(224, 224))
    code = f"""
import runpy, sys
sys.argv = ["{SCRIPT}", "--directory", {str(directory)!r}]
try:
    runpy.run_path({str(extractor.__file__)!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    hidden = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    command, env = [sys.executable, "-c", code], {**os.environ, **hidden}
    env.pop("HF_HUB_OFFLINE", None)
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: MahmoodLab/UNI is not in the hub's local cache")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("name", ["resnet10t", "hf-hub:MahmoodLab/UNI2-h"])
def test_other_networks_get_the_token_and_explain_the_hub(name, tmp_path, monkeypatch, capsys):
    tokens = []

    def create_model(*args, **kwargs):
        tokens.append(get_token())
        raise errors.GatedRepoError("no", response=response(403))

    monkeypatch.setattr("timm.create_model", create_model)
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--backbone", name, "--login", TOKEN) == 2
    shown = capsys.readouterr()
    assert tokens == [TOKEN]
    assert f"{name.removeprefix('hf-hub:')} is gated" in shown.err
    assert TOKEN not in shown.out + shown.err


def test_a_full_disk_is_not_called_a_lack_of_network(tmp_path, monkeypatch, capsys):
    def download(*args, local_files_only=False, **kwargs):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        raise OSError(28, "No space left on device", "blob")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory) == 2
    assert "No space left" in capsys.readouterr().err


def test_cached_weights_need_neither_token_nor_network(tiny_uni, tmp_path, monkeypatch, capsys):
    def download(repository, name, token=None, local_files_only=False):
        assert local_files_only
        return str(tiny_uni[1])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(extractor, "UNI_SHA256", disk.sha256(tiny_uni[1]))
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--login", TOKEN) == 0
    shown = capsys.readouterr()
    assert "sha256" not in shown.out
    written = (directory / utils.record_name(SCRIPT)).read_text()
    assert TOKEN not in shown.out + shown.err + written
    assert record(directory)["arguments"]["login"] == "***"


def test_what_the_hub_gave_must_be_the_published_file(tiny_uni, tmp_path, monkeypatch, capsys):
    """Before anything of it is read; a file of the user's is another by right, which is said."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tiny_uni[1]))
    directory = write_he(tmp_path / "s", section(224, 224))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
        assert run(SCRIPT, directory) == 2
    found = disk.sha256(tiny_uni[1])
    said = capsys.readouterr().err
    assert (
        f"has the sha256 {found}; that of the published weights is {extractor.UNI_SHA256}" in said
    )
    assert f"Remove it ({tiny_uni[1]})" in said
    assert run(SCRIPT, directory, "--weights", str(tiny_uni[1])) == 0
    assert f"note: {tiny_uni[1]} has the sha256 {found}" in capsys.readouterr().out
    assert record(directory)["weights_sha256"] == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--overlap", "-1"], "--overlap is -1"),
        (["--overlap", "128"], "--overlap is 128"),
        (["--weights", "x.pth"], "brings its own weights"),
        (["--precision", "tf32", "--device", "cpu"], "--precision tf32 is not for cpu"),
        (["--backbone", "no_such_network"], "Unknown model"),
        (
            ["--backbone", "swin_tiny_patch4_window7_224", "--weights", "x"],
            "neither a ViT nor a CNN",
        ),
    ],
)
def test_bad_options(options, said, tmp_path, capsys):
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--backbone", LITE, *options) == 2
    assert said in capsys.readouterr().err
    assert not (directory / utils.FEATURES.name).exists()


def test_an_image_that_is_not_whole_tiles_is_refused(tmp_path, capsys):
    directory = write_he(tmp_path / "s", section(224, 240))
    assert run(SCRIPT, directory, "--backbone", LITE) == 2
    shown = capsys.readouterr().err
    assert "is 240 x 224 px; both sides must be multiples of 224 px" in shown
    assert "image_calibration.py --directory" in shown


def test_a_map_edited_by_hand_is_kept_unless_forced(tmp_path, capsys):
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--backbone", LITE) == 0
    edited = np.zeros((14, 14, 158), np.float16)
    np.save(directory / utils.FEATURES.name, edited)
    assert run(SCRIPT, directory, "--backbone", LITE) == 0
    assert "kept your Histology_feature_map.npy" in capsys.readouterr().out
    assert run(SCRIPT, directory, "--backbone", LITE, "--overlap", "3") == 2
    assert "--force" in capsys.readouterr().err
    assert not outputs(directory)[0].any()
    assert run(SCRIPT, directory, "--backbone", LITE, "--force") == 0
    assert outputs(directory)[0].any()


def test_tokens_that_are_not_finite_are_refused(tiny_uni, tmp_path, capsys):
    model, weights = tiny_uni
    state = model.state_dict()
    state["norm.bias"] = state["norm.bias"] * torch.nan
    torch.save(state, weights)
    directory = write_he(tmp_path / "s", section(224, 224))
    assert run(SCRIPT, directory, "--weights", str(weights)) == 2
    assert "not finite" in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir()) == ["he.png", "image_calibration.json"]


# ----- precision -----
def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 explicit bits of TF32, the nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Products(TorchFunctionMode):
    """What a card does with the inputs of products in TF32; sums are of float32 in both."""

    inputs: ClassVar = {torch.conv2d: 2, nnf.linear: 2, nnf.scaled_dot_product_attention: 3}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        n = self.inputs.get(function, 0)
        args = [as_tf32(x) if i < n else x for i, x in enumerate(args)]
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def shallow_uni():
    """A model of UNI's width with two blocks that do something, and normalised pixels of a tile."""
    torch.manual_seed(0)
    model = timm.create_model(**extractor.UNI_ARCHITECTURE | {"depth": 2, "init_values": 1.0})
    mean, std = torch.tensor(extractor.IMAGENET_MEAN_STD)
    x = (torch.from_numpy(section(224, 224)) / 255 - mean) / std
    x = x.permute(2, 0, 1)[None]
    with torch.inference_mode():
        return model.eval(), x, extractor.tile_tokens(model, x)


@pytest.mark.parametrize(
    ("emulated", "bits", "roundings"),
    [
        (torch.autocast("cpu", torch.bfloat16), 7, 3),  # of both inputs of a product and the output
        (Tf32Products(), 10, 2),
    ],
    ids=["bfloat16", "tf32"],
)
def test_fewer_bits_change_features_by_what_rounding_explains(
    emulated, bits, roundings, shallow_uni
):
    """As independent errors add up: the products of two blocks and of the patch embedding.

    A number rounded to so many bits is off by up to half of 2^-bits, evenly spread.
    """
    model, x, full = shallow_uni
    with torch.inference_mode(), emulated:
        fewer = extractor.tile_tokens(model, x)
    products = 2 * 6 + 1
    expected = 2.0 ** -(bits + 1) * (roundings * products / 3) ** 0.5
    features, error = full.flatten(0, 2), (fewer - full).flatten(0, 2)
    relative = float(error.square().mean().sqrt() / features.std(dim=0).square().mean().sqrt())
    assert expected / 10 < relative < expected  # not less: it was rounded at all
    cosine = nnf.cosine_similarity(features, features + error, dim=1)
    assert float(cosine.min()) > 1 - expected**2


@pytest.mark.parametrize(
    ("wanted", "capability", "found"),
    [
        ("auto", (9, 0), "bfloat16"), ("auto", (7, 5), "float32"), ("auto", None, "float32"),
        ("tf32", (8, 6), "tf32"), ("float32", (9, 0), "float32"), ("bfloat16", None, "bfloat16"),
    ],
)  # fmt: skip
def test_the_card_decides_the_precision(wanted, capability, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:1" if capability else "cpu")
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        assert devices.set_precision(wanted, device) == found
        if capability:
            rounds = found != "float32"
            assert torch.get_float32_matmul_precision() == ("high" if rounds else "highest")
            assert torch.backends.cudnn.allow_tf32 == rounds
        else:
            assert torch.get_float32_matmul_precision() == matmul
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def test_a_vit_takes_fewer_bits_and_more_tiles_at_once_on_a_card(lite, tiny_uni, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "set_precision", lambda *asks: asked.append(asks) or "float32")
    uni = extractor.load_backbone("uni", tiny_uni[1], None)
    args = argparse.Namespace(batch_size=None, overlap=None, precision="auto", turns=1)
    for backbone, best in ((lite, "tf32"), (uni, "bfloat16")):
        cpu = extractor.Encoder(backbone, torch.device("cpu"), args, 14, 14)
        assert asked.pop() == ("auto", torch.device("cpu"), best)
        assert cpu.batch_size == backbone.batch_size == (32 if backbone is uni else 1)


def test_the_former_name_of_bfloat16_is_taken(tmp_path):
    options = ["--directory", str(tmp_path)]
    parser = extractor.build_parser()
    for more, told in (([], []), (["--amp"], ["--precision", "bfloat16"])):
        assert cli.given_options(parser, parser.parse_args([*options, *more])) == told


def test_another_precision_starts_over_and_is_recorded(tiny_uni, tmp_path, monkeypatch):
    half, full = started_over(tiny_uni, tmp_path, monkeypatch, "--precision", "bfloat16")
    assert (half[1]["precision"], full[1]["precision"]) == ("bfloat16", "float32")
    assert np.corrcoef(full[0].ravel(), half[0].ravel())[0, 1] > 0.999
    assert not np.array_equal(full[0], half[0])


def test_bfloat16_of_a_cnn(lite):
    image = section(224, 448)
    full, half = (
        encoder(lite, image, precision=precision).row(image).astype(float)
        for precision in ("float32", "bfloat16")
    )
    assert not np.array_equal(full, half)
    for feature in range(0, 152, 10):
        assert np.corrcoef(full[..., feature].ravel(), half[..., feature].ravel())[0, 1] > 0.99


# ----- a card that does not wait -----
def test_items_are_made_while_the_one_before_is_used():
    made, used = threading.Event(), []

    def items():
        yield 1
        made.set()
        yield 2

    for item in tiling.ahead(items()):
        assert made.wait(10)  # for ever, were the second made when it is asked for
        used.append(item)
    assert used == [1, 2]


def test_an_error_in_what_is_made_ahead_reaches_the_user_of_the_items():
    def items():
        yield 1
        raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        list(tiling.ahead(items()))


def test_rows_of_a_card_are_computed_ahead_and_are_the_same(lite, tmp_path, monkeypatch):
    image, computers = section(448, 224), []
    cpu, card = (encoder(lite, image, tiling=Tiling(14, 2, False)) for _ in range(2))
    card.device = torch.device("cuda:0")  # which rows_of_tiles alone gets to see

    def row(band):
        computers.append(threading.get_ident())
        return cpu.row(band)

    card.row = row
    maps = []
    for runner in (cpu, card):
        path, folder = tmp_path / f"{runner.device.type}.npy", tmp_path / f"{id(runner)}.work"
        numbers = range(len(runner.tiling.starts(28)))
        extractor.write_map(path, extractor.rows_of_tiles(image, runner, folder, numbers), runner)
        maps.append(path.read_bytes())
        assert len(list(folder.iterdir())) == len(numbers)
    assert maps[0] == maps[1]
    assert len(computers) == 3
    assert threading.get_ident() not in computers


def test_other_systems_have_no_such_memory_to_keep(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr(extractor.ctypes, "CDLL", missing)
    extractor.keep_freed_memory()
    assert asked == ["libc.so.6"]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_cuda_agrees_with_the_cpu(precision, tmp_path):
    maps = []
    last = f"cuda:{torch.cuda.device_count() - 1}"
    for device in ("cpu", "cuda", last):
        directory = write_he(tmp_path / device.replace(":", ""), section(448, 448))
        options = ["--device", device]
        options += ["--precision", precision if device != "cpu" else "float32"]
        assert run(SCRIPT, directory, "--backbone", LITE, *options) == 0
        maps.append(outputs(directory)[0].astype(np.float32))
    share = {"float32": 0.01, "tf32": 0.02}[precision]  # of a feature's sd
    features = maps[0].reshape(-1, maps[0].shape[-1])
    allowed = share * features.std(axis=0) + 1e-3
    for of_card in maps[1:]:
        error = of_card.reshape(features.shape) - features
        assert (np.sqrt((error**2).mean(axis=0)) < allowed).all()


@pytest.mark.gpu
@needs_cuda
def test_bfloat16_of_a_card_agrees_with_float32_of_the_cpu(shallow_uni):
    model, x, full = shallow_uni
    card = copy.deepcopy(model).cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        half = extractor.tile_tokens(card, x.cuda()).cpu()
    features, error = full.flatten(0, 2), (half - full).flatten(0, 2)
    assert error.square().mean().sqrt() < 0.02 * features.std(dim=0).square().mean().sqrt()


@pytest.mark.gpu
@needs_cuda
def test_batches_are_halved_when_a_card_is_full(tiny_uni, tmp_path, capsys):
    """The card is left so little memory that 64 tiles at once do not fit it."""
    options = ["--weights", str(tiny_uni[1]), "--overlap", "0", "--device", "cuda"]
    directories = [write_he(tmp_path / name, section(224, 64 * 224)) for name in ("one", "many")]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert run(SCRIPT, directories[0], *options, "--batch-size", "1") == 0
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.max_memory_reserved() + 40_000_000
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        assert run(SCRIPT, directories[1], *options, "--batch-size", "64") == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with --batch-size" in capsys.readouterr().err
