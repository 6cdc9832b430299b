# Everything a fresh machine needs: `make demo` and `make test` install into .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORE_TESTS := $(addprefix tests/test_, $(addsuffix .py, attention averaging batches bundles \
	checkpoints config graphs layers memory quantizing recipe registry top training translate_command translating))
# As many tests at once as there are cores; each keeps to one.
PYTEST := OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest --numprocesses auto --dist worksteal
# Tests in a copy of trmt without some packages: $(call IN_COPY,PACKAGES,TESTS)
IN_COPY = copy=$$(mktemp -d) && cp -r trmt tests bench docs data models pyproject.toml *.md "$$copy" \
	&& (cd "$$copy/trmt" && rm -r $(1)) \
	&& (cd "$$copy" && PYTHONPATH="$$copy" $(PYTEST) -q -m 'not slow and not gpu' $(2)) && rm -r "$$copy"

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

# The core by itself: its tests in a copy without the packages around it that it uses, and in one without lab.
core: $(INSTALLED)
	$(call IN_COPY,native lab,tests/contracts $(CORE_TESTS))
	$(call IN_COPY,lab,$(CORE_TESTS))

# Everything that needs no GPU, the slow tests included.
slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
