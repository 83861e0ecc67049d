# make env | demo | test | lint | bench | chaos | clean. Everything starts from a bare python3 (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: env demo test lint bench chaos clean

env: $(STAMP)

# Installed anew only when what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("python: " + sys.version.split()[0] + " is too old; install Python 3.11 or newer, or set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Two pipeline stages x experts over two ranks: four processes, on two cores, on real text.
demo: $(STAMP)
	@rm -rf $(RUN)
	$(BIN)/torchrun --nproc-per-node 4 launcher/pretrain.py recipe=dsv3_tiny parallel=pp2_ep2 run.name=demo logging.console_every_steps=10
	@$(BIN)/python launcher/demo.py run=$(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python benchmarks/cpu_step.py

# A hundred kill -9 of random ranks at random moments; CHAOS_KILLS to choose.
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos kills=$(or $(CHAOS_KILLS),100)

clean:
	rm -rf $(VENV) runs .cache *.egg-info .pytest_cache .hypothesis .ruff_cache
