# Everything runs in .venv, which each command makes and fills by itself when it is not there yet.
#     make install | demo | test | sweep | check | clean        another Python: make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_FREE := src/seqloom/errors.py src/seqloom/geometry src/seqloom/plan src/seqloom/planner

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test sweep check clean FORCE

define SUPPORTED
import sys
version = sys.version_info[:2]
if not (3, 11) <= version <= (3, 13):
    sys.exit("Python %d.%d (%s) is not between 3.11 and 3.13; name one that is: make PYTHON=python3.12 install." % (version + (sys.executable,)))
endef
export SUPPORTED

# A Python named by hand replaces an environment that was made with another one.
ifneq ($(origin PYTHON),file)
ifneq ($(shell ( "$(PYTHON)" -V ) 2>/dev/null),$(shell ( $(BIN)/python -V ) 2>/dev/null))
$(STAMP): FORCE
endif
endif

help:
	@echo "make install   set up .venv (one to five minutes, once; the others do it by themselves)"
	@echo "make demo      train a small model over 4 processes, prove it equals one device, write a report (about 3 minutes)"
	@echo "make test      run the tests (about 20 minutes on 2 cores)"
	@echo "make sweep     run the long tables of plans, worlds and lengths (several hours)"
	@echo "make check     format, lint, types, doctests and architecture (about a minute)"
	@echo "make clean     remove .venv and caches; runs/ stays"

# The stamp is written last and --clear starts from nothing, so an interrupted installation is never taken for one.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no '$(PYTHON)' on this machine; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12 install." >&2; exit 1; }
	@"$(PYTHON)" -c "$$SUPPORTED"
	@echo "== Installing seqloom and what it needs into $(VENV) with $$("$(PYTHON)" -V): one to five minutes, mostly downloading torch."
	@started=$$SECONDS; \
	"$(PYTHON)" -m venv --clear $(VENV) || { echo "Python could not make $(VENV); on Debian and Ubuntu 'apt install python3-venv' adds what it lacks." >&2; exit 1; }; \
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[test]" \
	|| { echo "The installation stopped; check the network and the free disk space, and run the same command again." >&2; exit 1; }; \
	touch $@; \
	echo "== Installed in $$((SECONDS - started)) s."

install: $(STAMP)
	@echo "== Ready. Next: 'make demo' trains a small model and proves it equal to one device; $(BIN)/seqloom --help lists the commands."

demo: $(STAMP)
	@echo "== Demo, about 3 minutes on 2 cores: train over 4 processes, verify against one device, write the report."
	@started=$$SECONDS; \
	rm -rf runs/demo; \
	$(BIN)/seqloom train examples/demo.yaml; \
	echo "== Verifying: the same model under ring=2 ulysses=2 and on one device, in float64."; \
	$(BIN)/seqloom verify --model runs/demo/config.json --plan "ring=2 ulysses=2" --seq-len 512 --json > runs/demo/verify.json \
	|| { cat runs/demo/verify.json; echo "The split run is not equal to one device; the figures are above." >&2; exit 1; }; \
	$(BIN)/seqloom report runs/demo; \
	echo "== Done in $$((SECONDS - started)) s. Next: open runs/demo/report.html in a browser."

test: $(STAMP)
	@echo "== Tests, about 20 minutes on 2 cores."
	@$(BIN)/python -m pytest
	@echo "== All tests passed. Next: 'make check' before a commit, 'make sweep' for every plan and world."

sweep: $(STAMP)
	@echo "== The sweep: every plan, world and length of the tables; several hours on 2 cores."
	@$(BIN)/python -m pytest -m sweep --timeout 3600
	@$(BIN)/python -m benchmarks.parity --sixteen
	@echo "== The sweep passed."

check: $(STAMP)
	@echo "== Checks, about a minute: format, lint, types, doctests, architecture."
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --doctest-modules $(TORCH_FREE)
	@$(BIN)/python -m pytest -q tests/architecture
	@echo "== All checks passed."

clean:
	@rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "== Removed $(VENV) and the caches; runs/ is kept. Next: make install."
