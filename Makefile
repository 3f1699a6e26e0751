# Each target makes .venv if it is missing, installs what it needs by constraints.txt and says what it does.
# A second call does not install again: the stamps in .venv are newer than pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TESTS ?= tests
WHEELS ?= wheels
GPU_VERSION ?= 3.11
EXAMPLES ?= $(filter-out examples/parts.py,$(sort $(wildcard examples/*.py)))
SAY = @printf '\n== %s\n'

export PIP_NO_INPUT = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs accessibility examples notebooks bench mutants kernels fuzz faults wheel gpu gpu-wheels clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1 \t\2/' | expand -t 20

install: $(VENV)/.stamp-base ## install prunella into .venv
	$(SAY) "prunella is in $(BIN); try: $(BIN)/prunella --help"
	$(BIN)/prunella --version

demo: $(VENV)/.stamp-demo ## prune a real pretrained network in about a minute, and write demo/report.html
	$(SAY) "pruning all-MiniLM-L6-v2; the result goes to demo/"
	$(BIN)/prunella demo --overwrite -o demo

test: $(VENV)/.stamp-test ## run all tests (ten to thirteen minutes on two cores; stopped after 50)
	$(SAY) "running the tests"
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n 2 --dist worksteal --session-timeout=3000

check: $(VENV)/.stamp-check ## ruff, mypy --strict, order of imports, spelling and words of what is read
	$(SAY) "ruff check and format"
	$(BIN)/ruff check src tests docs benchmarks examples notebooks
	$(BIN)/ruff format --check src tests docs benchmarks examples notebooks
	$(SAY) "mypy --strict"
	$(BIN)/mypy
	$(SAY) "order of imports, words"
	$(BIN)/python -m pytest tests/test_imports.py tests/test_words.py
	$(SAY) "spelling"
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs src examples notebooks benchmarks

docs: $(VENV)/.stamp-docs ## build the documentation into site/
	$(SAY) "building the documentation into site/"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

accessibility: docs ## read the built site with axe-core in a headless Chromium (needs chromium and npm; ten minutes)
	$(SAY) "reading the site with axe-core"
	@command -v chromium >/dev/null && command -v npm >/dev/null || { \
	  echo "chromium and npm are needed; on Debian: apt install chromium npm" >&2; exit 1; }
	mkdir -p build/axe && cd build/axe && npm pack --silent axe-core && tar xzf axe-core-*.tgz
	$(BIN)/python docs/accessibility.py build/axe/package/axe.min.js

examples: $(VENV)/.stamp-test ## run the scripts of examples/ (about a quarter of an hour)
	@for script in $(EXAMPLES); do printf '\n== %s\n' "$$script"; \
	  OMP_NUM_THREADS=2 $(BIN)/python "$$script" || exit 1; done

notebooks: $(VENV)/.stamp-notebooks ## execute the notebooks into build/notebooks/, with their plots (three minutes)
	$(SAY) "executing the notebooks"
	OMP_NUM_THREADS=2 $(BIN)/python notebooks/run.py

bench: $(VENV)/.stamp-bench ## compare with Torch-Pruning on the same weights and budget (long)
	$(SAY) "running benchmarks/"
	$(BIN)/python benchmarks/compare.py

mutants: $(VENV)/.stamp-test ## break every formula once and see a test go red (long)
	$(SAY) "breaking formulas"
	$(BIN)/python tests/mutants/run.py

kernels: ## build the sparse kernels into src/, as an installation does (needs cmake and a C++ compiler)
	$(SAY) "building the kernels"
	cmake -S . -B build/kernels
	cmake --build build/kernels --parallel 2

fuzz: $(VENV)/.stamp-test ## hostile files for every reader, hostile input to the kernels under sanitizers, a minute each
	$(SAY) "fuzzing the readers"
	OMP_NUM_THREADS=1 PRUNELLA_FUZZ_SECONDS=$${PRUNELLA_FUZZ_SECONDS-60} $(BIN)/python -m pytest tests/fuzz
	$(SAY) "fuzzing the kernels"
	PRUNELLA_FUZZ_SECONDS=$${PRUNELLA_FUZZ_SECONDS-60} $(BIN)/python -m pytest tests/runtime/kernels/test_fuzz.py

faults: $(VENV)/.stamp-test ## kill, fail and halve every write, fsync, rename, unlink and mkdir of every verb (hours)
	$(SAY) "trying every fault at every call of every verb that writes"
	PRUNELLA_FAULTS=all $(BIN)/python -m pytest tests/faults -s

wheel: $(VENV)/.stamp-test ## build the wheel, test it installed, leave it in dist/
	$(SAY) "building and testing the wheel"
	PRUNELLA_DIST=$${PRUNELLA_DIST-$(CURDIR)/dist} $(BIN)/python -m pytest tests/runtime/test_wheel.py

gpu-wheels: ## collect in wheels/ what make gpu needs on a machine without a network
	$(SAY) "collecting wheels for Python $(GPU_VERSION) into $(WHEELS)"
	$(PYTHON) tests/gpu/wheels.py $(WHEELS) --python $(GPU_VERSION) $(if $(PLATFORM),--platform $(PLATFORM))

gpu: ## test and measure on a GPU, with the torch of PYTHON and the wheels of wheels/ (under eight minutes)
	@$(PYTHON) -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || { \
	  echo "$(PYTHON) has no torch; say which Python has by: make gpu PYTHON=/path/to/python" >&2; exit 1; }
	$(SAY) "putting the wheels of $(WHEELS) into .venv-gpu, beside that torch"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --find-links $(WHEELS) --upgrade \
	  --target .venv-gpu $$($(PYTHON) tests/gpu/wheels.py --needed $(WHEELS))
	$(SAY) "running the tests marked gpu"
	PYTHONPATH=src:.venv-gpu $(PYTHON) -m pytest tests/gpu -m gpu -rs -s --session-timeout=330 --timeout=120
	$(SAY) "measuring"
	PYTHONPATH=src:.venv-gpu timeout 120 $(PYTHON) benchmarks/gpu.py

clean: ## remove what the other targets made, .venv too
	rm -rf $(VENV) .venv-gpu site build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/prunella/runtime/kernels/libprunella.*
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	$(SAY) "making $(VENV)"
	@for python in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "with $$("$$python" --version)"; \
	    test -x $(BIN)/python || "$$python" -m venv $(VENV) || { \
	      echo "python could not make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }; \
	    touch $@; exit 0; fi; done; \
	echo "no Python 3.11 or newer found; say which by: make PYTHON=/path/to/python3.12" >&2; exit 1

$(VENV)/.stamp-base: $(VENV)/.stamp-venv pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*)
	$(SAY) "installing prunella into $(VENV) (torch is large: a few minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-base
	$(SAY) "installing what the tests need"
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-base
	$(SAY) "installing what the demo needs"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.stamp-check: $(VENV)/.stamp-test
	$(SAY) "installing ruff, mypy and codespell"
	$(INSTALL) -e '.[check]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-base
	$(SAY) "installing mkdocs"
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.stamp-notebooks: $(VENV)/.stamp-base
	$(SAY) "installing what the notebooks need"
	$(INSTALL) -e '.[notebooks]'
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-base
	$(SAY) "installing what the benchmarks compare with"
	$(INSTALL) -e '.[bench]'
	@touch $@
