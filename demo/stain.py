"""Stain a simulated tissue: the H&E image of its compartments and cells.

Haematoxylin and eosin are painted as optical densities: cytoplasm, membranes, collagen that flows
along a fibre field and gapes where it is thin, retraction clefts around the nests, and the nuclei.
The Beer-Lambert law turns them into colour; then come a slight blur and the noise of the sensor.
"""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from demo.tissue import CELL_TYPES, FAT, GLAND, GLASS, STROMA, TUMOUR, Layout, smooth_field

PIXEL_UM = 0.4  # um per pixel of the image

# Optical density of what is not nucleus: glass, stroma, tumour, gland, lumen, lymphoid, fat,
# vessel wall, blood.
EOSIN = np.array([0, 0.40, 0.40, 0.50, 0.035, 0.22, 0.015, 0.55, 0.05], np.float32)
HAEMATOXYLIN = np.array([0, 0.035, 0.15, 0.12, 0.0, 0.12, 0.0, 0.06, 0.0], np.float32)

# Optical density per unit of stain in red, green, blue; light through the empty slide.
HAEMATOXYLIN_RGB, EOSIN_RGB = np.array([0.92, 1.14, 0.55]), np.array([0.17, 0.80, 0.37])
WHITE_RGB = np.array([244.0, 242.0, 245.0])


def paint_nuclei(
    eosin: np.ndarray, haematoxylin: np.ndarray, cells: pd.DataFrame, rng: np.random.Generator
) -> None:
    """Stamp each nucleus (of a red cell: its disc, in eosin) into the density images, in place."""
    look = CELL_TYPES.loc[cells.type]
    swell = np.exp(look.spread.to_numpy()[:, None] * rng.standard_normal((len(cells), 2)))
    axes = look[["long", "short"]].to_numpy() * swell / 2 / PIXEL_UM  # px
    stain = look.stain.to_numpy() * np.exp(rng.normal(0, 0.12, len(cells)))
    lobes = 0.35 * look.spread.to_numpy()[:, None] * rng.standard_normal((len(cells), 3))
    phase = rng.uniform(0, 2 * np.pi, (len(cells), 3))
    has_nucleolus = rng.random(len(cells)) < look.nucleolus.to_numpy()
    spot = rng.uniform(-0.45, 0.45, (len(cells), 2))
    chromatin = gaussian_filter(rng.standard_normal((512, 512)), 1.7, mode="wrap")
    chromatin /= chromatin.std()
    offset = rng.integers(0, 512 - 96, (len(cells), 2))
    side = len(eosin)
    for i, (x, y, kind, angle) in enumerate(
        zip(cells.nx / PIXEL_UM, cells.ny / PIXEL_UM, cells.type, cells.angle, strict=True)
    ):
        half = min(int(1.3 * axes[i].max()) + 2, 47)
        top, left = max(int(y) - half, 0), max(int(x) - half, 0)
        bottom, right = min(int(y) + half + 1, side), min(int(x) + half + 1, side)
        dy, dx = np.ogrid[top - y + 0.5 : bottom - y, left - x + 0.5 : right - x]
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / axes[i, 0]
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / axes[i, 1]
        theta = np.arctan2(v, u)
        rim = 1 + sum(lobes[i, k] * np.cos((k + 2) * theta + phase[i, k]) for k in range(3))
        rho = np.hypot(u, v) / rim
        cover = np.clip((1 - rho) * axes[i].min() / 1.6 + 0.5, 0, 1)
        here = np.s_[top:bottom, left:right]
        if kind == "red":
            eosin[here] = np.maximum(eosin[here], cover * stain[i] * (0.8 + 0.25 * rho**2))
            continue
        grain = chromatin[offset[i, 0] :, offset[i, 1] :][: bottom - top, : right - left]
        body = 0.76 + 0.30 * np.clip(rho, 0, 1) ** 4 + 0.17 * grain
        if has_nucleolus[i]:
            body += 0.5 * np.exp(-((u - spot[i, 0]) ** 2 + (v - spot[i, 1]) ** 2) / 0.03)
        haematoxylin[here] += cover * (stain[i] * body - haematoxylin[here]).clip(0)
        eosin[here] *= 1 - 0.45 * cover


