#!/usr/bin/env bash
# The ablations of the paper on one dataset, and one table of them.
#   runs/ablation.sh DATASET MODEL [options of both training scripts]
# Needs datasets/DATASET_synthetic.jsonl. LLM=replay|gpt-4o|... compares the passages; MAX_LENGTH is in
# tokens, for every stage. Each row has a checkpoint of its own, MODEL-<row>; rows that are there are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET="$1" MODEL="$2"
shift 2
LENGTH=()
if [ -n "${MAX_LENGTH:-}" ]; then LENGTH=(--max-length "$MAX_LENGTH"); fi
HOME_FOLDER="${SYNTRIEVER_HOME:-.}"
TABLE="$HOME_FOLDER/results/ablation_${MODEL}_$DATASET.txt"
ROWS=("$MODEL") NOTES=("$MODEL: not trained")

stage1() { # row, options
  local name="$MODEL-$1"
  ROWS+=("$name-sft") NOTES+=("$name-sft: train_stage1.py ${*:2}")
  [ -f "$HOME_FOLDER/output/$name-sft-$DATASET/run.json" ] ||
    python train_stage1.py "$MODEL" "$DATASET" --name "$name" "${@:2}" "${LENGTH[@]}" "${TRAINING[@]}"
}

stage2() { # row, preferences, options
  local name="$MODEL-$1"
  ROWS+=("$name-final") NOTES+=("$name-final: train_stage2.py $MODEL-snn-sft ${*:3}")
  [ -f "$HOME_FOLDER/output/$name-final-$DATASET/run.json" ] ||
    python train_stage2.py "$MODEL-snn-sft" "$DATASET" --name "$name" --preferences "$2" "${@:3}" "${LENGTH[@]}" "${TRAINING[@]}"
}

preferences() { # file, options: kept under a name of its own, since each comparison writes the same file
  local made="$HOME_FOLDER/stage2/$MODEL-snn-sft_${DATASET}_preferences.jsonl"
  [ -f "$1" ] && return
  python stage2/parse_comparison.py "$DATASET" --model "$MODEL-snn-sft" --llm "${LLM:-replay}" --force "${@:2}"
  mv "$made" "$1"
  mv "$made.run.json" "$1.run.json"
}

TRAINING=("$@")
# Which texts stage 1 learns from, and how (the paper's Table 3 and what the authors' code computes).
stage1 gold --loss infonce
stage1 snn --loss snn
stage1 snn-no-cot --loss snn --no-cot
stage1 snn-no-relabel --loss snn --no-relabel
stage1 authors --loss authors
stage1 cluster --loss cluster
# How stage 2 learns from the preferences: ranking model, regulariser, number of pairs, batches.
python retrieval.py "$MODEL-snn-sft" "$DATASET" "${LENGTH[@]}"
TEN="$HOME_FOLDER/stage2/ablation_${MODEL}_${DATASET}_n10.jsonl" THREE="$HOME_FOLDER/stage2/ablation_${MODEL}_${DATASET}_n3.jsonl"
preferences "$THREE" --pairs 3
preferences "$TEN" --pairs 10
stage2 pl "$TEN"
stage2 pl-beta0 "$TEN" --beta 0
stage2 pl-lists "$TEN" --batching lists
stage2 pl-n3 "$THREE"
stage2 bt "$TEN" --loss bradley-terry

mkdir -p "$HOME_FOLDER/results"
{
  printf '%s\n' "${NOTES[@]}" "all with: ${LENGTH[*]} ${TRAINING[*]}"
  python evaluate.py "${ROWS[@]}" "$DATASET" "${LENGTH[@]}"
} | tee "$TABLE"
