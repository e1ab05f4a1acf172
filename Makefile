# The house: `make demo` trains a small Titans model and lets it write, `make test` proves the code. Both make `.venv`
# first when it is missing or older than what it is made from.

PYTHON ?= python3
VARIANT ?= mag

VENV := .venv
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs clean install

help:
	@echo "make demo [VARIANT=mag|mac|mal|lmm|transformer|sliding_window]   train a small model on real text, export it, let it write"
	@echo "make test      lint, types and all tests"
	@echo "make lint      ruff and mypy only"
	@echo "make format    let ruff rewrite the files"
	@echo "make docs      regenerate docs/config.md from titans_pretrain/config.py"
	@echo "make clean     remove .venv, .demo and caches; runs/ is kept"

# launch/demo.sh checks VARIANT again; here so that a misspelt one costs no install.
demo:
	@bash launch/demo.sh --check "$(VARIANT)"
	@$(MAKE) --no-print-directory install
	@bash launch/demo.sh "$(VARIANT)"

# One thread: the tests start several processes of their own.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: install
	$(VENV)/bin/python -m titans_pretrain.config > docs/config.md.tmp
	mv docs/config.md.tmp docs/config.md

clean:
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMP)

# The stamp is the last line, so an interrupted or failed install is tried again. A .venv that works is kept and
# brought up to date; one that does not is made anew.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@rm -f $@
	@bash launch/make_venv.sh $(PYTHON) $(VENV)
	@touch $@
