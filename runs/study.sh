#!/usr/bin/env bash
# What the LLM's texts add, over several seeds: every loss with each kind of text left out, then stage 2.
#   runs/study.sh DATASET MODEL [options of both training scripts]
# Needs datasets/DATASET_synthetic.jsonl. SEEDS="1 2 3"; MAX_LENGTH is in tokens, for every stage; LLM=replay|gpt-4o|...
# compares the passages for stage 2 (LLM=none: no stage 2); ROWS="gold snn" makes some rows only; JOBS=12 trains as many
# at once (a GPU has room for them). After an interruption the same command goes on: what is finished is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

DATASET="$1" MODEL="$2"
TRAINING=(--dev-pool 6000 --resume "${@:3}")
LENGTH=(--max-length "${MAX_LENGTH:-256}")
SEEDS="${SEEDS:-1 2 3}" LLM="${LLM:-replay}" JOBS="${JOBS:-1}"
DATA="${SYNTRIEVER_HOME:-.}"
TABLE=()

wanted() { [ -z "${ROWS:-}" ] || [[ " $ROWS " == *" $1 "* ]]; }

make_and_measure() { # checkpoint, the command that makes it
  [ "$#" = 1 ] || [ -f "$DATA/output/$1-$DATASET/run.json" ] || python "${@:2}" "${LENGTH[@]}"
  [ -f "$DATA/results/$1_${DATASET}_test.json" ] || python evaluate.py "$1" "$DATASET" "${LENGTH[@]}"
}

beside() { # the same, while others of up to JOBS run; one that fails lacks in the table, which says so
  if [ "$JOBS" = 1 ]; then make_and_measure "$@"; return; fi
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
  make_and_measure "$@" &
}

stage1() { # row, what it is compared with, options
  wanted "$1" || return 0
  TABLE+=("$MODEL-$1-sft${2:+:$MODEL-$2-sft}")
  for seed in $SEEDS; do
    beside "$MODEL-$1-s$seed-sft" train_stage1.py "$MODEL" "$DATASET" --name "$MODEL-$1-s$seed" --seed "$seed" \
      "${TRAINING[@]}" "${@:3}"
  done
}

stage2() { # row, options of parse_comparison.py, options of train_stage2.py: from the default stage 1
  wanted "$1" || return 0
  TABLE+=("$MODEL-$1-final:$MODEL-distill-sft")
  local start made kept
  for seed in $SEEDS; do
    start="$MODEL-distill-s$seed-sft"
    made="$DATA/stage2/${start}_${DATASET}_preferences.jsonl" kept="$DATA/stage2/${start}_$DATASET$(tr -d ' ' <<<"$2").jsonl"
    [ -f "$DATA/stage2/${start}_${DATASET}_top100.jsonl" ] || python retrieval.py "$start" "$DATASET" "${LENGTH[@]}"
    if [ ! -f "$kept" ]; then
      # Every comparison writes one file: kept under a name of its own.
      python stage2/parse_comparison.py "$DATASET" --model "$start" --llm "$LLM" --force $2
      mv "$made.run.json" "$kept.run.json"
      mv "$made" "$kept"
    fi
    beside "$MODEL-$1-s$seed-final" train_stage2.py "$start" "$DATASET" --name "$MODEL-$1-s$seed" --seed "$seed" \
      --preferences "$kept" "${TRAINING[@]}" "${@:3}"
  done
}

make_and_measure "$MODEL"
stage1 gold "" --loss infonce
stage1 paper "" --paper
stage1 authors "" --loss authors
stage1 cluster "" --loss cluster
stage1 snn "" --loss snn
stage1 snn-no-cot snn --loss snn --no-cot
stage1 snn-no-positive snn --loss snn --no-positive
stage1 snn-no-negative snn --loss snn --no-negative
stage1 snn-no-relabel snn --loss snn --no-relabel
stage1 distill ""
stage1 distill-no-text distill --no-synthetic
stage1 distill-no-cot distill --no-cot
stage1 distill-no-positive distill --no-positive
stage1 distill-no-relabel distill --no-relabel
stage1 distill-no-corpus distill --corpus-weight 0
wait
if [ "$LLM" != none ]; then
  PL=(--loss partial-plackett-luce) BT=(--loss bradley-terry)
  stage2 pl "--pairs 10" "${PL[@]}" --batching pairs
  stage2 pl-lists "--pairs 10" "${PL[@]}" --batching lists
  stage2 bt "--pairs 10" "${BT[@]}" --batching pairs
  stage2 bt-lists "--pairs 10" "${BT[@]}" --batching lists
  stage2 bt-beta0 "--pairs 10" "${BT[@]}" --beta 0
  stage2 bt-beta1 "--pairs 10" "${BT[@]}" --beta 1
  stage2 bt-n3 "--pairs 3" "${BT[@]}"
  stage2 bt-k10 "--k 10 --pairs 10" "${BT[@]}"
  wait
fi
python runs/study_table.py "$DATASET" "$MODEL" "${TABLE[@]}" --seeds $SEEDS
