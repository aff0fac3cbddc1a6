# Everything runs inside .venv, which is made when it is missing and refreshed when the requirements change.
PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin
PY      := $(BIN)/python
# constraints.txt pins what was tested; it fits Python 3.11 and later. `make CONSTRAINTS= ...` installs from the ranges in settings.ini.
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.DEFAULT_GOAL := help
.PHONY: help env test lint export clean-notebooks prepare reproduce lab dist clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: .venv/.stamp ## make or refresh .venv

.venv/.stamp: settings.ini setup.py pyproject.toml constraints.txt
	@echo "Installing into .venv (about 6 GB with torch; half a minute to a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("stremn needs Python 3.10 or later, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -q $(CONSTRAINTS) uv
	@$(BIN)/uv pip install -q --python $(PY) $(CONSTRAINTS) -e '.[dev]' \
	  || { echo "uv could not install; trying pip, which may read other indexes"; $(PY) -m pip install -q $(CONSTRAINTS) -e '.[dev]'; }
	@touch $@

# Where PYTHONDONTWRITEBYTECODE is set, every process of the tests would compile torch again.
test: .venv/.stamp ## contracts (notebooks clean, export and README in sync, ruff), every notebook, every test
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/.stamp ## ruff over notebooks, tests and tools
	@$(PY) -m ruff check nbs tests setup.py .ci

export: .venv/.stamp ## rebuild stremn/ and README.md from the notebooks
	@$(BIN)/nbdev_export
	@$(PY) .ci/readme.py

clean-notebooks: .venv/.stamp ## strip machine-dependent metadata from the notebooks
	@$(BIN)/nbdev_clean

prepare: export clean-notebooks ## before a commit: export, clean, test
	@$(MAKE) --no-print-directory test

reproduce: .venv/.stamp ## rebuild the tables and figures of the tiny protocol into reproduced/
	@$(BIN)/stremn reproduce --out reproduced

lab: .venv/.stamp ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab nbs

dist: .venv/.stamp ## source distribution and wheel into dist/
	@$(PY) -m build

clean: ## remove what the other targets made, .venv excepted
	rm -rf build dist *.egg-info reproduced _proc _docs .pytest_cache .ruff_cache .hypothesis
	find nbs tests stremn .ci -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv
