# All targets work from a fresh clone: each sets up .venv first.
# PYTHON: an interpreter of 3.11 or 3.12.   PIP_ARGS: more arguments for pip, such as an index.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-test

LMMS_VENV := .venv-lmms-eval
LMMS_READY := $(LMMS_VENV)/.ready

.PHONY: setup demo serve test chaos lmms-eval lint loadtest dashboards clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or 3.12 is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this takes a minute or two) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[worker,embedded,loadtest,tracing,dev]'
	@touch $@

# Triton takes 0.7 GB, which only the tests of the kernels need where there is no GPU.
$(TEST_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[kernels]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m app.demo

serve: $(READY)
	@$(BIN)/python -m app serve

test: $(TEST_READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# CHAOS_SEED: a run that has been seen before; CHAOS_MINUTES: how long the faults go on.
chaos: $(TEST_READY)
	$(BIN)/python -m tests.chaos --minutes $(or $(CHAOS_MINUTES),5) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

# lmms-eval wants an av of before 16 and a torchvision, which we have not: it is installed without
# its dependencies, beside what it imports for the task of our test.
lmms-eval: $(LMMS_READY)
	$(LMMS_VENV)/bin/python -m pytest tests/lmms_plugin $(PYTEST_ARGS)

$(LMMS_READY): pyproject.toml constraints.txt tests/lmms_plugin/requirements.txt
	@test -x $(LMMS_VENV)/bin/python || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[worker]' pytest pytest-asyncio pytest-timeout \
		--requirement tests/lmms_plugin/requirements.txt
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--no-deps lmms-eval==0.7.3
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# LOADTEST_ARGS: `--model medium`, `--users 1 4 8`, `--duration 30`, `--out FOLDER`, see --help.
loadtest: $(TEST_READY)
	$(BIN)/python -m loadtest.compare $(LOADTEST_ARGS)

dashboards: $(READY)
	$(BIN)/python -m deploy.grafana.generate
	$(BIN)/python -m deploy.k8s.generate

clean:
	rm -rf $(VENV) $(LMMS_VENV) .dycoke .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
