# The two commands of the README, on a machine that has Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find simulator hardware_profiles -type f -not -name '*.pyc' -not -path '*/__pycache__/*') pyproject.toml README.md

.PHONY: demo test validate accuracy proofs bench clean

demo: .venv/installed
	$(BIN)/myriad plan examples/kimi-k2-10240-h100.yaml --out out

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

validate: .venv/installed
	$(BIN)/myriad validate --out out

# What a change to the physics changes: the residuals behind the intervals, and the page. From the checkout, not the wheel.
accuracy: .venv/installed
	$(BIN)/python -m simulator.cli validate --refresh --docs docs/accuracy.md

proofs: .venv/tested
	$(BIN)/pytest -m long

bench: .venv/installed
	$(PIP) install -c constraints.txt '.[fast]'
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python tools/bench.py

# The built wheel is what runs and what gets tested, not the checkout.
.venv/installed: $(SOURCES) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt .
	$(PIP) install --no-deps --force-reinstall .
	touch $@

.venv/tested: .venv/installed
	$(PIP) install -c constraints.txt '.[test]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
