#!/usr/bin/env bash
# The paper's tables, and our own ablations, from the official data sets. One command per table:
#
#   scripts/reproduce_paper.sh --tables 1 --scannetpp DIR --nyu DIR --scannet DIR     segmentation indoors
#   scripts/reproduce_paper.sh --tables 2 --scannetpp DIR --nyu-depth DIR --scannet DIR   depth indoors
#   scripts/reproduce_paper.sh --tables 3 --scannetpp DIR --ade20k DIR --voc DIR --kitti DIR   out of domain
#   scripts/reproduce_paper.sh --tables 4 --scannetpp DIR               DINOv2-reg, CLIP, MAE, DeiT-III
#   scripts/reproduce_paper.sh --tables 5 --scannetpp DIR --nyu DIR     32, 64, 128 features per Gaussian
#   scripts/reproduce_paper.sh --tables 6 --scannetpp DIR --voc DIR     fine-tuning, adapter, LoRA
#   scripts/reproduce_paper.sh --tables 7 --scannetpp DIR --nyu DIR     adding, linear fusion, concatenation
#   scripts/reproduce_paper.sh --tables 8 --scannetpp DIR --nyu DIR     1, 2, 3 epochs
#   scripts/reproduce_paper.sh --tables 9 10 --scannetpp DIR --nyu DIR --nyu-depth DIR --ade20k DIR --kitti DIR   ViT-B
#   scripts/reproduce_paper.sh --tables 11 --scannetpp DIR --imagenet DIR   image classification
#   scripts/reproduce_paper.sh --tables 12 13 --scannetpp DIR           DPT head; duplicated features
#   scripts/reproduce_paper.sh --tables correspondence concatenation anchors keeping targets leave-one-out --scannetpp DIR --nyu DIR --nyu-depth DIR
#
# Without --tables: all. --paper takes every value of the public code. --list shows what is done and what is missing.
# --on slurm makes all of it jobs of Slurm that wait for each other (SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=1 ... choose
# where); --dry-run prints how many, and the hours and the disk they take.
# Finished commands are never run again, interrupted ones go on. Further: --output DIR (ablations)  --seeds 0 1 2
# --weights dinov2_small=FILE ... (machines without network). Roots may also come from the environment:
# SCANNETPP NYU NYU_DEPTH SCANNET ADE20K VOC KITTI IMAGENET.
set -euo pipefail

case "${1:-}" in -h|--help) sed -n '2,23s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python="$scripts/../.venv/bin/python"
[ -x "$python" ] || python=python
roots=()
for name in SCANNETPP NYU NYU_DEPTH SCANNET ADE20K VOC KITTI IMAGENET; do
    flag="--$(echo "$name" | tr 'A-Z_' 'a-z-')"
    # What is given as a flag wins.
    case " $* " in *" $flag "*) continue ;; esac
    [ -z "${!name:-}" ] || roots+=("$flag" "${!name}")
done
exec "$python" "$scripts/ablations.py" paper "$@" ${roots[@]+"${roots[@]}"}
