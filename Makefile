# Needs python3 (3.11 or newer) and make. Everything goes into .venv.
SEED ?= 0
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test lint clean

.venv: .venv/stamp

.venv/stamp: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -r requirements.lock
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

# A model that learns two-digit addition on the CPU, from nothing to a plot. Each run replaces the one before.
quickstart: .venv/stamp
	rm -rf $(RUN)
	$(BIN)/python scripts/make_tiny_model.py
	$(BIN)/pgrpo train --config quickstart.yaml seed=$(SEED)
	$(BIN)/pgrpo plot $(RUN)
	$(BIN)/python scripts/summarize.py $(RUN)

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/pytest

clean:
	rm -rf .venv .cache runs dist build *.egg-info .pytest_cache .ruff_cache .hypothesis
