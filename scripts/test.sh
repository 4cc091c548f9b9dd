#!/usr/bin/env bash
# Lint, types and tests, exactly as continuous integration runs them. Arguments go to pytest: `scripts/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv/bin/pytest ] || bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
other=1.5.3
PATH="$PATH:$PWD/.venv-uv/bin"
if [ ! -d ".venv-gsplat/gsplat-$other.dist-info" ]; then
    rm -rf .venv-gsplat
    uv pip install --quiet --python .venv/bin/python --target .venv-gsplat --no-deps "gsplat==$other" ||
        echo "test.sh: gsplat $other could not be downloaded: its tests are left out." >&2
fi
if [ ! -d .venv-onnx/onnxruntime ]; then
    rm -rf .venv-onnx
    uv pip install --quiet --python .venv/bin/python --target .venv-onnx --no-deps \
        onnx onnxruntime onnxscript onnx_ir ml_dtypes flatbuffers protobuf ||
        echo "test.sh: onnx could not be downloaded: its test is left out." >&2
fi

# Types, and gsplat's other generation (what the plugin asks of its kernels and strategies holds with both). They take one
# core for a minute or two, so they run beside the tests and report after them.
check_beside() {
    local failed=0
    .venv/bin/mypy || failed=1
    if [ -d ".venv-gsplat/gsplat-$other.dist-info" ]; then
        FIT3D_TESTS_SKIP_NOTHING=1 FIT3D_TESTS_GSPLAT=$other PYTHONPATH=.venv-gsplat .venv/bin/pytest -q \
            tests/rasterization/test_gsplat.py tests/rasterization/test_strategy.py tests/plugin/test_strategies.py ||
            failed=1
    fi
    if [ -d .venv-onnx/onnxruntime ]; then
        PYTHONPATH=.venv-onnx .venv/bin/pytest -q tests/test_onnx.py || failed=1
    fi
    return "$failed"
}
report=$(mktemp)
check_beside >"$report" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$report"' EXIT

# Everything that tests ask for is installed here, so none of them may be skipped (but for want of a browser).
# Two processes, each taking whole files, the longest first (tests/conftest.py).
status=0
FIT3D_TESTS_SKIP_NOTHING=1 .venv/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$checker" || status=1
cat "$report"
exit "$status"
