#!/usr/bin/env bash
# Makes .venv with everything the plugin, its tests and nerfstudio need. Needs Python >= 3.10; gets uv where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v uv >/dev/null 2>&1; then
    # uv goes into a small environment of its own: system Pythons refuse to be installed into.
    python3 -m venv .venv-uv
    .venv-uv/bin/python -m pip install --quiet --upgrade pip uv
    PATH="$PWD/.venv-uv/bin:$PATH"
fi
# `uv sync` honours the overrides of pyproject.toml: nerfstudio's timm pin, and its second OpenCV.
# Pythons beyond 3.12 are not supported yet: uv brings 3.12 where the system's is newer or missing.
system=$(python3 -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % (v if v <= (3, 12) else (3, 12)))' 2>/dev/null || echo 3.12)
uv sync --quiet --extra nerfstudio --python "${FIT3D_PYTHON:-$system}"
