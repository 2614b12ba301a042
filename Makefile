# Each target sets up .venv first (from constraints.txt) when that is missing or out of date; all it takes is Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
BENCHMARKS ?= $(sort $(wildcard benchmarks/*.py))
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
# One thread per process: with more the tests that start two processes take twenty times as long.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: demo test slow golden style bench clean

# Waiting threads sleep: where something else has a core, spinning ones would slow this twentyfold.
demo: $(STAMP)  ## train, evaluate and use a small system on synthetic speech; the result is in outputs/demo
	OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(BIN)/python train.py recipes/demo.yaml

test: $(STAMP)  ## run the fast tests; make test TESTS="tests/test_losses.py -k kl" runs some
	$(PYTEST) -m "not slow" $(TESTS)

slow: $(VENV)/installed-all  ## run the tests that take over ten seconds each or need another extra than dev
	$(PYTEST) -m slow $(TESTS)

golden: $(STAMP)  ## keep what the golden runs give now, where it changed, and show that (tests/golden/README.md)
	$(PYTEST) -m slow tests/test_golden_runs.py --rewrite-golden

style: $(STAMP)  ## check the style and the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## run the benchmarks; make bench BENCHMARKS=benchmarks/inference.py runs one
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; TOKENIZERS_PARALLELISM=false $(BIN)/python $$script; done

clean:  ## remove what the other targets made, .venv too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

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
