# Two stacks: onedl (default, current PyTorch) and openmmlab (the upstream packages).
STACK ?= onedl
# Any of pretrain, segmentation, detection, or all; extras add up over calls. Those that need mmcv's
# compiled operators take minutes the first time; continuous integration sets up all (.ci/run).
EXTRAS_onedl := pretrain segmentation
EXTRAS_openmmlab := pretrain
EXTRAS ?= $(EXTRAS_$(STACK))

VENV_onedl := .venv
VENV_openmmlab := .venv-openmmlab
VENV := $(VENV_$(STACK))
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo notebook test docs soak mutants lock lint check release-check links bench format clean-setup

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables: STACK=onedl|openmmlab, EXTRAS=pretrain|segmentation|detection|all, PYTHON=...'

setup:  ## Make or update the virtual environment
	@STACK='$(STACK)' EXTRAS='$(EXTRAS)' tools/setup.sh

demo: setup  ## Pretrain a small model on photographs, CPU or GPU
	$(RUN) tools/demo.py

notebook: setup  ## Run docs/first_encoder.md in Jupyter's kernel, into docs/first_encoder.ipynb
	$(RUN) -m jupytext --to ipynb docs/first_encoder.md
	PYTHONWARNINGS=ignore $(VENV)/bin/jupyter-execute --inplace docs/first_encoder.ipynb

test: setup  ## Run the tests in parallel
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: setup  ## Check format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: setup  ## Build the documentation into build/site; warnings are errors
	rm -rf docs/api build/site
	$(RUN) -m sphinx --fail-on-warning --keep-going -q -b html -c docs . build/site

check: lint docs test  ## Lint, documentation and tests; continuous integration does so with EXTRAS=all

release-check: setup  ## Build wheel and sdist, install them into a new environment and use them
	tools/release_check.sh $(RUN)

links: setup  ## Fetch every external link of the documentation
	$(RUN) -m sphinx -q -b linkcheck -c docs . build/links

soak: setup  ## Inject faults for as long as it takes, and print what happened (docs/reliability.md)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/soak -x -q

mutants: setup  ## Break the code in 300 small ways and count what the tests notice; an hour
	OMP_NUM_THREADS=1 $(RUN) -W ignore tests/mutants.py

lock: setup  ## Renew constraints/onedl-hashes.txt after a change of versions; uses uv
	$(RUN) -m pip install --quiet uv==0.13.9
	PIP_CONFIG_FILE=/dev/null $(VENV)/bin/uv pip compile constraints/onedl.txt --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header --upgrade \
		--quiet --output-file constraints/onedl-hashes.txt

bench: setup  ## Time everything beside its targets (benchmarks/README.md)
	$(RUN) benchmarks/table.py

format: setup  ## Format the code and fix what ruff can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean-setup:  ## Remove the virtual environment of this STACK
	rm -rf $(VENV)
