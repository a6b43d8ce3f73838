# Every target first installs what it needs: a virtual environment in .venv, exact versions from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
# Threads that spin while they wait slow down everything many times when other programs run, too.
export OMP_WAIT_POLICY := passive
# Without compiled code on disk, each process that the tests start would compile the library again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-deploy test-browser sweep fuzz soak mutants docs dist check clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ecanet needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "Installing ecanet and what it needs into .venv (a few minutes, several GB with the default torch)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## train an ECA-ResNet on real digits, write a report, classify a few images (about a minute)
	@rm -rf runs/demo
	@# Images of 8 x 8 pixels keep one core busy; a second one would mostly wait.
	OMP_NUM_THREADS=1 $(BIN)/ecanet train quickstart --out runs/demo
	$(BIN)/ecanet predict runs/demo examples/digits
	@echo
	@echo "The report, with curves, confusion matrix and examples: runs/demo/report.html"
	@echo "Next: $(BIN)/ecanet --help, README.md"

test: $(READY)  ## the default tests
	@# A file's tests stay in one process, so that what they share is made once.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(READY)  ## the tests that take minutes, and the random tests with thousands of cases each
	$(BIN)/python -m pytest -q -m slow --hypothesis-profile=thorough

fuzz: $(READY)  ## 300 random commands and 16,000 broken files (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m fuzz tests/test_fuzz.py tests/training/test_states.py

soak: $(READY)  ## 3,000 steps of training: memory and open files stay as they are
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m soak tests/training/test_soak.py

test-deploy: $(READY)  ## export networks to every runtime and compare (installs OpenVINO and ExecuTorch)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[executorch,openvino]'
	$(BIN)/python -m pytest -q -m deploy tests/deploy tests/test_snippets.py tests/test_snippet_commands.py

# spikingjelly asks for torchaudio, which fails beside a torch for another CUDA, so its other needs are in the extra.
sweep: $(READY)  ## attach gates to all networks of tests/sweep_networks (installs their libraries)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[sweep]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps spikingjelly
	$(BIN)/python -m pytest -q -m sweep

mutants: $(READY)  ## plant each known bug and check that its test fails
	OMP_NUM_THREADS=2 $(BIN)/python tests/run_mutants.py

docs: $(READY)  ## build the documentation site in build/site; a broken link or reference is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[docs]'
	$(BIN)/python docs/stage.py build/docs
	$(BIN)/zensical build --strict --clean

test-browser: $(READY)  ## the app, the documentation and a report in a headless Chromium (which must be installed)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[app,docs]' selenium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/studies/test_app_browser.py tests/test_site_browser.py \
		tests/report/test_report_browser.py

# The time in the files is that of the last commit, so that the same commit gives the same bytes.
dist: $(READY)  ## build the wheel and the source archive, and check what an index would show
	@rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build hatchling twine
	@$(BIN)/python hatch_build.py
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check src tests benchmarks docs examples hatch_build.py
	$(BIN)/ruff check src tests benchmarks docs examples hatch_build.py
	$(BIN)/pyright

clean:  ## remove the environment and all runs
	rm -rf .venv runs dist
