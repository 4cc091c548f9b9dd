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
uv sync --quiet --extra nerfstudio --python "${FIT3D_PYTHON:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
