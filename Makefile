# Two targets do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: help quickstart test real tiny-base bench chaos lint clean

help:
	@echo "make quickstart  install into $(VENV), train the embedded model, show answers before and after"
	@echo "make test        the whole test suite"
	@echo "make real        train a real 135M model on real conversations, offline (under 10 minutes, 2 cores)"
	@echo "make tiny-base   rebuild the embedded model from random weights"
	@echo "make chaos       kills, signals, NaN, full disks, races, fuzzing: docs/reliability.md (70 minutes)"
	@echo "make lint        ruff check and ruff format --check"
	@echo "make clean       remove build, dist and $(VENV)"
	@echo "make bench       start-up times, the cost of EMA and monitor, speed of reading rows"

quickstart: $(VENV)/.installed
	$(RUN)/forge train recipes/quickstart.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto --dist loadfile

real: $(VENV)/.installed-real
	$(RUN)/python recipes/real_prepare.py --out build/real
	$(RUN)/forge train recipes/real-lora.yaml
	$(RUN)/forge train recipes/real-qlora.yaml

tiny-base: $(VENV)/.installed
	$(RUN)/python recipes/tiny_base.py all build/tiny-base
	$(RUN)/forge train recipes/tiny-base.yaml --overwrite
	$(RUN)/python recipes/tiny_base.py ship build/tiny-base

bench: $(VENV)/.installed-test
	$(RUN)/python tests/benchmarks/start_up.py
	$(RUN)/python tests/benchmarks/overhead.py
	$(RUN)/python tests/benchmarks/save_stall.py
	$(RUN)/python tests/benchmarks/data_scan.py --size-mb 100

chaos: $(VENV)/.installed-test
	$(RUN)/python tests/campaign/campaign.py --write

lint: $(VENV)/.installed-test
	$(RUN)/python -m pip install -q ruff && $(RUN)/ruff check . && $(RUN)/ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Forge needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 5; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[qlora]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[qlora,test]"
	@touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(RUN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[real]"
	@touch $@

clean:
	rm -rf build dist $(VENV)
