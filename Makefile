# tritongrad's chores. `make` alone lists them.
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.installing
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Two makes at once must not install over each other. The kernel drops the lock when the last process
# holding it ends, however it ends, so there is never a stale one to remove.
LOCKED = $(PYTHON) -c 'import fcntl, os, sys; \
	fd = os.open("$(VENV).lock", os.O_CREAT | os.O_RDWR); \
	fcntl.flock(fd, fcntl.LOCK_EX); \
	os.set_inheritable(fd, True); \
	os.execvp(sys.argv[1], sys.argv[1:])'

# Written to be read by any Python, Python 2 included, so that an old one gets the message.
CHECK_PYTHON = import sys; sys.exit(sys.version_info < (3, 10) and \
	"tritongrad needs Python 3.10 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." \
	% sys.version_info[:2] or 0)

.PHONY: help
help: ## list these targets
	@echo 'make TARGET [PYTHON=python3] [VENV=.venv] [ARGS="..."]'
	@echo
	@sed -n 's/^\([a-z][a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12
	@echo
	@echo 'The first target to need it makes $(VENV) and installs there, at the versions in constraints.txt.'
	@echo 'pip obeys its own variables: PIP_FIND_LINKS=DIR, for one, takes a CPU build of torch from DIR.'

.PHONY: install
install: ## make or refresh the environment
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; try: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@$(LOCKED) $(MAKE) --no-print-directory environment

.PHONY: environment
environment: $(STAMP)
	@:

# An install cut short can leave half a package that pip takes for a whole one, so what it was doing is
# marked, the mark becomes the stamp at the end, and a mark still there means: start over. setuptools
# comes before tritongrad so that the pinned one builds it, not the newest of the day.
$(STAMP): pyproject.toml constraints.txt
	@test ! -e $(UNFINISHED) && $(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@; touch $(UNFINISHED)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[tests,dev]'
	@mv $(UNFINISHED) $@

.PHONY: compare
compare: install ## compare tritongrad with torch, everything this machine can run
	$(BIN)/python -m compare $(ARGS)

.PHONY: static
static: install ## compile every kernel ahead of time and count registers, spills and wide loads; no GPU needed
	$(BIN)/python -m compare static $(ARGS)

.PHONY: host
host: install ## time what a call costs on the host, without the kernel
	$(BIN)/python -m compare host $(ARGS)

.PHONY: bench
bench: install ## time every op on a GPU, beside torch and other libraries
	$(BIN)/python -m compare bench $(ARGS)

.PHONY: sanitize
sanitize: install ## the tests of hazards on a GPU, watched by compute-sanitizer
	$(BIN)/python -m compare sanitize $(ARGS)

.PHONY: gpu
gpu: install ## all that waits for a GPU: tests, sanitize, bench as far as time goes, report
	$(BIN)/python -m compare gpu $(ARGS)

.PHONY: report
report: install ## pictures and tables of what bench measured
	$(BIN)/python -m compare report $(ARGS)

.PHONY: models
models: install ## train small models on our kernels and on torch, step by step
	$(BIN)/python -m compare models $(ARGS)

.PHONY: doctor
doctor: install ## say what this machine has and what will run on it
	$(BIN)/python -m compare doctor $(ARGS)

# One thread per worker: torch would start a thread per core in every worker and they would fight.
# Each worker begins with a half of the files, whose fixtures it then makes alone; who has finished
# takes tests from the other.
.PHONY: test
test: install ## run the whole test suite; ARGS go to pytest
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: lint
lint: install ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: format
format: install ## let ruff fix and format the source
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: wheel
wheel: install ## build sdist and wheel in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

.PHONY: clean
clean: ## remove what builds, tools and tests leave behind; the environment stays
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find tritongrad kernels compare tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## the environment too
	rm -rf $(VENV) $(VENV).lock
