#!/usr/bin/env bash
# The same tables as reproduce_paper.sh on small scenes, to see on one machine what matters and that everything runs.
#
#   scripts/reproduce_small.sh                           synthetic rooms and RANDOM weights: shows that everything runs
#   scripts/reproduce_small.sh --train SCENES... --test SCENES... --backbone NAME --backbone-weights FILE
#   scripts/reproduce_small.sh --list ...                what is done and what is missing
#   further: --tables 5 6 8 ...  --output DIR (ablations)  --seeds 0 1 2  --steps N (of stage II, for one "epoch")
#            --colour-steps N  --probe-iterations N  --labelled FOLDERS...  --more-backbones NAME=FILE ...
#
# Scenes are folders in ScanNet++'s layout with depth, labels or both; what they have is probed. Finished commands are
# never run again, interrupted ones go on.
set -euo pipefail

case "${1:-}" in -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python="$scripts/../.venv/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$scripts/ablations.py" small "$@"
