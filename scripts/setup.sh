#!/usr/bin/env bash
# Makes .venv with everything the plugin, its tests and nerfstudio need. Needs Python >= 3.10; gets uv where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/ns-train ]; then
    # Two of nerfstudio's dependencies, fpsample and pyliblzfse, come as source only.
    if ! { command -v c++ || command -v g++ || command -v clang++; } >/dev/null 2>&1; then
        echo "setup.sh: a C++ compiler is needed (nerfstudio's fpsample and pyliblzfse come as source) and none was found." >&2
        echo "Debian, Ubuntu: sudo apt-get install build-essential   Fedora: sudo dnf install gcc-c++   macOS: xcode-select --install" >&2
        exit 1
    fi
    echo "Installing into .venv: about 4 GB to download, most of it torch with its GPU libraries, and 8 GB on disk."
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
    [ "$free_gb" -ge 9 ] || echo "Only $free_gb GB are free here; this will probably not fit." >&2
fi
if ! command -v uv >/dev/null 2>&1; then
    # uv goes into a small environment of its own: system Pythons refuse to be installed into.
    python3 -m venv .venv-uv
    .venv-uv/bin/python -m pip install --quiet --upgrade pip uv
    PATH="$PWD/.venv-uv/bin:$PATH"
fi
# `uv sync` honours the overrides of pyproject.toml: nerfstudio's timm pin, and its second OpenCV.
# Pythons beyond 3.12 are not supported yet: uv brings 3.12 where the system's is newer or missing.
system=$(python3 -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % (v if v <= (3, 12) else (3, 12)))' 2>/dev/null || echo 3.12)
uv sync --extra nerfstudio --python "${FIT3D_PYTHON:-$system}"
