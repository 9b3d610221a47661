# Sourced by demo/run.sh and tests/run.sh, from the root of the repository.
#
#   use_environment PIP-ARGUMENTS   install them; afterwards $python is the interpreter to use
#
# An active virtual or conda environment is used as it is; else .venv in the repository is, and is made
# if need be. PYTHON=/path/to/python3 chooses the interpreter, of which .venv is then made anew.
# TORCH=cpu takes PyTorch's build without CUDA, which is far smaller.

CPU_INDEX=https://download.pytorch.org/whl/cpu

own_python() { # of .venv; on Windows it lies elsewhere
    if [ -d "$PWD/.venv/Scripts" ]; then
        printf '%s/.venv/Scripts/python.exe\n' "$PWD"
    else
        printf '%s/.venv/bin/python\n' "$PWD"
    fi
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

use_environment() {
    local active="${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" own found
    own="$(own_python)"
    if [ -n "$active" ]; then
        python="${PYTHON:-python}"
    elif [ -z "${PYTHON:-}" ] && "$own" -m pip --version >/dev/null 2>&1; then
        python="$own" # made by an earlier run
    else
        python="${PYTHON:-python3}"
        if [ -z "${PYTHON:-}" ] && ! is_new_enough python3 && is_new_enough python; then
            python=python # its name on Windows
        fi
    fi
    if ! is_new_enough "$python"; then
        found="$("$python" --version 2>&1 || true)"
        printf 'error: HISTEX needs Python 3.11 or newer; %s is: %s\n' "$python" "${found:-not there}" >&2
        printf 'Install it, then run: PYTHON=/path/to/python3.11 bash %s\n' "$0" >&2
        exit 2
    fi
    if [ -z "$active" ] && [ "$python" != "$own" ]; then
        printf '\n--- make a virtual environment in %s/.venv\n' "$PWD"
        "$python" -m venv --clear .venv
        python="$(own_python)"
    fi
    install "$@"
}

install() {
    if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        printf '\n--- install what is missing\n'
        with_news "$python" -m pip install -q --disable-pip-version-check "$@"
        return
    fi
    say_size
    if [ "${TORCH:-}" = cpu ]; then
        with_news "$python" -m pip install --disable-pip-version-check \
            "$(grep -m 1 '^torch[<>=]' requirements.txt)" --index-url "$CPU_INDEX"
    fi
    with_news "$python" -m pip install --disable-pip-version-check "$@"
}

say_size() { # before anything is downloaded
    local place
    place="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '\n--- install PyTorch and the other packages in requirements.txt into %s\n' "$place"
    if [ "${TORCH:-}" = cpu ]; then
        printf 'This takes about 2 GB of the disk and a few minutes: PyTorch for the CPU alone.\n'
    elif [ "$(uname -s)" = Linux ]; then
        printf 'This takes about 6 GB of the disk and several minutes: PyTorch comes with the libraries of CUDA.\n'
        printf 'Without a graphics card, 2 GB are enough: stop by Ctrl-C, then run: TORCH=cpu bash %s\n' "$0"
    else
        printf 'This takes about 2 GB of the disk and a few minutes.\n'
    fi
}

with_news() { # run a command; where nobody sees its bars, say every 30 s that it is at work
    if [ -t 1 ]; then
        "$@"
        return
    fi
    local start=$SECONDS speaker code=0
    (
        trap 'kill $! 2>/dev/null; exit 0' TERM
        while true; do
            sleep "${SPEAK_SECONDS:-30}" &
            wait $!
            printf 'still installing (%d s so far)\n' "$((SECONDS - start))"
        done
    ) &
    speaker=$!
    "$@" || code=$?
    kill "$speaker" 2>/dev/null || true
    wait "$speaker" 2>/dev/null || true
    return "$code"
}
