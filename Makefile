# Needs make and a Python of 3.11 or newer, nothing else.

VENV := .venv
PY := $(VENV)/bin/python
# The first of these that is new enough makes the environment.
PYTHONS ?= python3 python3.14 python3.13 python3.12 python3.11
PIP := $(PY) -m pip --disable-pip-version-check
PYTEST := $(PY) -m pytest -q
BENCHES := $(sort $(wildcard benchmarks/bench_*.py))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test check sim bench oracle docs clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

run: $(VENV)/installed ## a whole deployment here; options: make run ARGS="--workers 8"
	@exec $(VENV)/bin/reckon up $(ARGS)

test: $(VENV)/installed ## all tests: unit, property, integration
	@# Three files at a time, since most tests wait for processes. These share the cores with each
	@# other and with whatever else runs there, so what fails is run once more by itself, in full
	@# view, and fails for good then.
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(PYTEST) -n 3 --dist loadfile $(ARGS) || \
	  HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(PYTEST) --last-failed $(ARGS)

check: $(VENV)/installed ## format, lint, types, unit and property tests, generated docs
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST) tests/unit tests/property
	$(PY) docs/generate.py --check

sim: $(VENV)/installed ## simulated deployments under faults; more: make sim ARGS="--seeds 1000"
	$(PY) -m simulations cluster $(if $(ARGS),$(ARGS),1 --seeds 100)

# A script that needs arguments says so with the exit status of misuse, and is left out.
bench: $(VENV)/installed ## run benchmarks/bench_*.py, one by one, into benchmarks/results
	@mkdir -p benchmarks/results; failed=; \
	for script in $(BENCHES); do \
	  name=$$(basename $$script .py); echo "--- $$name"; \
	  $(PY) -m benchmarks.$$name --out benchmarks/results/$${name#bench_}.txt; \
	  case $$? in 0) ;; 2) echo "skipped: it needs arguments";; *) failed="$$failed $$name";; esac; \
	done; \
	if [ -n "$$failed" ]; then echo "Error: failed:$$failed" >&2; exit 1; fi

oracle: $(VENV)/installed ## install the peer's own index, for the differential tests
	$(PIP) install --no-deps 'ai-dynamo-runtime>=1.6,<2'

docs: $(VENV)/installed ## write the pages that are made from declarations
	$(PY) docs/generate.py

clean: ## remove the environment and all caches; the log of `make run` stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml | $(PY)
	@printf 'Installing what pyproject.toml names into $(VENV), once '
	@($(PIP) install -e '.[test]' && touch $@) 2>&1 | tee $(VENV)/install.log | \
	  $(PY) -c 'import sys; [print(end=".", flush=True) for line in sys.stdin if line[:4] in ("Coll", "Proc")]'
	@echo; if [ ! $@ -nt pyproject.toml ]; then \
	  tail -n 15 $(VENV)/install.log >&2; \
	  echo 'Error: the environment could not be made; all of what pip said: $(VENV)/install.log' >&2; \
	  echo 'Try: make again, once pip can reach a package index' >&2; exit 1; fi

$(PY):
	@found=; for python in $(PYTHONS); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Error: Python 3.11 or newer is needed, and is none of: $(PYTHONS)" >&2; \
	  echo 'Try: install one, or name it: make PYTHONS=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "Error: $$found cannot make environments: it came without venv or ensurepip" >&2; \
	  echo 'Try: apt-get install python3-venv (Debian, Ubuntu)' >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
