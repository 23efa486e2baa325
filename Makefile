# Everything a person does here. `make serve` and `make test` need nothing but Python ≥ 3.11 with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := hnet_runtime/ops/native
COMPILED := $(VENV)/.native

.PHONY: serve test install test-all clients cluster image native sanitize wheel lint format bench loadtest ecosystem clean
.DEFAULT_GOAL := help

help:
	@echo "make serve    install into $(VENV) and serve the demo model (HNET_HOST, HNET_PORT, … are honoured)"
	@echo "make test     install and run the fast tests"
	@echo "make install  only install; leaves $(BIN)/hnet"
	@echo "make test-all every test, the slow ones too"
	@echo "make clients  others' clients against the server: npm's openai, LangChain, LiteLLM, installed below build/"
	@echo "make cluster  two replicas on a Ray cluster on this machine: installs the extra ray (0.5 GB)"
	@echo "make image    builds the cpu image with Docker and checks it"
	@echo "make native   compile the native kernels that are out of date (CXX is honoured)"
	@echo "make sanitize the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make wheel    a wheel for this platform, in dist/"
	@echo "make lint     formatting, lint, types, import directions"
	@echo "make bench    the decoding benchmark"
	@echo "make loadtest mixed load on a server of the demo model, with a report below build/loadtests"
	@echo "make ecosystem other engines beside ours, others' tools on ours, Ray Serve, a soak, the image: hours; writes docs/ecosystem.md"

install: $(COMPILED)

$(INSTALLED): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The install has compiled the native kernels in place, if there is a compiler; this says so, and does it again when
# their sources change.
$(COMPILED): $(INSTALLED) $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py
	$(BIN)/python -m hnet_runtime.ops.native.build --optional
	@touch $@

serve: install
	$(BIN)/hnet serve

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not clients and not cluster"

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

clients: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m clients tests/clients

cluster: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster

image:
	docker build --target cpu --tag hnet-serve:cpu .
	$(PYTHON) deploy/check_image.py hnet-serve:cpu

native: $(INSTALLED)
	$(BIN)/python -m hnet_runtime.ops.native.build

sanitize: install
	$(BIN)/python -m tests.native.sanitize

wheel: $(INSTALLED)
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/hnet bench decode

loadtest: install
	$(BIN)/hnet bench serve run mixed --workers 2

clean:
	rm -rf $(VENV) build dist *.egg-info $(NATIVE)/lib .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# llama.cpp is compiled on the first run, which takes ten minutes or more.
ecosystem: install
	$(BIN)/hnet bench peers --report docs/ecosystem.md
	$(BIN)/hnet bench clients --report docs/ecosystem.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/hnet bench cluster --report docs/ecosystem.md
	$(BIN)/hnet bench serve run soak
	if command -v docker > /dev/null; then $(MAKE) image; else deploy/build_without_docker.sh cpu && \
	  $(PYTHON) deploy/check_image.py localhost/hnet-serve:cpu --run \
	  "podman --storage-driver overlay --runtime runc --cgroup-manager cgroupfs run --no-healthcheck \
	  --ulimit nofile=1024:1024 --ulimit nproc=1000:1000"; fi
