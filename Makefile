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

.PHONY: demo test test-kernels lint mutations packages clean

demo: $(READY)
	$(BIN)/python experiments/compress_digits.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

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

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxcompress needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(KERNELS_READY): requirements.lock requirements-kernels.lock pyproject.toml
	$(PYTHON) -m venv $(KERNELS_VENV)
	@$(KERNELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.lock -r requirements-kernels.lock || \
		{ echo "the kernel checks need libtpu and triton, which cannot be installed here" >&2; exit 1; }
	$(KERNELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) $(KERNELS_VENV) build dist report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
