# `make demo` and `make test` work from a clean clone; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
METADATA := pyproject.toml constraints.txt dagh/_version.py

# One thread per process: the tests run in several processes, and the matrices are small.
test test-slow types lint: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow lint types bench run-bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-data
	$(BIN)/dagh trace examples/cnn_digits.py --data digits --norms

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

# What takes too long for every change: the rest of the grids and more random examples.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# BENCH passes options on: make bench BENCH="--quick", or "--suite core --resume"; see python -m benchmarks run --help.
# The peers bring torchvision and jax along, so they get an environment of their own.
bench:
	@$(MAKE) --no-print-directory VENV=.venv-bench BENCH='$(BENCH)' run-bench

run-bench: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks run $(BENCH)

types: $(VENV)/.installed-lint
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per extra, renewed when the metadata change: a second call installs nothing.
$(VENV)/.installed-%: $(METADATA) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# A peer that cannot be installed here is left out, and the benchmark says so.
PEERS = $(BIN)/python -c "import tomllib; m = tomllib.load(open('pyproject.toml', 'rb')); \
  print(*m['project']['optional-dependencies']['bench'], sep='\n')"
$(VENV)/.installed-peers: $(METADATA) | $(VENV)/.installed-data
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' || \
	  $(PEERS) | while read -r peer; do \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$peer" || echo "not available: $$peer" >&2; \
	  done
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; try make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
