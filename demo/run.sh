#!/usr/bin/env bash
# Simulate a small section with known truth, run the five scripts on it, score and draw the result.
#
#   bash demo/run.sh [FOLDER]        FOLDER: where the section goes; default demo/section
#
# Takes a few minutes on two CPU cores; no graphics card, no login. Without an active virtual or conda
# environment it makes .venv in the repository. PYTHON=/path/to/python3 chooses the interpreter;
# TORCH=cpu takes the build of PyTorch without CUDA, which is far smaller.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
section="${1:-$root/demo/section}"
mkdir -p "$section"
section="$(cd "$section" && pwd)" # absolute: the scripts below run in the repository
cd "$root"

step() { printf '\n--- %s\n' "$*"; }

. demo/environment.sh
use_environment -r requirements.txt -r demo/requirements.txt

# ----- section, five scripts, result -----
seconds=$SECONDS
step "simulate a section"
"$python" demo/simulate.py --directory "$section"
step "1   calibrate the image"
"$python" image_calibration.py --directory "$section"
step "2A  densify the spots"
"$python" get_HR.py --directory "$section"
step "2B  extract histology features"
"$python" Histology_Extractor.py --directory "$section" --backbone efficientnet_lite0
step "3   mask the tissue"
"$python" masking_non_tissue.py --directory "$section"
step "4   train and predict"
"$python" HISTEX.py --directory "$section" --epochs 500 --n-states 3
step "score against the truth"
"$python" analysis/evaluate.py --directory "$section"
"$python" demo/figure.py --directory "$section"
printf '\ndone in %d s; everything is in %s: look at demo.png\n' "$((SECONDS - seconds))" "$section"
