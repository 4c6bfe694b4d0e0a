# make demo   the main job: makes .venv, compresses a digit classifier, writes report/
# make test   lint, types and all the tests
# make test-kernels   the kernels for TPUs and GPUs, compiled and interpreted on the CPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS_VENV ?= .venv-kernels
KERNELS_READY := $(KERNELS_VENV)/.ready
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

NATIVE := $(wildcard kernels/cpu/*.cc kernels/cpu/*.h) kernels/cpu/build.py setup.py

.PHONY: demo test test-native test-arm test-kernels wheel lint mutations packages clean

demo: $(READY)
	$(BIN)/python experiments/compress_digits.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

# The native kernels against textbook loops, under the address and undefined-behaviour sanitizers.
test-native:
	$(PYTHON) kernels/cpu/build.py --sanitize --test build/native_test
	build/native_test

# The same for 64-bit Arm, compiled here and run by qemu (Debian: g++-aarch64-linux-gnu and
# qemu-user-static); without the sanitizers, which qemu does not run.
test-arm:
	CXX="aarch64-linux-gnu-g++ -static" $(PYTHON) kernels/cpu/build.py --machine aarch64 \
		--test build/native_test_arm
	qemu-aarch64-static build/native_test_arm

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist .

test-kernels: $(KERNELS_READY)
	$(KERNELS_VENV)/bin/python tests/kernels/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutations: $(READY)
	$(BIN)/python tests/mutations/run.py

packages: $(READY)
	$(BIN)/python tests/packages.py

$(READY): requirements.lock pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxcompress needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@test -f kernels/cpu/libjaxcompress_cpu.so || echo "no C++17 compiler: without the native CPU kernels"
	@touch $@

$(KERNELS_READY): requirements.lock requirements-kernels.lock pyproject.toml
	$(PYTHON) -m venv $(KERNELS_VENV)
	@$(KERNELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.lock -r requirements-kernels.lock || \
		{ echo "the kernel checks need libtpu and triton, which cannot be installed here" >&2; exit 1; }
	$(KERNELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) $(KERNELS_VENV) build dist report kernels/cpu/*.so *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
