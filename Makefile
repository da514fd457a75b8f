# The commands of Brim's developers and of CI: the same everywhere. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

BIN := .venv/bin
PROMPT ?= The three primary colours are
PORT ?= 8000
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help setup run serve test check lint types structure docs format bench clean

help: ## List these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do \
	  printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: ## Prepare .venv with pinned dependencies, the C kernels and the demo model
	@scripts/setup.sh

run: setup ## Answer a prompt (PROMPT=...) with the demo model and show the memory ledger
	@$(BIN)/brim run demo "$(PROMPT)" --temperature 0 --max-tokens 48 --memory-report
	@printf '\nServe it over the OpenAI API:  make serve   (or: $(BIN)/brim serve demo --port $(PORT))\n'

serve: setup ## Serve the demo model over the OpenAI API (PORT=8000)
	@exec $(BIN)/brim serve demo --port $(PORT)

test: setup lint types ## Set up, lint, types and the whole test suite
	@scripts/test.sh $(PYTEST_ARGS)

check: lint types structure docs ## The quick part: lint, types, house rules, generated docs

lint:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types:
	@$(BIN)/mypy

structure:
	@$(BIN)/python -m pytest tests/structure

docs:
	@$(BIN)/python scripts/generate_docs.py --check

format: setup ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python scripts/generate_docs.py

bench: setup ## Measure the demo model (BENCH_ARGS=...)
	@$(BIN)/brim bench suite --model demo $(BENCH_ARGS)

clean: ## Remove .venv and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
