# Users: `make demo`, `make test`, `make notebooks`. Everything else is made on the way.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test models train gpu-check notebooks colab-links colab-check clean
export REPO

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

demo: $(VENV)/.installed  ## run notebooks 01 to 06 for real and print what came out
	@mkdir -p runs
	for nb in notebooks/0[1-6]_*.ipynb; do
	  name=$$(basename $$nb .ipynb)
	  echo "== $$name"
	  $(BIN)/papermill --progress-bar --no-log-output $$nb runs/$$name.ipynb
	  $(BIN)/jupyter nbconvert --log-level ERROR --to html --output $$name runs/$$name.ipynb
	done
	echo; echo "Notebook 04, new patients (accuracy with its 95% interval):"
	cat runs/04_grpo/summary.txt
	echo "Plots: open runs/*.html (05_evaluation.html compares all doctors)."

test: $(VENV)/.installed-tests  ## lint, unit tests, notebook gates, nbval, browser test
	@echo "== lint"; $(BIN)/ruff check . ; $(BIN)/ruff format --check .
	export OMP_NUM_THREADS=1  # two processes, a core each
	both="-n 2 --dist loadfile"
	echo "== unit tests and notebook gates"
	$(BIN)/python -m pytest $$both tests -m "not browser"
	echo "== every notebook, small sizes"
	GRPODX_SMOKE=1 $(BIN)/python -m pytest $$both --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=900 notebooks
	echo "== the chat in a browser"
	GRPODX_SMOKE=1 $(BIN)/python -m pytest tests -m browser

models: $(VENV)/.installed  ## fetch SmolLM2-135M-Instruct into runs/models (269 MB)
	@$(BIN)/python -c 'import grpodx_utils as gx; print(gx.notebook("01").bring_smollm())'

LAUNCH ?= --config_file notebooks/accelerate/ddp.yaml
train: $(VENV)/.installed  ## notebook 04 on several GPUs: make train LAUNCH="..." ARGS="-p ..."
	@mkdir -p runs
	$(BIN)/papermill --prepare-only --no-progress-bar notebooks/04_grpo_training.ipynb \
	  runs/04_train.ipynb $(ARGS)
	$(BIN)/jupyter nbconvert --log-level ERROR --to python runs/04_train.ipynb
	MPLBACKEND=Agg $(BIN)/accelerate launch $(LAUNCH) runs/04_train.py

gpu-check: $(VENV)/.installed-tests  ## on a CUDA GPU: 4-bit, float16, GRPO steps, adapter
	$(BIN)/python -m pytest tests/gpu -v -rs -s || test $$? = 5  # 5: all skipped

notebooks: $(VENV)/.installed  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

colab-links:  ## rewrite badges and clone lines: make colab-links REPO=owner/name
	@[[ "$${REPO:-}" == */* ]] || { echo "usage: make colab-links REPO=owner/name"; exit 2; }
	old=$$(sed -n 's/^repo = "\(.*\)"/\1/p' pyproject.toml)
	sed -i "s|$$old|$$REPO|g" pyproject.toml README.md notebooks/*.ipynb
	echo "$$old -> $$REPO in pyproject.toml, README.md and notebooks/"

colab-check:  ## prove the setup against Colab's package versions (needs Python 3.12)
	@bash tests/colab/check.sh

clean:  ## remove what runs made (not .venv)
	rm -rf runs unsloth_compiled_cache notebooks/unsloth_compiled_cache .pytest_cache .ruff_cache
