#!/usr/bin/env bash
# Makes .venv with everything the plugin, its tests and nerfstudio need. Gets uv where there is none.
#
#   scripts/setup.sh                               with python3, if that is Python 3.10 to 3.13
#   FIT3D_PYTHON=3.12 scripts/setup.sh             with another one, also as a path
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nothing, or "3.11".
python=${FIT3D_PYTHON:-$(python3 -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v if (3, 10) <= v < (3, 14) else "")' 2>/dev/null || true)}
if [ ! -x .venv/bin/ns-train ]; then
    # What stands in the way is said before anything is downloaded.
    if [ -z "$python" ]; then
        echo "python3 here is $(python3 -V 2>/dev/null || echo missing); nerfstudio installs with Python 3.10 to 3.13." \
            "uv looks for one of these on this machine, else downloads it (30 MB)."
    fi
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
    echo "Getting uv, the installer (25 MB) ..."
    python3 -m venv .venv-uv
    .venv-uv/bin/python -m pip install --quiet --upgrade pip uv
    PATH="$PWD/.venv-uv/bin:$PATH"
fi
# `uv sync` honours the overrides of pyproject.toml: nerfstudio's timm pin, and its second OpenCV.
uv sync --extra nerfstudio ${python:+--python "$python"}
echo "Done. Next: source .venv/bin/activate, then fit3d-info, or bash scripts/quickstart.sh."
