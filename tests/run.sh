#!/usr/bin/env bash
# Check everything: style (ruff), types (mypy), then all tests (pytest).
#
#   bash tests/run.sh [pytest options]      for example: bash tests/run.sh -k HISTEX
#   bash tests/run.sh --cov --cov-report=term     with the coverage of the scripts; pure Python then
#                                                 takes up to twice as long
#
# Without an active virtual or conda environment it makes .venv in the repository. Packages come from
# tests/requirements.lock; REQUIREMENTS=tests/requirements.txt takes the newest that the ranges allow
# and keeps what an active environment has.
#
# The examples of hypothesis are the same in every run; HISTEX_FUZZ=1 draws new ones.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. demo/environment.sh
use_environment -r "${REQUIREMENTS:-tests/requirements.lock}"

# One thread: the tests compare bytes between runs, and small arrays are faster without a pool.
export OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=1
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A process takes tests that follow each other, and with them what the tests of a file share.
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
