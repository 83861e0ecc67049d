# make env | demo | test | test-all | test-slurm | test-docker | test-te-compiled | lint | docs | bench | gpu-check | chaos | fuzz | locks | clean. Everything starts from a bare python3 (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TE := $(wildcard testing/te/requirements.txt)
TRITON := $(wildcard testing/triton/requirements.txt)
RUN := runs/demo
export OMP_NUM_THREADS ?= 1

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Each file by its hash, and nothing that the locks do not name: testing/locks.py.
LOCKED = $(PIP) install --require-hashes --no-deps --no-build-isolation
BESIDE = $(PIP) download --no-deps --only-binary=:all: --require-hashes

.PHONY: env demo test test-all test-slurm test-docker test-te-compiled lint docs bench gpu-check chaos fuzz locks clean slurm-installed

env: $(STAMP)

# Installed anew only when what is to be installed changes.
$(STAMP): pyproject.toml setup.py $(wildcard locks/*.txt) $(TE) $(TRITON)
	@$(PYTHON) -c 'import sys; sys.exit("python: " + sys.version.split()[0] + " is too old; install Python 3.11 or newer, or set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r locks/build.txt
	$(LOCKED) -r locks/runtime.txt $(if $(wildcard locks/dev.txt),-r locks/dev.txt)
# The build for CPUs where pip finds it, as PyTorch's index has it; else PyPI's.
	@$(LOCKED) -r locks/torch_cpu.txt 2>/dev/null || { echo "torch: PyPI's build, with CUDA's libraries: pip finds none for CPUs"; $(LOCKED) -r locks/torch.txt -r locks/cuda.txt; }
	$(PIP) install --no-deps --no-build-isolation -e .
# Transformer Engine's Python and Triton, for tests: beside the packages, so that nothing else finds them. An image has no
# tests.
	@rm -rf $(VENV)/te $(VENV)/triton
	$(if $(TE),$(BESIDE) -d $(VENV)/te -r $(TE))
	$(if $(TE),$(BIN)/python -m zipfile -e $(VENV)/te/*.whl $(VENV)/te)
	$(if $(TRITON),$(BESIDE) -d $(VENV)/triton -r $(TRITON))
	$(if $(TRITON),cd $(VENV)/triton && ../bin/python -m zipfile -e *.whl . && rm *.whl && chmod -R a+x triton/backends/nvidia/bin)
	@touch $(STAMP)

# Two pipeline stages x experts over two ranks: four processes, on two cores, on real text. What a demo of before has
# trained is kept under another name.
demo: $(STAMP)
	@if [ -e $(RUN) ]; then kept=$(RUN)-$$(date +%Y%m%d-%H%M%S); mv $(RUN) $$kept; echo "demo: starts anew; $(RUN) is now $$kept"; fi
	$(BIN)/dsv3 train --nproc-per-node 4 recipe=dsv3_tiny parallel=pp2_ep2 run.device=cpu run.name=demo logging.console_every_steps=10
	@$(BIN)/python launcher/demo.py run=$(RUN)

# Two lanes (CONTRIBUTING.md). `make test` is the fast one: every promise in a small form, all that is not marked `full`.
# `make test-all` is every test: the fast lane, then the rest. After `make test`, or in one call (`make test lint
# test-all`, as CI has it), nothing runs twice but the property tests, which take all their examples in the second lane.
# Four workers for two cores: ranks wait for each other, and SLURM's tests for jobs, most of the time. WORKERS=0: none.
WORKERS ?= 4
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
test: $(STAMP) slurm-installed
	$(PYTEST) -m "not full" --hypothesis-profile=fast

test-all: test
	$(PYTEST) -m "full or hypothesis"

# submit.py on a real SLURM of three nodes, on this machine.
test-slurm: $(STAMP) slurm-installed
	$(BIN)/python -m pytest tests/slurm tests/launcher/test_submit.py

# Debian's packages, where they can be installed; elsewhere the tests that need them are skipped, saying so.
PACKAGES := slurm-wlm munge shellcheck chromium g++
slurm-installed:
	@if command -v slurmctld >/dev/null && command -v shellcheck >/dev/null && command -v chromium >/dev/null && command -v g++ >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES)) >/dev/null 2>&1 \
	    || echo "packages: $(PACKAGES) could not be installed; tests that need them are skipped"; \
	else echo "packages: no root or no apt-get here; without $(PACKAGES) the tests that need them are skipped"; fi

# Runs the steps of docker/Dockerfile.cpu in a clean Debian; root, and some minutes.
test-docker: $(STAMP)
	$(BIN)/python -m testing.clean_root

# The tests of the te backend over Transformer Engine's compiled bindings, in an environment of their own, without a GPU:
# testing/te/README.md says where TE_BINDINGS comes from. TE_TORCH is the torch that they were compiled against.
TE_BINDINGS ?=
TE_TORCH ?= 2.11.0
TE_PYTHON ?= python3.12
TE_VERSION = $(shell sed -n 's/^transformer_engine==\([^ ]*\).*/\1/p' $(TE))
COMPILED := .cache/te-compiled
PIP_COMPILED = $(COMPILED)/bin/python -m pip --quiet --disable-pip-version-check
test-te-compiled:
	@[ -f "$(TE_BINDINGS)" ] || { echo "TE_BINDINGS = '$(TE_BINDINGS)' is no file; set it to a wheel of transformer_engine_torch $(TE_VERSION) (testing/te/README.md)"; exit 2; }
	rm -rf $(COMPILED)
	$(TE_PYTHON) -m venv $(COMPILED)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt >$(COMPILED)/constraints.txt
	$(PIP_COMPILED) install -c $(COMPILED)/constraints.txt torch==$(TE_TORCH) -e '.[dev]'
	$(PIP_COMPILED) download --no-deps --only-binary=:all: -d $(COMPILED)/te -r $(TE) transformer_engine_cu13==$(TE_VERSION)
	for wheel in $(COMPILED)/te/*.whl $(TE_BINDINGS); do $(COMPILED)/bin/python -m zipfile -e $$wheel $(COMPILED)/te || exit; done
	$(COMPILED)/bin/python -m pytest $$(grep -rlE 'preload=TE' tests --include='test_*.py')

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/tally lint --ignore 'tally/*' --fail-level style --slow-checks off docker/Dockerfile docker/Dockerfile.cpu

docs: $(STAMP)
	$(BIN)/python launcher/views/reference.py
	$(BIN)/python -m pytest tests/docs

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run_all

# On a machine with a GPU, seven minutes at most: docs/gpu_check.md. With the environment of make env where it is, else
# with the machine's own python3, as a container of a cluster has it. GPU_CHECK="seconds=120 only=losses" to choose.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check $(GPU_CHECK)

# locks/ and docs/licences.md, anew from constraints.txt, docker/constraints-gpu.txt and pyproject.toml.
locks: $(STAMP)
	$(BIN)/python -m testing.locks
	$(BIN)/python -m testing.licences

# A hundred kill -9 of random ranks at random moments, with checkpoints on disk and with states in memory; CHAOS_KILLS to
# choose.
chaos: $(STAMP)
	$(BIN)/python -m testing.chaos kills=$(or $(CHAOS_KILLS),100)
	$(BIN)/python -m testing.chaos_memory kills=$(or $(CHAOS_KILLS),100)

# Damaged files for every reader, FUZZ_SECONDS each; another FUZZ_SEED makes other files. docs/security.md
fuzz: $(STAMP)
	DSV3_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) DSV3_FUZZ_SEED=$(or $(FUZZ_SEED),1) $(PYTEST) -q tests/fuzz -k short

# What can be made again. What was trained cannot: runs/ is left alone.
clean:
	rm -rf $(VENV) .cache *.egg-info .pytest_cache .hypothesis .ruff_cache
	@if [ -e runs ]; then echo "clean: runs/ is kept, with the checkpoints in it"; fi
