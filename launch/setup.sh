#!/usr/bin/env bash
# Makes .venv at the root: Python environment, dependencies, and the repairs they need. Run by `make`; safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 was found; install one, or name it: PYTHON=/path/to/python3.12 make"
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "environment .venv with $python"
    "$python" -m venv .venv || fail "python3 -m venv failed; on Debian and Ubuntu install the package python3-venv"
fi

# One list of dependencies, that of pyproject.toml.
requirements() {
    .venv/bin/python - "$@" <<'EOF'
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for group in sys.argv[1:]:
    print("\n".join(project["dependencies"] if group == "base" else project["optional-dependencies"][group]))
EOF
}

engine=cpu
if [ -e /proc/driver/nvidia/version ]; then engine=cuda; fi
say "installing for $engine (this takes some minutes the first time)"
.venv/bin/python -m pip install --quiet --upgrade pip
if [ "$engine" = cpu ]; then
    # First of all, so that nothing else chooses another build of it.
    .venv/bin/python -m pip install --quiet "$(requirements base | grep '^torch==')"
fi
requirements base "$engine" dev >.venv/requirements.txt
.venv/bin/python -m pip install --quiet --requirement .venv/requirements.txt
if [ "$engine" = cpu ]; then
    # The CPU engine pulls in CUDA builds of these, which break the import of transformers beside a CPU torch; text
    # models need none of them.
    .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
    .venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' ||
        say "torch is the CUDA build on a machine without a GPU: it works but is large; set PIP_EXTRA_INDEX_URL to" \
            "PyTorch's CPU index, remove .venv and run again for the small one"
fi
touch .venv/.ready
say "done"
