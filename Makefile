# EnTurbo. `make demo` and `make test` need Python >= 3.11, make and (for the native hasher) a C compiler; each sets
# up .venv from the extras in pyproject.toml when it is missing or out of date. `make help` lists the rest.

# The first of these that runs and is new enough becomes .venv. `make PYTHON=/path/to/python3` names another.
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11, \
	$(if $(shell $(python) -c '$(NEW_ENOUGH)' 2>/dev/null && echo yes),$(python))) python3)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

VENV := .venv
comma := ,
BIN := $(VENV)/bin
# An editable install is out of date when one of these has changed: dependencies, entry points, the C extension.
SOURCES := pyproject.toml $(wildcard setup.py src/enturbo/workers/*.c src/enturbo/workers/*.h)
PYTEST := $(BIN)/python -m pytest
# Two processes, since one leaves half of two cores idle. What the tests of a file share they share in one of them.
PARALLEL := -n 2 --dist loadfile
# The suite starts Pythons by the hundred: without compiled modules each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-wheel fuzz asan arm lint model model-large bench bench-report clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo  ## build, sign, start and call the example in all combinations
	$(BIN)/enturbo demo

test: $(VENV)/.test  ## the suite without what is slow (at most 4 minutes on two cores)
	$(PYTEST) $(PARALLEL) -m "not slow"

# What `make test` ran is not run again from the tree: the slow tests (with most of the mutations) and beside them, as
# both wait a lot, the quick ones against an installed wheel; then the model's larger instances. At most 10 minutes.
# A shell's background jobs ignore Ctrl-C, and so would what is tested.
test-all: $(VENV)/.test  ## the slow tests, the suite on an installed wheel, larger models
	mkdir -p build
	env --default-signal=INT,QUIT $(MAKE) test-wheel >build/test-wheel.log 2>&1 & wheel=$$!; \
	$(PYTEST) $(PARALLEL) -m "slow and not wheel"; slow=$$?; \
	wait $$wheel; wheel=$$?; cat build/test-wheel.log; \
	test $$slow -eq 0 -a $$wheel -eq 0
	$(MAKE) model-large

test-wheel: $(VENV)/.test  ## build a wheel, install it, run the suite against it outside the tree
	@folder=$$(mktemp -d) || exit 1; \
	$(PYTEST) -m wheel --capture=no --basetemp=$$folder/pytest; status=$$?; rm -rf $$folder; exit $$status

# Needs a CPython that atheris has a wheel for, or clang. What it finds stays in build/fuzz, as do its inputs.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.fuzz  ## the readers of files under a coverage-guided fuzzer; FUZZ_SECONDS=600
	$(BIN)/python fuzz/readers.py --seconds $(FUZZ_SECONDS)

asan: $(VENV)/.test  ## the C extension under AddressSanitizer and UBSan; needs gcc (half a minute)
	tests/kernels/check_asan $(BIN)/python

# Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static; no .venv.
arm:  ## the kernels for 64-bit ARM, cross-compiled and emulated
	tests/kernels/check_arm

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src tests

# Standard library, spin and a C compiler; no .venv.
model:  ## check the start-up protocol, and that each rule taken away breaks it
	$(CHECK_PYTHON)
	$(PYTHON) docs/model/check.py

model-large:  ## the same on larger instances
	$(CHECK_PYTHON)
	$(PYTHON) docs/model/check.py --large

bench: $(VENV)/.test  ## the benchmarks; ARGS="-k NAME" picks some
	$(PYTEST) benchmarks --benchmark-enable --timeout=0 $(ARGS)

# Minutes, on a machine that does nothing else; ARGS="--quick" tries it out, into build/.
bench-report: $(VENV)/.bench  ## measure every target of docs/performance.md and write it anew
	$(BIN)/python benchmarks/report.py $(ARGS)

clean:  ## everything that was built; .venv stays, and is brought up to date when it is next used
	rm -rf build dist src/*.egg-info docs/model/build .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.bench $(VENV)/.fuzz src/enturbo/*/*.so
	find -H . src/enturbo/*/ -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

define CHECK_PYTHON
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "EnTurbo needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo none)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3" >&2; exit 1; }
endef

$(BIN)/python:
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp an extra: demo < test < dev, bench, fuzz, so a larger one is also the smaller ones. Tests run the workloads,
# too.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.bench $(VENV)/.fuzz: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(@:$(VENV)/.%=%)$(if $(filter %.demo,$@),,$(comma)workloads)]'
	touch $(VENV)/.demo $(if $(filter-out %.demo,$@),$(VENV)/.test) $(filter %.dev %.bench %.fuzz,$@)
