# Sourced by demo.sh and test.sh: makes .venv (once) and installs the package into it, with the extras named in $1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11, 3.12 or 3.13 is needed; name one with PYTHON=/path/to/python" >&2
    exit 1
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt)

# Without a GPU the CPU build of PyTorch saves gigabytes; where its index cannot be reached, pip's default will do.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        "${pip[@]}" --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null || true
    fi
    .venv/bin/python -c 'import torch' 2>/dev/null || "${pip[@]}" torch==2.13.0
fi
"${pip[@]}" --editable ".$1"
