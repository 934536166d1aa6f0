# make demo: install, train four methods on bundled images, evaluate, write the report
# make check: what a change has to pass: format, lint and types, then the tests
# make test: the tests alone
# make test-faults: the whole battery of faults, of which the tests take a sample; writes docs/reliability.md
# make bench: what is claimed of speed, measured on this machine; fills the tables of README.md and docs/results/bench.md
# make gpu: everything that only a GPU can show, in GPU_MINUTES=9; the same command goes on. CIFAR=PATH names CIFAR-10,
#   PYTHON=python3 an interpreter that has the packages (nothing is installed), SOLO_LEARN=PATH (an environment variable)
#   a checkout to compare with; DEVICE=cpu: all of it in miniature
# make gpu-bundle CIFAR=cifar10.tar.xz: build/gpu-bundle, for a GPU machine without a network
# make bench-scale: what millions of images cost, in SCRATCH; writes docs/results/scale.md
# make docs: the site, in build/site
# make format: ruff, in place

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check lint test test-faults bench bench-scale gpu gpu-bundle docs format
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

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench.py

GPU_MINUTES ?= 9
DEVICE ?= cuda
CIFAR ?=
KIT := $(if $(filter command line environment,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))

gpu:
	$(KIT) benchmarks/gpu --minutes $(GPU_MINUTES) --device $(DEVICE) --cifar '$(CIFAR)' $(GPU_OPTIONS)

BUNDLE := build/gpu-bundle

gpu-bundle:
	@test -f '$(CIFAR)' || { echo "CIFAR=PATH names the archive of CIFAR-10 as JPEGs, train/ and test/"; exit 2; }
	rm -rf $(BUNDLE)
	mkdir -p $(BUNDLE)/solo_ext
	git archive HEAD | tar -x -C $(BUNDLE)/solo_ext
	$(PYTHON) -m pip wheel --disable-pip-version-check -q --no-deps -w $(BUNDLE)/wheels \
	  'omegaconf>=2.3,<2.4' 'hydra-core>=1.3' antlr4-python3-runtime==4.9.3
	for wheel in $(BUNDLE)/wheels/*.whl; do $(PYTHON) -m zipfile -e $$wheel $(BUNDLE)/packages; done
	rm -r $(BUNDLE)/wheels
	cp '$(CIFAR)' $(BUNDLE)/
	sed -e "s/COMMIT/$$(git rev-parse --short HEAD)/" -e 's/ARCHIVE/$(notdir $(CIFAR))/' benchmarks/gpu/bundle.txt \
	  > $(BUNDLE)/README
	du -sm $(BUNDLE)

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
