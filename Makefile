# make help lists what there is. Needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCHVISION = torchvision==0.28.0

.PHONY: help quickstart test faults lint docs bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

quickstart: $(VENV)/recipes  ## train, tune and reload a small model of your own on this machine (5 minutes)
	$(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml recipes/quickstart.py $(ARGS)

test: $(VENV)/dev  ## run the whole test suite, a process for each core
	$(BIN)/python -m pytest -n auto $(ARGS)

faults: $(VENV)/dev  ## kill runs 200 times, damage 1000 files, resume the whole matrix (an hour; tests/faults/)
	$(BIN)/python tests/faults/long.py $(ARGS)

lint: $(VENV)/dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev  ## write docs/families.md anew: what `hfcustom inspect --all --markdown` says, torchvision only where needed
	$(BIN)/python -m pytest -q tests/test_inspector.py -k docs_families_md --write-docs
	HFCUSTOM_TORCHVISION=$(VENV)/torchvision $(BIN)/python -m pytest -q tests/test_inspector.py -k docs_families_md --write-docs

bench: $(VENV)/dev  ## compare a training step with stock transformers, Trainer and trl (20 minutes, 18 GB of memory)
	$(BIN)/python benchmarks/training_step.py $(ARGS)

clean:  ## delete the environment and everything that recipes wrote
	rm -rf $(VENV) outputs

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python found; install Python 3.11 or pass PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/recipes: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV), this takes some minutes the first time"
	$(INSTALL) -e '.[recipes]'
	@touch $@

# torchvision goes beside the environment, not into it: most tests run without, tests/test_torchvision.py with it.
$(VENV)/dev: $(VENV)/recipes
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/torchvision $(TORCHVISION)
	@touch $@