def stain_densities(
    layout: Layout, cells: pd.DataFrame, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Eosin and haematoxylin (optical density, float32) at PIXEL_UM, nuclei included."""
    compartment, fields = layout.compartment, layout.fields
    side = len(compartment)
    px = round(side / PIXEL_UM)

    def enlarge(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image.astype(np.float32), (px, px), interpolation=cv2.INTER_LINEAR)

    y, x = np.mgrid[:side, :side] + 0.5
    near, owner = cKDTree(cells[["x", "y"]]).query(
        np.column_stack([x.ravel(), y.ravel()]).astype(np.float32), k=2
    )
    border = (near[:, 1] - near[:, 0]).reshape(side, side)  # 0 on the membrane between two cells
    tone = np.exp(rng.normal(0, 0.13, len(cells)))[owner[:, 0]].reshape(side, side)
    epithelium = np.isin(compartment, [TUMOUR, GLAND])
    eosin = EOSIN[compartment] * np.where(epithelium, tone, 1)
    eosin += np.where(epithelium, 0.16, 0) * np.exp(-((border / 1.5) ** 2))
    eosin += np.where(compartment == FAT, 0.42, 0) * np.exp(-((border / 1.8) ** 2))
    basement = np.exp(-(((fields["gland"] - 1.5) / 2.0) ** 2)) * (compartment == STROMA)
    eosin += 0.22 * basement
    rim = cv2.GaussianBlur((compartment == GLASS).astype(np.float32), (0, 0), 1.5)
    eosin += 1.2 * rim * (1 - rim) * (compartment == FAT)  # the last membrane before the glass
    cleft = np.exp(-(((fields["nest border"] + 1.5) / 1.6) ** 2)) * (compartment == STROMA)
    cleft *= np.clip(smooth_field(side, 45, rng) - 0.3, 0, 0.8)
    eosin *= 1 - cleft
    haematoxylin = HAEMATOXYLIN[compartment] * np.where(epithelium, tone, 1) * (1 - cleft)

    # collagen: streaky noise read along the fibre field; where it is lowest, the tissue gapes
    streaks = gaussian_filter(rng.standard_normal((1024, 1024)), (2.2, 34), mode="wrap")
    streaks += 0.55 * gaussian_filter(rng.standard_normal((1024, 1024)), (6, 60), mode="wrap") * 2.2
    streaks = (streaks / streaks.std()).astype(np.float32)
    across, along = fields["fibre"], x - 0.5 * y + 25 * smooth_field(side, 100, rng)
    fibre = cv2.remap(
        streaks, enlarge(along * 1.6), enlarge(across * 1.6), cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )  # fmt: skip
    loose = enlarge(smooth_field(side, 130, rng) * 0.3)
    amount = enlarge((compartment == STROMA) * 1.0)
    fibre = np.clip(1 + 0.30 * fibre - loose - 0.9 * np.clip(-fibre - 1.0, 0, 1), 0.08, 1.8)
    grain = gaussian_filter(rng.standard_normal((512, 512)), 1.4, mode="wrap")
    grain = np.tile(1 + 0.10 * grain / grain.std(), (px // 512 + 1,) * 2)[:px, :px]
    eosin = enlarge(cv2.GaussianBlur(eosin.astype(np.float32), (0, 0), 0.7))
    eosin *= (1 + amount * (fibre - 1)) * grain.astype(np.float32)
    haematoxylin = enlarge(cv2.GaussianBlur(haematoxylin.astype(np.float32), (0, 0), 0.7))
    paint_nuclei(eosin, haematoxylin, cells, rng)
    glass = cv2.GaussianBlur(enlarge((compartment == GLASS) * 1.0), (0, 0), 1.0)
    uneven = [enlarge(1 + 0.07 * smooth_field(side, 400, rng)) * (1 - glass) for _ in range(2)]
    return eosin * uneven[0], haematoxylin * uneven[1]


def render(layout: Layout, cells: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """The H&E image, uint8 (rows, columns, 3), at PIXEL_UM."""
    eosin, haematoxylin = stain_densities(layout, cells, rng)
    image = np.empty((*eosin.shape, 3), np.uint8)
    for c in range(3):
        light = np.exp(-(eosin * EOSIN_RGB[c] + haematoxylin * HAEMATOXYLIN_RGB[c]))
        light = cv2.GaussianBlur((WHITE_RGB[c] * light).astype(np.float32), (0, 0), 0.8)
        light += 2.0 * rng.standard_normal(light.shape, np.float32)
        image[:, :, c] = light.clip(0, 255)
    return image
