# make bench   run the benchmark and write its report
# make check   lint, format, types
# make test    make check, then all tests
# Each works on a fresh clone. Other Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# one process a core; the kernels of test_compile.py take seconds each
PYTEST_FLAGS ?= -q -n auto
BENCH_FLAGS ?=

.PHONY: bench check test clean

bench: $(INSTALLED)
	$(BIN)/dsa-bench run $(BENCH_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Triton decides at import whether it interprets, so that ring is a run of its own
test: check
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m interpret
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not interpret"

clean:
	rm -rf $(VENV) build dist *.egg-info

# A Python that has torch keeps it, with its triton and numpy: that build fits the machine's driver.
# A GPU without torch takes what PyPI's newest torch brings. Only a machine with neither takes the
# pinned torch, which is a CPU build.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'dsa-bench needs Python 3.11 or later (make PYTHON=python3.12 ...)' >&2; exit 2; }
	rm -rf $(VENV)
	if $(PYTHON) -c 'import torch' 2>/dev/null; \
		then $(PYTHON) -m venv --system-site-packages $(VENV); \
		else $(PYTHON) -m venv $(VENV); fi
	if $(BIN)/python -c 'import torch' 2>/dev/null || command -v nvidia-smi >/dev/null; \
		then grep -vE '^(torch|triton|numpy)==' constraints.txt >$(VENV)/constraints.txt; \
		else cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(VENV)/constraints.txt -e '.[dev]'
	touch $(INSTALLED)
