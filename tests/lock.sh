#!/usr/bin/env bash
# Renew the lock files: the newest release that each range allows, for every system and Python.
#
#   pip install uv && bash tests/lock.sh                    all of them
#   pip install uv && bash tests/lock.sh --upgrade-package torch
#
# Every file has its sha256, so that pip refuses one that was replaced. Whoever wants other builds
# (torch for another CUDA, or for the CPU alone) installs from the ranges of requirements.txt.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- --upgrade
# a machine's own caps, under which pip installs there
cap="$("${PYTHON:-python3}" -m pip config list | sed -n "s/^global.constraint='\(.*\)'$/\1/p")"
for name in requirements tools-requirements audit-requirements; do
    # extras stay: pip takes a[b] for a package without a pin where the lock has a alone
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-strip-extras --no-annotate \
        ${cap:+--constraint "$cap"} --custom-compile-command 'bash tests/lock.sh' "$@" \
        "tests/$name.txt" --output-file "tests/$name.lock"
done
