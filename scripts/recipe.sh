#!/usr/bin/env bash
# The recipe whose result is meant to be used alone: from captures to one fine-tuned backbone, DIR/vit.
#
#   scripts/recipe.sh --scenes SCENE... --backbone NAME --backbone-weights FILE --output-dir DIR [--seed N]
#
# SCENE is a capture with depth (its geometry comes from the depth, seconds a scene), a capture without (splats are
# trained first, minutes a scene), or a scene file. Rooms of fit3d-synthesize join them: more rooms teach more. Each
# round fine-tunes on the lifted scenes; the next one lifts the same geometry again with the fine-tuned backbone. Finished
# steps are passed over and interrupted ones go on, so the same command continues after any interruption.
#   further: --synthetic-rooms N (8)  --rounds N (1)
#            --steps N (of each round: one pass over all images, at least 1200 steps, 800 without synthetic rooms)
#            --learning-rate X (1e-4, falling like a cosine)
#            --geometry-weight X (3: how much a linear head asks the tokens for depth and normals; 0 matches best)
#            --feature-cache DIR (DIR/cache)
set -euo pipefail

scenes=() backbone="" weights="" output="" seed=42 rooms=8 rounds=1 steps=() rate=1e-4 geometry=3 cache=""
need() { [ $# -ge 2 ] || { echo "recipe.sh: $1 needs a value" >&2; exit 1; }; }
while [ $# -gt 0 ]; do
    case "$1" in
        --scenes) shift; while [ $# -gt 0 ] && [[ "$1" != --* ]]; do scenes+=("$(realpath -s "$1")"); shift; done ;;
        --backbone) need "$@"; backbone="$2"; shift 2 ;;
        --backbone-weights) need "$@"; weights=$(realpath -s "$2"); shift 2 ;;
        --output-dir) need "$@"; output=$(realpath -m "$2"); shift 2 ;;
        --seed) need "$@"; seed="$2"; shift 2 ;;
        --synthetic-rooms) need "$@"; rooms="$2"; shift 2 ;;
        --rounds) need "$@"; rounds="$2"; shift 2 ;;
        --steps) need "$@"; steps=(--max-steps "$2"); shift 2 ;;
        --learning-rate) need "$@"; rate="$2"; shift 2 ;;
        --geometry-weight) need "$@"; geometry="$2"; shift 2 ;;
        --feature-cache) need "$@"; cache=$(realpath -m "$2"); shift 2 ;;
        -h|--help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "recipe.sh: unknown option $1; see --help" >&2; exit 1 ;;
    esac
done
[[ "$rooms" =~ ^[0-9]+$ && "$rounds" =~ ^[1-9][0-9]*$ ]] ||
    { echo "recipe.sh: --synthetic-rooms and --rounds take a number" >&2; exit 1; }
for name in scenes backbone output; do
    flag="--$name"; [ "$name" = output ] && flag="--output-dir"
    [ -n "${!name:-}" ] || { echo "recipe.sh: $flag is missing; see --help" >&2; exit 1; }
done
tools="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[ ! -d "$tools" ] || export PATH="$tools:$PATH"
mkdir -p "$output"
cache="${cache:-$output/cache}"
# A folder with a fine-tuned backbone is a backbone like any other; a relative name of one would not survive a `cd`.
[ ! -d "$backbone" ] || backbone=$(realpath "$backbone")
backbone_flags=(--backbone "$backbone" ${weights:+--backbone-weights "$weights"})

# How many channels the backbone has, and what each scene brings.
channels="" with_depth=() others=() files=()
while IFS=$'\t' read -r kind value; do
    case "$kind" in
        channels) channels="$value" ;; depth) with_depth+=("$value") ;; file) files+=("$value") ;; *) others+=("$value") ;;
    esac
