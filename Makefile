# Each target sets up .venv first (from constraints.txt) when that is missing or out of date; all it takes is Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
LOWEST := .venv-lowest
BENCHMARKS ?= $(sort $(wildcard benchmarks/*.py))
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
# One thread per process: with more the tests that start two processes take twenty times as long.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENVIRONMENT) $(BIN)/python -m pytest

.PHONY: demo page test slow browser golden lowest style bench paper-smoke mutants docs docs-serve clean

# Waiting threads sleep: where something else has a core, spinning ones would slow this twentyfold.
demo: $(STAMP)  ## train, evaluate and use a small system on synthetic speech; the result is in outputs/demo
	OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/python train.py recipes/demo.yaml

page: $(VENV)/installed-page  ## show the demo's system on a page at http://127.0.0.1:7860; make page MODEL=FOLDER shows another
	OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/sailer page $(or $(MODEL),outputs/demo)

test: $(STAMP)  ## run the fast tests, two files at a time; make test TESTS="tests/test_losses.py -k kl" runs some
	$(PYTEST) -n $(if $(TESTS),0,2) --dist loadfile -m "not slow and not browser" $(TESTS)

slow: $(VENV)/installed-all  ## run the tests that take over ten seconds each or need another extra than dev
	$(PYTEST) -m slow $(TESTS)

browser: $(VENV)/installed-browser  ## try the page in a real browser (Debian: apt-get install chromium)
	$(PYTEST) -m browser $(TESTS)

golden: $(STAMP)  ## keep what the golden runs give now, where it changed, and show that (tests/golden/README.md)
	$(PYTEST) -m slow tests/test_golden_runs.py --rewrite-golden

lowest: $(LOWEST)/installed  ## run the fast tests with the lowest versions that setup.cfg allows, but torch as in constraints.txt
	$(TEST_ENVIRONMENT) $(LOWEST)/bin/python -m pytest -m "not slow and not browser" $(TESTS)

# The root is the package: through this link the type checker finds it under its name, whatever the folder is called.
style: $(STAMP)  ## check the style, the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/sailer
	$(BIN)/mypy -p sailer

bench: $(STAMP)  ## run the benchmarks; make bench BENCHMARKS=benchmarks/inference.py runs one
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; TOKENIZERS_PARALLELISM=false $(BIN)/python $$script; done

paper-smoke: $(STAMP)  ## run every system of the paper end to end on tiny backbones and synthetic speech, its ensembles and files too
	TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/paper_smoke.py $(PAPER_SMOKE)

mutants: $(VENV)/installed-mutants  ## change 300 places of the numeric modules, one at a time: how many do the tests notice? (an hour)
	$(BIN)/python tests/mutants.py $(MUTANTS)

docs: $(VENV)/installed-docs  ## build the documentation into site/, strictly: a broken link or a missing page stops it
	$(BIN)/properdocs build --strict

docs-serve: $(VENV)/installed-docs  ## show the documentation at http://127.0.0.1:8000 while it is written
	$(BIN)/properdocs serve --strict

clean:  ## remove what the other targets made, .venv too
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here; install Python 3.11 or later, or: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: sailer needs Python 3.11 or later, this is " \
		+ sys.version.split()[0] + "; name a newer one: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: this Python cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) '.[dev]'
	@touch $@

# An extra of setup.cfg on top of dev.
$(VENV)/installed-%: $(STAMP)
	$(PIP_INSTALL) '.[dev,$*]'
	@touch $@

# What uv resolves serves pip as constraints: a CPU build of torch then stays without the CUDA packages that uv lists for it.
$(LOWEST)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check uv
	grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra dev --constraint $(LOWEST)/torch.txt \
		--python $(LOWEST)/bin/python --output-file $(LOWEST)/versions.txt setup.cfg
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -c $(LOWEST)/versions.txt -e '.[dev]'
	@touch $@
