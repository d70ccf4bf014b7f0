#!/usr/bin/env bash
# The README's six commands on the embedded dataset, and then the label-free ones. LLM=replay (default) | qwen2.5-1.5b |
# smollm2 | gpt-4o | ...
# LEDGER=FILE keeps a live teacher's replies there; with LLM=replay they are what answers.
set -euo pipefail
cd "$(dirname "$0")/.."

LLM="${LLM:-replay}"
TEACHER=(--llm "$LLM" --force)
if [ -n "${LEDGER:-}" ]; then TEACHER+=(--ledger "$LEDGER"); fi
# A live teacher is asked about a few queries only; set LIMIT to ask about more.
if [ "$LLM" != replay ]; then TEACHER+=(--limit "${LIMIT:-16}"); fi
# A small model fails often, and gives nearly all passages of a list one grade: the demo goes on with what it can do, and asks
# about one passage at a time.
GRADED=(--graded)
case "$LLM" in qwen2.5-1.5b | smollm2 | gguf:*) TEACHER+=(--max-failure-rate 1) GRADED+=(--pointwise) ;; esac
# Settings for two CPU cores: every stage reads 96 tokens of a text; a small dev pool.
SHORT=(--max-length 96)
TRAINING=("${SHORT[@]}" --dev-pool 300)

step() { echo; echo "\$ $*"; "$@"; }

step python datasets/build_pydocs.py
step python datasets/parse_synthetic.py pydocs "${TEACHER[@]}"
step python train_stage1.py minilm pydocs "${TRAINING[@]}"
step python retrieval.py minilm-sft pydocs "${SHORT[@]}"
step python stage2/parse_comparison.py pydocs --model minilm-sft --pairs 3 "${TEACHER[@]}"
step python train_stage2.py minilm-sft pydocs "${TRAINING[@]}"

# The same queries without their labels: the LLM grades candidates, and its grades alone train the same encoder.
FREE=(--name minilm-free)
step python retrieval.py minilm pydocs --fuse "${FREE[@]}" "${SHORT[@]}"
step python stage2/parse_comparison.py pydocs --model minilm "${FREE[@]}" "${GRADED[@]}" "${TEACHER[@]}"
step python train_stage1.py minilm pydocs --judgements llm "${FREE[@]}" "${TRAINING[@]}"

step python evaluate.py bm25 minilm minilm-free-sft minilm-sft minilm-final pydocs "${SHORT[@]}"
echo
echo "Open results/report.html: the tables, every pair of models query by query, and the loss curves."
