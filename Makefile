# All targets work from a fresh clone: each sets up .venv first.
# PYTHON: an interpreter of 3.11 or 3.12.   PIP_ARGS: more arguments for pip, such as an index.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-test
BROWSER_READY := $(VENV)/.ready-browser

LMMS_VENV := .venv-lmms-eval
LMMS_READY := $(LMMS_VENV)/.ready

CLIENTS_VENV := .venv-clients
CLIENTS_READY := $(CLIENTS_VENV)/.ready

# The lines below that have a `##` are what `make help` prints.
.PHONY: help setup demo serve test browser chaos clients lmms-eval evaluate lint loadtest dashboards
.PHONY: requirements review sbom clean

help:  ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv and install what constraints.txt pins

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

demo: $(READY)  ## ask about the bundled clip, with and without DyCoke
	@$(BIN)/python -m app.demo

serve: $(READY)  ## the whole service on http://127.0.0.1:8000
	@$(BIN)/python -m app serve

# TEST_PROCESSES: how many processes share the files of tests; each holds up to 2 GB. On a GPU leave
# it at 0, one process without others: tests measure the device's memory.
TEST_PROCESSES ?= 0

test: $(TEST_READY)  ## the suite; PYTEST_ARGS="tests/engine -q" for a part, TEST_PROCESSES=2
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

# Debian's Chromium, driven by playwright's client: `apt-get install chromium`.
browser: $(BROWSER_READY)  ## the page in a real Chromium, in both colour schemes and at two widths
	$(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

$(BROWSER_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[browser]'
	@touch $@

# CHAOS_SEED: a run that has been seen before; CHAOS_MINUTES: how long faults are injected.
CHAOS_ARGS = $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))
chaos: $(TEST_READY)  ## five minutes of faults, then one of a single machine; CHAOS_SEED=, CHAOS_MINUTES=
	$(BIN)/python -m tests.chaos --minutes $(or $(CHAOS_MINUTES),5) $(CHAOS_ARGS)
	$(BIN)/python -m tests.chaos --embedded --minutes 1 $(CHAOS_ARGS)

# LiteLLM wants an older openai than the suite has, and neither it nor LangChain is ours to install:
# the clients have an environment without our dependencies, and the service runs in its own.
clients: $(READY) $(CLIENTS_READY)  ## real clients against the service: curl, openai, LiteLLM, LangChain
	SERVER_PYTHON=$(abspath $(BIN)/python) $(CLIENTS_VENV)/bin/python -m pytest \
		-c tests/clients/pytest.ini --rootdir . tests/clients $(PYTEST_ARGS)

$(CLIENTS_READY): tests/clients/requirements.txt tests/clients/constraints.txt
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint tests/clients/constraints.txt --requirement tests/clients/requirements.txt
	@touch $@

# lmms-eval wants an av of before 16 and a torchvision, which we have not: it is installed without
# its dependencies, and what it imports for the task of our test.
lmms-eval: $(LMMS_READY)  ## the real lmms-eval: our model in it, and its model on the service
	$(LMMS_VENV)/bin/python -m pytest tests/lmms_plugin $(PYTEST_ARGS)

$(LMMS_READY): pyproject.toml constraints.txt $(wildcard tests/lmms_plugin/*.txt)
	@test -x $(LMMS_VENV)/bin/python || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt --editable '.[worker,embedded]' pytest pytest-asyncio pytest-timeout \
		--requirement tests/lmms_plugin/requirements.txt
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--requirement tests/lmms_plugin/tables.txt
	$(LMMS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		--no-deps lmms-eval==0.7.3
	@touch $@

review: $(TEST_READY)  ## an attacker's review of the service, in full: SECURITY.md's table
	$(BIN)/python -m tests.security --full

# Both ask the model with full tokens and with DyCoke. TASKS: lmms-eval's, on one video per question;
# some read HF_HOME, and say no more than that it is missing.
TASKS ?= nextqa_mc_test
EVALUATION ?= evaluation
HF_HOME ?= $(HOME)/.cache/huggingface
LMMS = HF_HOME=$(HF_HOME) $(LMMS_VENV)/bin/python -m lmms_eval --model dycoke --tasks $(TASKS) --batch_size 8 \
	--output_path $(EVALUATION)/lmms-eval $(LMMS_ARGS) --model_args pretrained=$(MODEL)
evaluate: $(READY) $(LMMS_READY)  ## the laboratory and lmms-eval with a model: MODEL=, TASKS=, LAB_ARGS=, LMMS_ARGS=
	@test -n "$(MODEL)" || { echo "make evaluate MODEL=DIRECTORY or hub id"; exit 2; }
	$(BIN)/python -m loadtest.accuracy --model $(MODEL) --output $(EVALUATION)/laboratory $(LAB_ARGS)
	$(LMMS)
	$(LMMS),dycoke=True

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# LOADTEST_ARGS: `--model medium`, `--users 1 4 8`, `--duration 30`, `--out FOLDER`, see --help.
# `--auto`: policy auto against both, under a load that steps up and down.
loadtest: $(TEST_READY)  ## full tokens against DyCoke through the service; LOADTEST_ARGS=
	$(BIN)/python -m loadtest.compare $(LOADTEST_ARGS)

dashboards: $(READY)  ## write what is generated: dashboards, manifests, docs/reference.md
	$(BIN)/python -m deploy.grafana.generate
	$(BIN)/python -m deploy.k8s.generate
	$(BIN)/python -m deploy.reference

requirements: $(READY)  ## deploy/requirements: hashes of what constraints.txt pins, from PyPI
	$(BIN)/python -m deploy.requirements.generate

sbom: $(READY)  ## dist/sbom: what is in each image, as CycloneDX, out of deploy/requirements
	@mkdir -p dist/sbom
	@for file in deploy/requirements/*.txt; do \
		$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --validate \
			--output-file dist/sbom/$$(basename $$file .txt).cdx.json $$file || exit 1; \
	done

clean:  ## remove what the targets made
	rm -rf $(VENV) $(LMMS_VENV) $(CLIENTS_VENV) .dycoke .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		build dist *.egg-info
