# make demo   sets everything up and runs the embedded benchmark once
# make test   sets everything up and runs every check; make test-full the long ones too (fault injection, full size, browser)
# make test-quick   ruff and the tests of the science: a minute
# make docs   the documentation as a site with a search: site/index.html
# make study  the embedded benchmark in full: three seeds, label budgets, ablations (hours on a CPU)
PYTHON ?= python3
PY := .venv/bin/python
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONWARNINGS ?= ignore::FutureWarning

.venv/.ready: requirements.lock
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

# their tests have the marker quick (tests/conftest.py); the others are not even read
QUICK := $(addprefix tests/,attention masks evaluation store test_layers.py test_taxonomy.py)

# A process for each core, up to four (each takes 2 GB). All tests of a file run in one process, which
# makes the file's fixtures once; the longest files go first (tests/conftest.py).
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))")
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick test-full test-oldest study browser docs
demo: .venv/.ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/demo.sh

study: .venv/.ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/shapes.sh

test: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) -m "not full and not browser"

test-quick: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -m quick $(QUICK)

# The browser that the report's tests drive; Debian and Ubuntu, as root. Elsewhere any Chromium in PATH will do.
browser:
	command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null || \
	  (apt-get update -qq && apt-get install -y --no-install-recommends chromium-headless-shell)

test-full: .venv/.ready .venv/.docs browser test-oldest
	OMP_NUM_THREADS=1 $(PY) -m pytest

# The oldest diffusers that pyproject.toml allows, beside the pinned one: how its attention is read.
OLDEST := diffusers==0.40.0
.venv/oldest: .venv/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ $(OLDEST)

test-oldest: .venv/oldest
	PYTHONPATH=$< OMP_NUM_THREADS=1 $(PY) -m pytest tests/generators/test_families.py \
	  tests/generators/test_recorder.py tests/generators/test_oldest.py

.venv/.docs: docs/requirements.txt .venv/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -r $< -c requirements.lock
	touch $@

# The documentation as a site; a dead link fails. Made anew each time, since Sphinx would not warn
# again of a page that did not change.
docs: .venv/.docs
	rm -rf site
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -c docs . site
	@echo "ready: site/index.html"
