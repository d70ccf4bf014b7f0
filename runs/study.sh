#!/usr/bin/env bash
# What the LLM's texts add, over several seeds: every loss with each kind of text left out, then stage 2.
#   runs/study.sh DATASET MODEL [options of both training scripts]
# Needs datasets/DATASET_synthetic.jsonl. SEEDS="1 2 3"; MAX_LENGTH is in tokens, for every stage; LLM=replay|gpt-4o|...
# compares the passages for stage 2 (LLM=none: no stage 2); ROWS="gold snn" makes some rows only. After an interruption
# the same command goes on, and two of them with other SEEDS may work side by side: what is finished is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET="$1" MODEL="$2"
TRAINING=(--epochs 3 --batch-size 32 --dev-pool 800 "${@:3}")
LENGTH=(--max-length "${MAX_LENGTH:-64}")
SEEDS="${SEEDS:-1 2 3}" LLM="${LLM:-replay}"
DATA="${SYNTRIEVER_HOME:-.}"
TABLE=()

# What was best on dev (see the README), edit here.
declare -A TUNED=(
  [infonce]="--lr 1e-4"
  [snn]="--lr 1e-4"
  [authors]="--lr 1e-4"
  [cluster]="--lr 1e-4"
  [distill]="--lr 1e-4"
)

wanted() { [ -z "${ROWS:-}" ] || [[ " $ROWS " == *" $1 "* ]]; }

measure() { # checkpoint
  [ -f "$DATA/results/$1_${DATASET}_test.json" ] || python evaluate.py "$1" "$DATASET" "${LENGTH[@]}"
}

stage1() { # row, what it is compared with, loss, options
  wanted "$1" || return 0
  TABLE+=("$MODEL-$1-sft${2:+:$MODEL-$2-sft}")
  local seed name
  for seed in $SEEDS; do
    name="$MODEL-$1-s$seed"
    [ -f "$DATA/output/$name-sft-$DATASET/run.json" ] || python train_stage1.py "$MODEL" "$DATASET" --name "$name" \
      --seed "$seed" --loss "$3" ${TUNED[$3]} "${@:4}" "${LENGTH[@]}" "${TRAINING[@]}" --resume
    measure "$name-sft"
  done
}

stage2() { # row, options of parse_comparison.py or "", options of train_stage2.py: from the default stage 1
  wanted "$1" || return 0
  TABLE+=("$MODEL-$1-final:$MODEL-distill-sft")
  local seed name start made kept
  for seed in $SEEDS; do
    name="$MODEL-$1-s$seed" start="$MODEL-distill-s$seed-sft"
    made="$DATA/stage2/${start}_${DATASET}_preferences.jsonl" kept="$DATA/stage2/${start}_$DATASET$(tr -d ' ' <<<"$2").jsonl"
    [ -f "$DATA/stage2/${start}_${DATASET}_top100.jsonl" ] || python retrieval.py "$start" "$DATASET" "${LENGTH[@]}"
    if [ ! -f "$kept" ]; then
      # Every comparison writes one file: kept under a name of its own.
      python stage2/parse_comparison.py "$DATASET" --model "$start" --llm "$LLM" --force $2
      mv "$made.run.json" "$kept.run.json"
      mv "$made" "$kept"
    fi
    [ -f "$DATA/output/$name-final-$DATASET/run.json" ] || python train_stage2.py "$start" "$DATASET" --name "$name" \
      --seed "$seed" --preferences "$kept" "${@:3}" "${LENGTH[@]}" "${TRAINING[@]}" --epochs 1 --resume
    measure "$name-final"
  done
}

measure "$MODEL"
stage1 gold "" infonce
stage1 snn "" snn
stage1 snn-no-cot snn snn --no-cot
stage1 snn-no-positive snn snn --no-positive
stage1 snn-no-negative snn snn --no-negative
stage1 snn-no-relabel snn snn --no-relabel
stage1 authors "" authors
stage1 cluster "" cluster
stage1 distill "" distill
stage1 distill-no-text distill distill --no-synthetic
stage1 distill-no-cot distill distill --no-cot
stage1 distill-no-positive distill distill --no-positive
stage1 distill-no-relabel distill distill --no-relabel
if [ "$LLM" != none ]; then
  stage2 pl "--pairs 10"
  stage2 pl-beta0 "--pairs 10" --beta 0
  stage2 pl-beta1 "--pairs 10" --beta 1
  stage2 pl-lists "--pairs 10" --batching lists
  stage2 pl-n3 "--pairs 3"
  stage2 pl-k10 "--k 10 --pairs 10"
  stage2 bt "--pairs 10" --loss bradley-terry
  stage2 bt-lists "--pairs 10" --loss bradley-terry --batching lists
fi
python runs/study_table.py "$DATASET" "$MODEL" "${TABLE[@]}" --seeds $SEEDS
