#!/usr/bin/env bash
# The ablations of the paper on one dataset, and one table of them.
#   runs/ablation.sh DATASET MODEL [options of both training scripts]
# Needs datasets/DATASET_synthetic.jsonl. LLM=replay|gpt-4o|... compares the passages; MAX_LENGTH is in
# tokens, for every stage. Each row is a checkpoint of its own, MODEL-<row>. After an interruption the same
# command goes on; rows that are finished are kept, with the command that made them in the table.
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET="$1" MODEL="$2"
TRAINING=("${@:3}" --resume)
LENGTH=()
if [ -n "${MAX_LENGTH:-}" ]; then LENGTH=(--max-length "$MAX_LENGTH"); fi
DATA="${SYNTRIEVER_HOME:-.}"
TABLE="$DATA/results/ablation_${MODEL}_$DATASET.txt"
ROWS=("$MODEL")

train() { # name of the checkpoint, command
  ROWS+=("$1")
  [ -f "$DATA/output/$1-$DATASET/run.json" ] || python "${@:2}" "${LENGTH[@]}" "${TRAINING[@]}"
}

stage1() { # row, options
  train "$MODEL-$1-sft" train_stage1.py "$MODEL" "$DATASET" --name "$MODEL-$1" "${@:2}"
}

stage2() { # row, preferences, options
  train "$MODEL-$1-final" train_stage2.py "$MODEL-snn-sft" "$DATASET" --name "$MODEL-$1" --preferences "$2" "${@:3}"
}

preferences() { # file, options: kept under a name of its own, since each comparison writes the same file
  local made="$DATA/stage2/$MODEL-snn-sft_${DATASET}_preferences.jsonl"
  if [ -f "$1" ]; then return; fi
  python stage2/parse_comparison.py "$DATASET" --model "$MODEL-snn-sft" --llm "${LLM:-replay}" --force "${@:2}"
  mv "$made.run.json" "$1.run.json"
  mv "$made" "$1"
}

# Which texts stage 1 learns from, and how (the paper's Table 3, and what the authors' code computes).
stage1 gold --loss infonce
stage1 snn --loss snn
stage1 snn-no-cot --loss snn --no-cot
stage1 snn-no-relabel --loss snn --no-relabel
stage1 authors --loss authors
stage1 cluster --loss cluster
# How stage 2 learns from the preferences: ranking model, regulariser, number of pairs, batches.
python retrieval.py "$MODEL-snn-sft" "$DATASET" "${LENGTH[@]}"
TEN="$DATA/stage2/ablation_${MODEL}_${DATASET}_n10.jsonl" THREE="$DATA/stage2/ablation_${MODEL}_${DATASET}_n3.jsonl"
preferences "$THREE" --pairs 3
preferences "$TEN" --pairs 10
stage2 pl "$TEN"
stage2 pl-beta0 "$TEN" --beta 0
stage2 pl-lists "$TEN" --batching lists
stage2 pl-n3 "$THREE"
stage2 bt "$TEN" --loss bradley-terry

mkdir -p "$DATA/results"
{
  for row in "${ROWS[@]:1}"; do
    python -c 'import json, sys; print(sys.argv[1] + ":", *json.load(open(sys.argv[2]))["command"])' \
      "$row" "$DATA/output/$row-$DATASET/run.json"
  done
  python evaluate.py "${ROWS[@]}" "$DATASET" "${LENGTH[@]}"
} | tee "$TABLE.tmp"
mv "$TABLE.tmp" "$TABLE"
