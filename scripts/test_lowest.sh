#!/usr/bin/env bash
# Tries the lower bounds of pyproject.toml: a fresh environment with the oldest version that each of them allows, in a
# temporary folder, and the tests in it. Downloads about 3 GB. Arguments go to pytest; without any, the quick tests run.
#
#   scripts/test_lowest.sh                          Python 3.10; FIT3D_PYTHON=3.11 takes another
#   scripts/test_lowest.sh tests/utils tests/data   these tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PATH:$PWD/.venv-uv/bin"
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
uv venv --quiet --python "${FIT3D_PYTHON:-3.10}" "$environment"
# Libraries of these libraries are the newest that fit: only the bounds written here are ours to keep.
uv pip install --quiet --python "$environment/bin/python" --resolution lowest-direct --editable . \
    --requirements pyproject.toml --all-extras --group dev
[ $# -gt 0 ] || set -- -m "not slow"
# Without jaxtyping's checks, which scripts/test.sh makes: its old versions cannot begin at a folder of tests.
"$environment/bin/python" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib "$@"
