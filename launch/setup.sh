#!/usr/bin/env bash
# Finds a Python and runs launch/install.py with it, which makes .venv at the root. Called by `make`; safe to repeat.
#   PYTHON=NAME_OR_PATH   the interpreter; default: that of .venv, else the first suitable one on the PATH
#   ENGINE=cpu|cuda       the vLLM to install; default: cuda if an NVIDIA driver is loaded, else cpu
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
is_suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in .venv/bin/python python3.12 python3.11 python3.13 python3; do
        if command -v "$candidate" >/dev/null && is_suitable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 was found; install one, or name it: make PYTHON=/path/to/python3.12"
}

if [ -z "${PYTHON:-}" ]; then
    python=$(find_python)
elif ! command -v "$PYTHON" >/dev/null; then
    fail "PYTHON=$PYTHON was not found; name an interpreter on the PATH or give its path"
elif ! is_suitable "$PYTHON"; then
    fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 | head -n 1); Slipstream needs Python 3.11, 3.12 or 3.13"
else
    python=$PYTHON
fi
exec "$python" launch/install.py ${PYTHON:+--same-python} "$@"
