# make demo: install, train four methods on bundled images, evaluate, write the report
# make check: what a change has to pass: format, lint and types, then the tests
# make test: the tests alone
# make test-faults: the whole battery of faults, of which the tests take a sample; writes docs/reliability.md
# make bench-scale: what millions of images cost, in SCRATCH; writes docs/results/scale.md
# make docs: the site, in build/site
# make format: ruff, in place

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check lint test test-faults bench-scale docs format
.DELETE_ON_ERROR:

demo: $(VENV)/installed-viz
	$(BIN)/solo-ext demo

check: lint test

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

BATTERY := tests/faults $(addprefix tests/training/test_,resume.py safety.py changed_data.py loggers.py evaluate.py unread_keys.py \
  distributed.py) $(addprefix tests/data/test_,workers.py decode.py every_image_once.py sets.py data_tools.py) \
  $(addprefix tests/runs/test_,checkpoints.py other_programs.py encoder.py) tests/networks tests/zoo/test_zoo_download.py \
  tests/evaluation/test_detection.py tests/losses

test-faults: $(VENV)/installed-dev
	FAULTS=all PAGE=docs/reliability.md OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(BATTERY)

SCRATCH ?= build/scale

bench-scale: $(VENV)/installed-dev
	$(BIN)/python benchmarks/scale.py --folder $(SCRATCH)

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || \
	  { echo "solo_ext needs Python 3.10 to 3.14; name one with: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml setup.py $(BIN)/python
	@echo "installing into $(VENV): PyTorch is large, this can take some minutes"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[$*]'
	touch $@
