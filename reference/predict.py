"""Predict maps of a section without any spot, from its H&E alone, by a reference.

    python image_calibration.py --directory data/slide --no-spots
    python Histology_Extractor.py --directory data/slide
    python masking_non_tissue.py --directory data/slide --no-spots
    python reference/predict.py --directory data/slide --reference kidney.safetensors

Every superpixel gets what superpixels of the same look express in the sections that the reference
was learned from (reference/learn.py). Nothing is measured here, and genes differ in how well the
H&E tells them. How well each gene was told on sections that the reference did not know stands in
expected-r.csv, the best gene first. Where there are spots, use HISTEX.py --reference.

If the section has spots after all, --place-by-spots asks them where the image lies, as HISTEX.py
does, and moves it back: both then have their maps at the same place.

Counts are on the scale of the reference's sections, or of --depth. The picture does not tell
whether a gene is rich or poor in the whole section: its mean is that of the reference.

Reads   he.jpg, Histology_feature_map.npy, Histology_Extractor.json, mask.png; --reference; with
        --place-by-spots what HISTEX.py reads
Writes  cnts-super/              a map a gene, as of HISTEX.py: float32 (rows, columns), counts per
                                 superpixel of 8 um, NaN outside the tissue; index.csv
        embeddings-gene.pickle   dict(cls=float32 (96, rows, columns)): the reference's features
        expected-r.csv           gene, the correlation with the truth to expect at 8 and 32 um
        cnts-super-plots/        pictures of the genes that it tells best
        HISTEX.json              the record, which says that the maps are predicted from histology
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from method import options
from reading import cli

SCRIPT = utils.PREDICTION


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    option = parser.add_argument
    option(
        "--reference",
        type=Path,
        required=True,
        metavar="FILE",
        help="The reference: a file that reference/learn.py wrote from sections of known truth.",
    )
    option(
        "--depth",
        type=cli.above_0,
        metavar="N",
        help="Total counts, over all genes of the reference, that a typical Visium spot would hold "
        "(default: as many as in the sections of the reference).",
    )
    option(
        "--place-by-spots",
        action="store_true",
        help="The section has spots: move the image back if they show clearly that it lies beside "
        "them. Their counts are used for nothing else.",
    )
    options.add_maps(parser)
    cli.add_device(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import math
import shlex
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch

from method import devices, maps, reference, registration, resume
from method.anchoring import COUNTS_AT_ONCE
from method.prediction import GENES_BYTES
from method.reference import Reference
from method.section import read_section
from reading import arrays, images

COARSE = reference.EXPECTED[1]  # the column by which genes are ordered
SPOT_SUPERPIXELS = math.pi * (utils.VISIUM_RADIUS_UM / utils.SUPERPIXEL_UM) ** 2


class Predictor:
    """Maps of genes, some at a time, from the features of the superpixels that are tissue."""

    def __init__(
        self, found: Reference, order: np.ndarray, features: np.ndarray, tissue: np.ndarray,
        depth: float,
    ) -> None:  # fmt: skip
        self.reference, self.order, self.shown = found, order, tissue
        self.features = features  # (M, R) float16
        self.rates = found.rates * np.float32(depth)

    def blocks(self) -> list[slice]:
        step = max(1, GENES_BYTES // (4 * len(self.features)))
        n = len(self.order)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def maps(self, genes: slice) -> np.ndarray:
        """Counts (G', M) of some genes."""
        chosen = torch.from_numpy(self.order[genes])
        step = max(1, COUNTS_AT_ONCE // len(chosen))
        values = np.empty((len(chosen), len(self.features)), np.float32)
        rates = torch.from_numpy(self.rates)[chosen]
        with torch.inference_mode():
            for start in range(0, len(self.features), step):
                part = torch.from_numpy(self.features[start : start + step]).float()
                log_ratio = self.reference.encoder.decode(part, chosen)
                values[:, start : start + step] = (log_ratio.exp() * rates).T.numpy()
        return values


def check_maps_of_spots(stage: utils.Stage) -> None:
    record = utils.read_record(stage, SCRIPT) or {}
    if record.get("script") == utils.HISTEX and not stage.args.force:
        beside = f"To replace the maps, run: {stage.command()} --force"
        if not stage.command(utils.CALIBRATION).endswith(" --no-spots"):
            command = stage.command(utils.HISTEX)
            if " --reference " not in command:
                command += f" --reference {shlex.quote(str(stage.args.reference))}"
            beside = f"To use a reference beside the spots, run: {command}\n{beside}"
        raise utils.StageError(
            f"{stage.directory / utils.MAPS.name} holds maps that {utils.HISTEX} made with the "
            f"spots of this section, which tell more than histology alone.",
            beside,
        )


def write_maps(
    stage: utils.Stage, found: Reference, table: pd.DataFrame, features: np.ndarray,
    tissue: np.ndarray, depth: float,
) -> None:  # fmt: skip
    """All that is as large as the map; genes in the order of the ``table``."""
    args, score = stage.args, "expected r at 32 um"
    files = maps.MapFiles(args.map_format, args.dtype, args.n_plots, with_sd=False, score=score)
    need = (len(table) * np.dtype(args.dtype).itemsize + 4 * reference.FEATURES) * tissue.size
    utils.check_disk(stage.directory, need, "the maps")
    decisive = [utils.code_hash(SCRIPT), stage.inputs, asdict(files), depth]
    work = resume.work_folder(stage.directory, utils.MAPS.name, decisive)
    folders = maps.new_folders(stage, files)
    genes, r = table["gene"].tolist(), table[COARSE].to_numpy()
    predictor = Predictor(found, table.index.to_numpy(copy=True), features, tissue, depth)
    maps.write_genes(folders, work, genes, predictor, r, files)
    embedding = np.full((reference.FEATURES, *tissue.shape), np.nan, np.float32)
    embedding[:, tissue] = features.T
    maps.write_embedding(stage, embedding)


def place_by_spots(stage: utils.Stage) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The tokens (h, w, F), moved back if the spots clearly show the image beside them."""
    stage.require(utils.LOCS, utils.RADIUS, utils.GENE_NAMES, utils.HR_LOCS, utils.HR_CNTS)
    section = read_section(stage, context=1, by_area=True)[0]
    beside = registration.register(section, stage.directory)
    return section.tokens, beside


def main(stage: utils.Stage) -> None:
    args = stage.args
    stage.require(utils.HE, utils.FEATURES, utils.MASK)
    check_maps_of_spots(stage)
    stage.guard(
        utils.MAPS, utils.EMBEDDINGS, utils.PLOTS, utils.EXPECTED, utils.SPREAD, utils.HELD_OUT
    )
    tissue = images.read_mask(stage, images.grid_shape(stage))
    tokens = arrays.read_array(stage, utils.FEATURES, np.float16, (*tissue.shape, None))
    found = reference.read_reference(args.reference, reference.backbone_of(stage, tokens))
    beside = None
    if args.place_by_spots:
        tokens, beside = place_by_spots(stage)
    table = pd.DataFrame({"gene": found.genes, **found.expected_r})
    table = table.sort_values(COARSE, ascending=False, kind="stable")  # unknown ones last
    own_depth = float(found.rates.sum()) * SPOT_SUPERPIXELS
    depth = args.depth or own_depth
    if float(found.rates.max()) * depth / own_depth > reference.MOST_RATE:
        raise utils.StageError(
            f"--depth {depth:g} is no number of counts in a spot.",
            "A spot of Visium has thousands.",
        )
    print(
        f"{len(table)} genes by {args.reference.name}; all together, a spot of 55 um would hold "
        f"{depth:.0f} counts of them"
    )
    stage.warn(
        f"the maps are predicted from histology alone: no spot of this section was measured; "
        f"{utils.EXPECTED.name} tells which genes to believe"
    )
    device = devices.resolve_device(args.device)
    features = reference.tissue_features(found.encoder, tokens, tissue, device)
    found.encoder.cpu()
    write_maps(stage, found, table, features, tissue, depth / own_depth)
    with stage.writing(utils.EXPECTED) as partial:
        table.round(4).to_csv(partial, index=False, encoding="utf-8", lineterminator="\n")
    for artifact in (utils.SPREAD, utils.HELD_OUT):
        stage.retire(artifact)
    basis = found.facts["expected_from"]
    r = table[COARSE].median()
    told = "nothing is known" if math.isnan(r) else f"median r {r:.3f} at 32 um (by {basis})"
    print(f"  expected  {told}")
    stage.finish(
        predicted_from="histology alone",
        reference=found.about(stage, args.reference),
        genes=len(table),
        depth=round(depth, 2),
        spots=0,
        image_beside_spots=beside,
    )


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
