#!/usr/bin/env bash
# From a clone to a fine-tuned backbone and one page about it: installs into .venv if need be, then runs quickstart.py.
#
#   scripts/quickstart.sh                          synthetic rooms, minutes on two cores, no GPU and no network needed
#   scripts/quickstart.sh --data SCENE             your own capture (ScanNet++, nerfstudio or COLMAP layout)
#   scripts/quickstart.sh --help                   further options
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -x "$here/.venv/bin/ns-train" ]; then
    started=$(date +%s)
    bash "$here/scripts/setup.sh"
    echo "Installed in $(($(date +%s) - started)) s."
fi
# Warnings of other libraries are for their authors.
PYTHONWARNINGS=ignore exec "$here/.venv/bin/python" "$here/scripts/quickstart.py" "$@"
