# Sourced by demo/run.sh and tests/run.sh, from the root of the repository.
#
#   use_environment PIP-ARGUMENTS   install them; afterwards $python is the interpreter to use
#
# An active virtual or conda environment is used as it is; else .venv in the repository is, and is made
# if need be. PYTHON=/path/to/python3 chooses the interpreter, of which .venv is then made anew.

use_environment() {
    local own="$PWD/.venv/bin/python" active="${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" found
    if [ -n "$active" ]; then
        python="${PYTHON:-python}"
    elif [ -z "${PYTHON:-}" ] && "$own" -m pip --version >/dev/null 2>&1; then
        python="$own" # made by an earlier run
    else
        python="${PYTHON:-python3}"
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found="$("$python" --version 2>&1 || true)"
        printf 'error: HISTEX needs Python 3.11 or newer; %s is: %s\n' "$python" "${found:-not there}" >&2
        printf 'Install it, then run: PYTHON=/path/to/python3.11 bash %s\n' "$0" >&2
        exit 2
    fi
    if [ -z "$active" ] && [ "$python" != "$own" ]; then
        printf '\n--- make a virtual environment in %s/.venv\n' "$PWD"
        "$python" -m venv --clear .venv
        python="$own"
    fi
    printf '\n--- install what is missing (the first time takes a few minutes)\n'
    "$python" -m pip install -q --disable-pip-version-check "$@"
}
