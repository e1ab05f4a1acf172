# The house: `make demo` trains a small Titans model and lets it write, `make test` proves the code. Both make `.venv`
# first when it is missing or older than what it is made from.

PYTHON ?= python3
VARIANT ?= mag
LAYOUT ?=

VENV := .venv
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help demo test test-layouts test-checkpoints test-cluster test-long tests lint style types format docs clean install

help:
	@echo "make demo [VARIANT=mag|mac|mal|lmm|transformer|sliding_window|gated_deltanet|gated_deltanet_swa|linear_attention|rmt]   train a small model on real text, export it, let it write"
	@echo "          [LAYOUT=\"tensor=2\" | \"sequence=2 memory=hand_off\" | ...]   how its processes divide the work"
	@echo "make test      lint, types and all tests"
	@echo "make test-layouts   every layout of ranks x ZeRO stage x model against one process"
	@echo "make test-checkpoints   every layout's checkpoint resumed under every other, and 30 kills while saving"
	@echo "make test-cluster   runs on a real SLURM inside this machine: ten preemptions, dead nodes, both ways of tracking"
	@echo "make test-long   decoding to 131,072 tokens with every variant"
	@echo "make lint      ruff and mypy only"
	@echo "make format    let ruff rewrite the files"
	@echo "make docs      regenerate docs/config.md from titans_pretrain/config.py"
	@echo "make clean     remove .venv, .demo and caches; runs/ is kept"

# launch/demo.sh checks them again; here so that a misspelt one costs no install.
demo:
	@bash launch/demo.sh --check "$(VARIANT)" "$(LAYOUT)"
	@$(MAKE) --no-print-directory install
	@bash launch/demo.sh "$(VARIANT)" "$(LAYOUT)"

# Three at a time, of one thread each; those on SLURM, which mostly wait, follow each other on two clusters. mypy, which takes
# as long as a core of theirs for a minute, works beside them.
# TESTS="tests/model -k mac" runs a part.
TESTS ?=
test: style
	@$(MAKE) --no-print-directory -j2 types tests

tests: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 3 --dist loadgroup $(TESTS)

# Every layout x ZeRO stage x variant, of which `make test` runs a part. Ten minutes on 2 cores.
test-layouts: install
	OMP_NUM_THREADS=1 TITANS_WHOLE_TABLE=1 $(VENV)/bin/python -m pytest tests/parallel/test_layouts.py --timeout=3600

# Every pair of layouts and ZeRO stages, of which `make test` runs a part, and kills. Five minutes on 2 cores.
test-checkpoints: install
	OMP_NUM_THREADS=1 TITANS_WHOLE_TABLE=1 $(VENV)/bin/python -m pytest tests/train/test_reshard.py tests/train/test_saving.py --timeout=3600

# Ten preemptions in one run, time limits, and all of it once more where SLURM tracks processes by cgroup. Fifteen minutes.
test-cluster: install
	OMP_NUM_THREADS=1 TITANS_CLUSTER=1 $(VENV)/bin/python -m pytest tests/launch --timeout=3600
	OMP_NUM_THREADS=1 TITANS_CLUSTER=1 TITANS_CGROUP=1 $(VENV)/bin/python -m pytest tests/launch --timeout=3600

# Decoding of 131,072 tokens, of which `make test` runs the beginning. Half an hour on 2 cores.
test-long: install
	OMP_NUM_THREADS=1 TITANS_LONG_DECODE=1 $(VENV)/bin/python -m pytest tests/inference/test_long.py -s --timeout=3600

lint: style types

style: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
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
