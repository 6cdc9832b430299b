# Everything a fresh machine needs: `make demo` and `make test` install into .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# As many tests at once as there are cores; each keeps to one.
CORE_TESTS := tests/contracts $(addprefix tests/test_, $(addsuffix .py, attention averaging batches bundles \
	checkpoints config graphs layers memory quantizing recipe registry top training translate_command translating))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test check core slow clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' \
		--config-settings editable_mode=compat  # so that a copy of trmt can be tested without some packages
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

# The core by itself: its tests in copies without some of the packages around it.
core: $(INSTALLED)
	for missing in "native lab" lab; do \
		copy=$$(mktemp -d) && cp -r trmt tests bench docs data models pyproject.toml *.md "$$copy" \
		&& (cd "$$copy/trmt" && rm -r $$missing) \
		&& (cd "$$copy" && PYTHONPATH="$$copy" OMP_NUM_THREADS=1 "$(CURDIR)/$(BIN)/python" -m pytest \
			--numprocesses auto --dist worksteal -q -m 'not slow and not gpu' $(CORE_TESTS)) \
		&& rm -r "$$copy" || exit 1; \
	done

# Everything that needs no GPU, the slow tests included.
slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
