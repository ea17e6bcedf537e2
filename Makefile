# Users: `make demo`, `make test`, `make notebooks`. Everything else is made on the way.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test notebooks colab-links clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: requirements.txt
	@echo "Setting up $(VENV) (about 3 minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	gpu=$$(nvidia-smi -L 2>/dev/null | head -n 1 || true)
	test -n "$$gpu" || { echo "  no GPU: torch for the CPU first"; $(PIP) torch==2.13.0; }
	echo "  requirements.txt"
	$(PIP) -r <(grep -v 'no-deps' requirements.txt)
	echo "  trl and unsloth, without their own dependencies"
	$(PIP) --no-deps -r <(grep 'no-deps$$' requirements.txt)
	test -z "$$gpu" || $(PIP) --no-deps -r <(grep 'no-deps on GPU$$' requirements.txt)
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	@echo "  tests/requirements.txt"
	$(PIP) -r tests/requirements.txt
	touch $@
