#!/usr/bin/env bash
# From a clone to a fine-tuned backbone: install, make (or take) a scene, train, evaluate on held-out frames, export,
# draw, teach the backbone what the scene shows, and probe whether that helped.
#
#   scripts/quickstart.sh                          a small synthetic room, minutes on two cores, no GPU needed
#   scripts/quickstart.sh --data SCENE             your own capture (ScanNet++, nerfstudio or COLMAP layout)
#   scripts/quickstart.sh --backbone-weights FILE  weights of --backbone from a file (machines without network)
#   further: --backbone NAME (dinov2_small)  --steps N  --finetune-steps N (150; 0 stops before stages II and III)
#            --output DIR (quickstart)
set -euo pipefail

data="" backbone="dinov2_small" weights="" steps="" finetune_steps=150 output="quickstart"
need() { [ $# -ge 2 ] || { echo "quickstart.sh: $1 needs a value" >&2; exit 1; }; }
while [ $# -gt 0 ]; do
    case "$1" in
        --data) need "$@"; data=$(realpath "$2"); shift 2 ;;
        --backbone) need "$@"; backbone="$2"; shift 2 ;;
        --backbone-weights) need "$@"; weights=$(realpath "$2"); shift 2 ;;
        --steps) need "$@"; steps="$2"; shift 2 ;;
        --finetune-steps) need "$@"; finetune_steps="$2"; shift 2 ;;
        --output) need "$@"; output=$(realpath -m "$2"); shift 2 ;;
        -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: unknown option $1; see --help" >&2; exit 1 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$output"
output=$(realpath "$output")

seconds() { date +%s; }
started=$(seconds)
if [ ! -x .venv/bin/ns-train ]; then
    echo "== Installing into .venv (downloads about 3 GB once)"
    bash scripts/setup.sh
fi
installed=$(seconds)
# Bare file names on the command line below mean the environment's programs.
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore

if [ -n "$weights" ]; then
    backbone_flags=(--backbone "$backbone" --backbone-weights "$weights")
else
    echo "== Looking for $backbone's weights"
    python -c "import sys; from fit3d_ns.features import describe_backbone; describe_backbone(sys.argv[1])" "$backbone" \
        2>"$output/backbone.log" || { tail -n 1 "$output/backbone.log" >&2; exit 1; }
    if ! python -c "import sys; from fit3d_ns.features import create_extractor; create_extractor(sys.argv[1])" "$backbone" 2>"$output/backbone.log"; then
        echo "   They cannot be had here: $(tail -n 1 "$output/backbone.log")"
        echo "   Going on with RANDOM weights: everything below shows that the tools work, not how good features are."
        backbone="random:vit_tiny_patch16_224"
    fi
    backbone_flags=(--backbone "$backbone")
fi
train_flags=()
for flag in "${backbone_flags[@]}"; do train_flags+=("${flag/#--/--pipeline.datamanager.}"); done
[ -n "$steps" ] && train_flags+=(--max-num-iterations "$steps")

second=""
if [ -z "$data" ]; then
    [ -n "$steps" ] || train_flags+=(--max-num-iterations 1000)
    if [ ! -d "$output/rooms" ]; then
        echo "== Synthesizing furnished rooms"
        fit3d-synthesize --output-dir "$output/rooms" --num-scenes 2 --seed 0
    fi
    data=$(find "$output/rooms" -mindepth 1 -maxdepth 1 -type d | sort | head -n 1)
    second=$(find "$output/rooms" -mindepth 1 -maxdepth 1 -type d | sort | tail -n 1)
fi
scene=$(basename "$data")

echo "== Training splats with features on $data"
run="$output/runs/$scene/fit3d-features/latest"
rm -f "$run/results.json"
set +e
ns-train fit3d-features --data "$data" --output-dir "$output/runs" --experiment-name "$scene" --timestamp latest \
    --vis tensorboard "${train_flags[@]}" 2>&1 | tee "$output/train.log" | grep -E "error|Features|solved|Loading|ScanNet|│|done|^Metrics|^Config"
status=${PIPESTATUS[0]}
set -e
[ "$status" -eq 0 ] && [ -f "$run/results.json" ] || { echo "Training failed; see $output/train.log" >&2; exit 1; }

echo "== Evaluating held-out frames, and drawing their features"
ns-eval --load-config "$run/config.yml" --output-path "$output/$scene-eval.json" \
    --render-output-path "$output/$scene-pictures" > "$output/eval.log" 2>&1 \
    || { tail -n 3 "$output/eval.log" >&2; exit 1; }

echo "== Exporting the scene file"
fit3d-export --load-config "$run/config.yml" --output-path "$output/$scene.safetensors"

finetuned=""
if [ "$finetune_steps" != 0 ]; then
    echo "== Stage II: teaching the backbone what the scene shows ($finetune_steps steps)"
    fit3d-finetune --ckpts "$output/$scene.safetensors" --output-dir "$output/finetuned" --resume never \
        --max-steps "$finetune_steps" ${weights:+--backbone-weights "$weights"} 2>&1 | tee "$output/finetune.log" | grep -v Warning \
        || { tail -n 3 "$output/finetune.log" >&2; exit 1; }
    finetuned="  backbone   $output/finetuned   (report.json: original against fine-tuned)
  look first $output/finetuned/comparison.png   (PCA of original, fine-tuned and lifted features)
"
    if [ -n "$second" ]; then
        echo "== Stage III: a linear depth probe, trained in the room that was lifted and tested in the other"
        probe_flags=(depth --train "$data" --test "$second" --num-iterations 300)
    else
        echo "== Stage III: does a point look the same from two views?"
        probe_flags=(consistency --test "$output/$scene.safetensors" --max-views 12 --max-pairs 30)
    fi
    for assembly in original finetuned; do
        fit3d-probe "${probe_flags[@]}" "${backbone_flags[@]}" --assembly "$assembly" --finetuned "$output/finetuned" \
            --output-path "$output/probes/$scene-$assembly.json" 2>&1 | tee "$output/probe.log" | grep -E "^probe/|error" \
            || { tail -n 3 "$output/probe.log" >&2; exit 1; }
    done
    fit3d-report "$output/probes" "$output/finetuned/report.json" --output-dir "$output/report" > "$output/report.log" 2>&1 \
        || { tail -n 3 "$output/report.log" >&2; exit 1; }
    finetuned="$finetuned  probe      $output/report/tables.html   (original against fine-tuned backbone; also .md, .tex. One scene and
             one seed teach little: docs/results.md has what several scenes and seeds give)
"
fi

finished=$(seconds)
cat <<END

Done in $((finished - installed)) s (installing took $((installed - started)) s before that).
  figures    $output/$scene-eval.json   (psnr, ssim, feature_l1, feature_cosine on held-out frames)
             $run/results.json   (time per phase, memory, size)
  pictures   $output/$scene-pictures/eval_features_pca_0000.png   (left: the ViT's own features, right: rendered ones)
             $output/$scene-pictures/eval_img_0000.png   (left: photograph, right: render)
  scene      $output/$scene.safetensors
$finetuned  look       .venv/bin/ns-viewer --load-config $run/config.yml
END
case "$backbone" in random:*) echo "The backbone had RANDOM weights: give --backbone-weights FILE, or run where downloads work." ;; esac
