#!/usr/bin/env bash
# Run the five stages on one sample, without the engine.
#
#   bash workflow/run.sh DIRECTORY [options of all] [SCRIPT.py its options]...
#   bash workflow/run.sh data/section --threads 2 Histology_Extractor.py --backbone efficientnet_lite0 HISTEX.py --n-states 3
#
# Options before the name of a script go to all five; those behind it go to that script. A stage with
# nothing to do says so within a second, so that the same command goes on after a stop or an edit.
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail

stages=(image_calibration.py get_HR.py Histology_Extractor.py masking_non_tissue.py HISTEX.py)
if [ $# -eq 0 ] || [[ "$1" == -* ]]; then
    printf 'error: the folder of the sample comes first.\nRun: bash workflow/run.sh DIRECTORY [options]\n' >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
directory="$1"
shift

# options_of STAGE WORDS...: sets $options to those of all and those of this stage
options_of() {
    local stage="$1" part="all" word name
    options=()
    for word in "${@:2}"; do
        for name in "${stages[@]}"; do
            if [ "$word" = "$name" ]; then
                part="$name"
                continue 2
            fi
        done
        if [ "$part" = all ] || [ "$part" = "$stage" ]; then options+=("$word"); fi
    done
}

for stage in "${stages[@]}"; do
    options_of "$stage" "$@"
    printf '\n--- %s\n' "$stage"
    "${PYTHON:-python}" "$root/$stage" --directory "$directory" ${options[@]+"${options[@]}"}
done
