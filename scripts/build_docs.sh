#!/usr/bin/env bash
# Builds the site into site/ (open site/index.html). The tools (130 MB) go into .venv-docs once; after that it needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PATH:$PWD/.venv-uv/bin"
[ -x .venv/bin/python ] || bash scripts/setup.sh
if [ ! -d .venv-docs/mkdocs ]; then
    rm -rf .venv-docs
    uv pip install --quiet --python .venv/bin/python --target .venv-docs --group docs
fi
# The newest material warns of other projects' plans in every build.
NO_MKDOCS_2_WARNING=1 PYTHONPATH="$PWD:$PWD/.venv-docs" .venv/bin/python -m mkdocs build --strict --quiet
# Nothing on a page may be fetched from elsewhere.
if grep -rEl '(src|href)="(https?:)?//[^"]*\.(js|css|woff2?|png|jpg)"' site --include='*.html'; then
    echo "build_docs.sh: these pages load files from other machines." >&2
    exit 1
fi
echo "site/index.html"
