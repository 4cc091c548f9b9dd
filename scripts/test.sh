#!/usr/bin/env bash
# Lint, types and tests, exactly as continuous integration runs them. Arguments go to pytest: `scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/pytest ] || bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Everything that tests ask for is installed here, so none of them may be skipped (but for want of a browser).
# Two processes, each taking whole files, the longest first (tests/conftest.py).
FIT3D_TESTS_SKIP_NOTHING=1 .venv/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
