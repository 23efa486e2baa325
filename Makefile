# Everything a person does here. `make serve` and `make test` need nothing but Python ≥ 3.11 with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: serve test install test-all lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make serve    install into $(VENV) and serve the demo model (HNET_HOST, HNET_PORT, … are honoured)"
	@echo "make test     install and run the fast tests"
	@echo "make install  only install; leaves $(BIN)/hnet"
	@echo "make test-all every test, the slow ones too"
	@echo "make lint     formatting, lint, types, import directions"
	@echo "make bench    the decoding benchmark"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: install
	$(BIN)/hnet serve

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
