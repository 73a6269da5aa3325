# make demo and make test are the two commands to know. Each sets up what it needs, and starts in seconds when that is there.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,fused,bench
CONSTRAINTS ?= constraints.txt
DATA ?=
JOBS ?= 2
CASES ?= 8
# guides are run as scripts, by tests/test_guides.py
NOTEBOOKS ?= $(filter-out nbs/guides.%,$(wildcard nbs/*.ipynb))

bin := $(VENV)/bin
ready := $(VENV)/.ready
docs_ready := $(VENV)/.docs_ready
PORT ?= 4000

.PHONY: help demo test setup sync lint types nbtest pytest coverage readme export outputs docs docs-serve docs-check docs-test dist-test oldest memcheck soak clean gpu-wheels

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: setup ## Train on handwritten digits with all backends (or DATA=folder of images), and compare
	$(bin)/python examples/demo.py $(if $(DATA),--data "$(DATA)")

test: setup ## All checks: sync, lint, types, nbtest, pytest
	@$(MAKE) --no-print-directory sync
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory nbtest
	@$(MAKE) --no-print-directory pytest

setup: $(ready) ## Virtual environment in .venv with everything installed

$(ready): settings.ini setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.10 or later is needed, and $(PYTHON) is {sys.version.split()[0]}" if sys.version_info < (3, 10) else 0)'
	@echo "Installing into $(VENV): this takes some minutes and about 7 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet -e ".[$(EXTRAS)]" -c $(CONSTRAINTS)
	@touch $@

sync: setup ## Do modules, stubs, README.md and CHANGELOG.md agree with the notebooks?
	@PATH="$(abspath $(bin)):$$PATH" bash .ci/sync

lint: setup ## Mistakes that ruff finds; it leaves the style alone
	$(bin)/ruff check fastxtend tests examples .ci setup.py

types: setup ## Do typical uses pass a type checker (pyright), and are mistakes found?
	@$(bin)/basedpyright --pythonpath $(bin)/python

nbtest: setup ## Run the notebooks, each in a process of its own; NOTEBOOKS=nbs/optim.ipynb chooses
	@OMP_WAIT_POLICY=passive $(bin)/python .ci/nbtest.py $(JOBS) $(NOTEBOOKS)

pytest: setup ## Run the tests; ARGS="-k adam" chooses
	OMP_WAIT_POLICY=passive $(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

coverage: setup ## Which lines of fastxtend are run by notebooks and by CASES=8 of each test (CASES=9999: by all): a table, pages in htmlcov, and benchmarks/coverage.md
	rm -f .coverage .coverage.*
	CASES=$(CASES) OMP_WAIT_POLICY=passive $(bin)/coverage run -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	OMP_WAIT_POLICY=passive $(bin)/coverage run .ci/nbtest.py $(JOBS) $(NOTEBOOKS)
	$(bin)/coverage combine --quiet
	$(bin)/coverage html --quiet
	$(bin)/coverage report
	$(bin)/python .ci/covered.py

readme: setup ## README.md and CHANGELOG.md from nbs/index.ipynb and nbs/changelog.ipynb
	$(bin)/python .ci/readme.py

export: setup ## Modules, stubs, README.md and CHANGELOG.md from the notebooks
	$(bin)/nbdev-export
	$(bin)/python .ci/readme.py
	$(bin)/python .ci/stubs.py

outputs: setup ## Run the pages that keep their plots and tables in the repository; PAGES="optimizers" chooses
	$(bin)/python .ci/outputs.py $(PAGES)

docs: $(docs_ready) ## The site, from the notebooks, in _docs
	$(bin)/python .ci/docs.py
	$(bin)/python .ci/docs_check.py

docs-serve: $(docs_ready) ## Build the site and show it at http://127.0.0.1:4000 (PORT=4000)
	$(bin)/python .ci/docs.py
	$(bin)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

docs-check: ## Does every link in _docs lead somewhere?
	$(bin)/python .ci/docs_check.py

docs-test: $(docs_ready) ## Open every page of _docs in Chromium (CHROMIUM=/usr/bin/chromium, SHOTS=folder for screenshots)
	node .ci/browser.mjs $(SHOTS)

$(docs_ready): $(ready) .ci/package-lock.json
	@command -v npm > /dev/null || { echo "npm is needed for KaTeX, which sets the formulas of the site"; exit 1; }
	$(bin)/python -m pip install --quiet -e ".[docs]" -c $(CONSTRAINTS)
	npm ci --prefix .ci --silent --no-audit --no-fund
	@touch $@

dist-test: setup ## Build wheel and sdist, install the wheel elsewhere, run README's first example (OVER=.venv/lib/python3.11/site-packages: quick)
	$(bin)/python .ci/dist.py $(if $(OVER),--over "$(OVER)")

gpu-wheels: setup ## What examples/gpu_check.py needs on a machine with a GPU and without a package index, in wheels
	$(bin)/python .ci/gpu_wheels.py

oldest: ## Run the tests with the oldest versions that settings.ini allows (PYTHON=python3.10)
	@$(MAKE) --no-print-directory pytest VENV=.venv-oldest CONSTRAINTS=.ci/oldest.txt EXTRAS=fused,test

memcheck: setup ## Steps of all optimizers under Valgrind (to be installed by you): does a kernel touch what is not its own? NAMES="Adam Lamb" chooses
	$(bin)/python .ci/memcheck.py $(NAMES)

soak: setup ## The long runs: 20,000 sequences of the adversary, 50,000 random cases, 100,000 steps of each backend, 60 kills, and every case of every test
	ADVERSARY_SEQUENCES=20000 PROPERTY_EXAMPLES=50000 FASTXTEND_SOAK_STEPS=12500 FASTXTEND_KILLS=20 OMP_WAIT_POLICY=passive \
		$(bin)/python -m pytest -n $(JOBS) -s tests/test_adversary.py tests/test_property.py tests/test_soak.py tests/test_resume.py $(ARGS)
	SOAK=1 OMP_WAIT_POLICY=passive $(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

clean: ## Remove what was built, but not the environment
	rm -rf build dist wheels *.egg-info demo_out bench_out _docs _proc htmlcov .coverage .coverage.* .pytest_cache .hypothesis .ruff_cache
	find fastxtend tests examples -name __pycache__ -prune -exec rm -rf {} +
