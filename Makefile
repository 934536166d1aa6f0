# make demo: install, train four methods on bundled images, evaluate, write the report
# make test: install the test extras and pass the tests
# make format, make check: ruff

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test format check
.DELETE_ON_ERROR:

demo: $(VENV)/installed-viz
	$(BIN)/solo-ext demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "solo_ext needs Python 3.10 to 3.12; name one with: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: setup.py $(BIN)/python
	@echo "installing into $(VENV): PyTorch is large, this can take some minutes"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[$*]'
	touch $@
