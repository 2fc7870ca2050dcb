# `make run` and `make test` set everything up that they need.
.DEFAULT_GOAL := help
.PHONY: help run test test-steps test-crowded test-newer-slurm lint bench chaos format docs model env-cpu env-v100 env-a100 lock clean

PROFILE ?= profiles/local
PYTHON := .venv/bin/python
NEWER_SLURM := $(HOME)/.cache/servegrid/slurm-trixie
# What differs between versions of Slurm: records, lost nodes, jobs that Slurm holds.
ON_BOTH := slurm_s_record or loss_of_a_node or slurm_holds or again_and_again
CAMPAIGN := tests/slurm/test_slurm_chaos.py
CHECKED := workflow plugin tests docs bench

# pip's advice is of no use for an environment that is made from a complete list.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# The tests start hundreds of Python processes. None should compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' Makefile | expand -t 16

run: .venv/.ready model  ## measure the demo study: tables, figures and one page
	@$(PYTHON) -m snakemake_executor_plugin_submitit unlock  # if the last run was killed
	@.venv/bin/snakemake --profile $(PROFILE)

test: .venv/.dev model  ## lint, type-check and run all tests
	@start=$$(date +%s); $(MAKE) --no-print-directory test-steps; status=$$?; \
	seconds=$$(($$(date +%s) - start)); \
	if [ $$status = 0 ]; then result=passed; else result=FAILED; fi; \
	echo "make test: $$result after $$((seconds / 60)) min $$((seconds % 60)) s"; exit $$status

test-steps:
	tests/install.sh
	$(MAKE) --no-print-directory lint
	$(PYTHON) -m pytest -n 2 --dist worksteal tests/unit tests/simulation
	$(MAKE) --no-print-directory -j 2 --output-sync=target test-crowded test-newer-slurm
	$(PYTHON) -m pytest -m "not crowded and not chaos" tests/integration  # timed tests get the machine to themselves
	$(PYTHON) -m pytest -s $(CAMPAIGN)  # it looks for what is left behind, so it runs alone

# The + shows the output at once; that of the other target comes when it ends.
test-crowded:
	+$(PYTHON) -m pytest -n 6 --dist worksteal -m "crowded and not chaos" tests/integration tests/slurm

test-newer-slurm:
	@if PATH="$(CURDIR)/.venv/bin:$$PATH" tests/unpack_slurm.sh trixie $(NEWER_SLURM); then \
		echo "The same with $$($(NEWER_SLURM)/wrap/sinfo -V):"; \
		UNPACKED_SLURM=$(NEWER_SLURM) $(PYTHON) -m pytest -k "$(ON_BOTH)" tests/slurm; \
	else \
		echo "The tests with a newer Slurm are left out: they need Debian on x86-64."; \
		test -z "$$CI"; \
	fi

lint: .venv/.dev  ## ruff, mypy, snakefmt, snakemake --lint
	.venv/bin/ruff check --no-cache $(CHECKED)
	.venv/bin/ruff format --check $(CHECKED)
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/snakefmt --check Snakefile workflow/rules
	.venv/bin/snakemake --lint

bench: .venv/.ready model  ## the cost of measuring, and the validation of predictions (PEERS=1: other clients, SCALE=1: to 50,000 cells)
	$(PYTHON) bench/machinery.py
	$(PYTHON) bench/gather.py
	$(PYTHON) bench/prediction.py
	$(PYTHON) bench/client.py $(if $(PEERS),--peers)
	$(if $(SCALE),$(PYTHON) bench/scale.py)

chaos: .venv/.dev model  ## random faults during a rehearsal on a private Slurm (SEED, FAULTS, MINUTES)
	tests/install.sh
	SEED=$(or $(SEED),1) FAULTS=$(or $(FAULTS),500) MINUTES=$(or $(MINUTES),180) \
		$(PYTHON) -m pytest -s $(CAMPAIGN)
	$(PYTHON) -m pytest -s -m chaos tests/integration tests/slurm

format: .venv/.dev  ## run the formatters
	.venv/bin/ruff check --fix $(CHECKED)
	.venv/bin/ruff format $(CHECKED)
	.venv/bin/snakefmt Snakefile workflow/rules

docs: .venv/.ready  ## write the generated parts of the documentation
	$(PYTHON) docs/generate.py

model: .venv/.ready  ## download and convert the demo's model, once
	@.venv/bin/servegrid fetch

env-cpu: .venv/.ready  ## the environment without a GPU: .venv

env-v100: .venv-v100/.ready  ## the environment for V100 GPUs: .venv-v100 (9 GB)

env-a100: .venv-a100/.ready  ## the environment for A100 GPUs and newer: .venv-a100 (9 GB)

lock: .venv/.dev  ## resolve workflow/envs/*.in again
	workflow/envs/lock.sh

clean:  ## remove the environments; results stay
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache

.venv/.ready: workflow/envs/create.sh workflow/envs/cpu.txt pyproject.toml plugin/pyproject.toml
	@echo "Setting up .venv (about 3 minutes) ..."
	@workflow/envs/create.sh .venv workflow/envs/cpu.txt
	@.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable . --editable plugin
	@touch $@

.venv-%/.ready: workflow/envs/create.sh workflow/envs/%.txt pyproject.toml plugin/pyproject.toml
	@echo "Setting up .venv-$* (about 10 minutes) ..."
	@workflow/envs/create.sh .venv-$* workflow/envs/$*.txt
	@.venv-$*/bin/pip install --quiet --no-deps --no-build-isolation --editable . --editable plugin
	@touch $@

.venv/.dev: .venv/.ready workflow/envs/dev.txt
	@echo "Installing the tools for development ..."
	@.venv/bin/pip install --quiet --no-deps -r workflow/envs/dev.txt
	@touch $@
