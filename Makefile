# Every target sets up what it needs on a fresh machine; the second time that takes no time.
# VENV: where the environment is; EXTRAS: which extras of pyproject.toml are in it; ARGS: passed on, e.g.
#   make test ARGS="-k plan"      make test ARGS="-n 0 -x tests/test_docs"
# How to choose another Python or another torch: scripts/setup.sh.
SHELL := bash
VENV ?= .venv
EXTRAS ?= dev,wandb,deepspeed,mpi
ARGS ?=
TORCH ?=
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Several processes share the cores in tests and in the quick start: one thread each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-quick test-timm test-versions test-benchmarks bench report faults soak lint docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make the virtual environment

$(READY): pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV) -e '.[$(EXTRAS)]'
	@touch $@

train: $(READY) ## train a shared model beside its dense twins, and compare them (about 5 minutes on 2 cores)
	$(PY) -m benchmarks.quality.quickstart $(ARGS)

test: $(READY) ## run all tests (at most 12 minutes on 2 quiet cores)
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-quick: $(READY) ## run the tests that start no process (2 minutes on 2 quiet cores)
	$(PY) -m pytest -n 2 --dist worksteal tests -m "not distributed and not processes and not slow" $(ARGS)

# Beside the environment, because torchvision's default wheel does not fit a CPU build of torch, and transformers would import it.
TIMM := $(VENV)/timm
$(TIMM): $(READY)
	rm -rf $@ $@.part
	release=$$($(PY) -c "import torch; print(int(torch.__version__.split('.')[1]) + 15)") && \
	$(PY) -m pip install -qq --no-deps --target $@.part timm "torchvision==0.$$release.*"
	mv $@.part $@

test-timm: $(TIMM) ## run the tests with timm's networks
	PYTHONPATH=$(TIMM) $(PY) -m pytest tests/test_integrations/test_timm.py $(ARGS)

test-versions: ## run the quick tests with the oldest and the newest torch (the first time, downloads 10 GB); TORCH="2.12.1 …": with others
	@ARGS="$(ARGS)" scripts/test_versions.sh $(TORCH)

test-benchmarks: $(READY) ## run the tests of the benchmarks, and hold every table of README and docs against the results
	$(PY) -m pytest -n 2 --dist worksteal benchmarks/tests $(ARGS)

bench: $(READY) ## as root: the quick benchmarks; ARGS=full: all of them (goes on where it was)
	$(PY) -m benchmarks.bench $(ARGS)

report: $(READY) ## make the tables and figures of README and docs from the results files
	$(PY) -m benchmarks.documents $(ARGS)

faults: $(READY) ## as root: what a run survives, on four emulated hosts (about 30 minutes on 2 cores; goes on where it was)
	$(PY) -m benchmarks.faults.run $(ARGS)

soak: $(READY) ## as root: two hours of training on four emulated hosts, with a random fault every three minutes
	$(PY) -m benchmarks.faults.soak $(ARGS)

lint: $(READY) ## check style, formatting, types, and that imports run one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

docs: $(READY) ## build the documentation's site in site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

wheel: $(READY) ## build the wheel and try it in an environment of its own, outside the repository
	rm -rf dist
	$(PY) -m build --wheel --outdir dist
	away=$$(mktemp -d) && trap "rm -rf $$away" EXIT && PIP_COMPILE=0 scripts/setup.sh $$away/venv dist/*.whl && \
	cp tests/wheel_smoke.py $$away && cd $$away && venv/bin/python wheel_smoke.py && venv/bin/dist-ssn --help >/dev/null

clean: ## remove the environment and everything that was built (runs/ stays)
	rm -rf .venv .versions build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
