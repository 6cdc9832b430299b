# Everything a fresh machine needs: `make demo` and `make test` install into .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# As many tests at once as there are cores; each keeps to one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test check slow clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

# The main job on the embedded corpus, from nothing to a scored translator.
demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh data/demo.sh

test: $(INSTALLED)
	$(PYTEST) -m 'not slow and not gpu'

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that needs no GPU, the slow tests included.
slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