done < <(python - "$backbone" "$weights" "${scenes[@]}" <<'PY'
import sys
from pathlib import Path

from fit3d_ns.cli.lift import name_capture
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.features import describe_backbone

backbone, weights, *names = sys.argv[1:]
called = [Path(name).stem if name.endswith(".safetensors") else name_capture(Path(name)) for name in names]
for name in called:
    if called.count(name) > 1:
        sys.exit(f"recipe.sh: several scenes are called {name}; rename one")
for name in names:
    if Path(name).suffix == ".safetensors":
        print("file", name, sep="\t")
        continue
    try:
        frames = read_capture(Path(name)).frames
    except ValueError as error:
        sys.exit(f"recipe.sh: {error}")
    print("depth" if all(frame.depth_path for frame in frames if not frame.is_bad) else "photographs", name, sep="\t")
try:
    print("channels", describe_backbone(backbone, Path(weights) if weights else None).embed_dim, sep="\t")
except ValueError as error:
    sys.exit(f"recipe.sh: {error}")
PY
)
[ -n "$channels" ] || exit 1
# All channels of a small backbone, most of what a large one holds: what 64 leave out teaches as well. Nothing is solved,
# because fine-tuning takes features averaged over views.
lift_flags=(--feature-dim $((channels < 192 ? channels : 192)) --max-passes 0 --feature-cache "$cache")

lifted="$output/round-1/scenes" parts=(scenes)
if [ "$rooms" -gt 0 ]; then
    echo "== $rooms synthetic rooms"
    [ -f "$output/rooms/synthesis.json" ] ||
        fit3d-synthesize --output-dir "$output/rooms" --num-scenes "$rooms" --num-frames 32 --width 320 --height 320 --seed 7
    found=("$output"/rooms/room_*)
    [ "${#found[@]}" = "$rooms" ] || echo "recipe.sh: taking the ${#found[@]} rooms that are in $output/rooms" >&2
    fit3d-lift --surface depth --cell-pixels 3 --data "${found[@]}" "${backbone_flags[@]}" \
        "${lift_flags[@]}" --output-dir "$output/round-1/rooms"
    parts+=(rooms)
    [ ${#steps[@]} -gt 0 ] || steps=(--min-steps 1200)
fi
[ ${#steps[@]} -gt 0 ] || steps=(--min-steps 800)
if [ ${#with_depth[@]} -gt 0 ]; then
    echo "== Geometry from depth, and features: ${#with_depth[@]} scenes"
    # Smaller Gaussians than for a picture: what they show teaches matching.
    fit3d-lift --surface depth --cell-pixels 3 --data "${with_depth[@]}" "${backbone_flags[@]}" \
        "${lift_flags[@]}" --output-dir "$lifted"
fi
if [ ${#files[@]} -gt 0 ]; then
    echo "== Features of ${#files[@]} scene files"
    fit3d-lift --scene "${files[@]}" "${backbone_flags[@]}" "${lift_flags[@]}" --output-dir "$lifted/"
fi
for scene in ${others[@]+"${others[@]}"}; do
    folder="${scene%/*.json}"
    name=$(basename "${folder%/dslr}")
    [ ! -f "$lifted/$name.safetensors" ] || continue
    echo "== Splats of $name"
    run="$output/splats/$name/fit3d-features/run"
    resume=()
    [ -z "$(ls "$run/nerfstudio_models" 2>/dev/null)" ] || resume=(--load-dir "$run/nerfstudio_models")
    train_flags=()
    for flag in "${backbone_flags[@]}"; do train_flags+=("${flag/#--/--pipeline.datamanager.}"); done
    ns-train fit3d-features --data "$scene" --output-dir "$output/splats" --experiment-name "$name" --timestamp run \
        --vis tensorboard "${train_flags[@]}" --pipeline.datamanager.feature-cache "$cache" ${resume[@]+"${resume[@]}"}
    mkdir -p "$lifted"
    fit3d-lift --load-config "$run" "${lift_flags[@]}" --output-path "$lifted/$name.safetensors"
done

for ((round = 1; round <= rounds; round++)); do
    result="$output/round-$round/vit"
    [ "$round" != "$rounds" ] || result="$output/vit"
    echo "== Round $round of $rounds: fine-tuning"
    fit3d-finetune --ckpts "${parts[@]/#/$output/round-$round/}" --output-dir "$result" --seed "$seed" \
        "${steps[@]}" --learning-rate "$rate" --schedule cosine --geometry-weight "$geometry"
    if [ "$round" -lt "$rounds" ]; then
        echo "== Round $round of $rounds: lifting the same geometry with the fine-tuned backbone"
        for part in "${parts[@]}"; do
            fit3d-lift --scene "$output/round-$round/$part"/*.safetensors --backbone "$result" "${lift_flags[@]}" \
                --output-dir "$output/round-$((round + 1))/$part/"
        done
    fi
done
echo
echo "The fine-tuned backbone: $output/vit"
