# Everything a developer needs; each target builds .venv from the lock when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: setup demo check test test-slow bench format clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup  ## A simulated screen; ripple, scDFM and the baselines trained; held-out doubles predicted, scored, reported.
	$(BIN)/knockon simulate $(DEMO)/screen.h5ad --preset demo --seed 0
	$(BIN)/knockon inspect $(DEMO)/screen.h5ad
	$(BIN)/knockon compare --data $(DEMO)/screen.h5ad --split additive \
		--models additive shrunken_additive linear nearest response_surface ripple scdfm --cells 128 --out $(DEMO)/comparison
	$(BIN)/knockon report $(DEMO)/comparison --out $(DEMO)/report.html

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

bench: setup
	$(BIN)/python -m benchmarks.run

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO)
