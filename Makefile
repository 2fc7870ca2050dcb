# Every target does its own set-up. `make run` and `make test` are all that a newcomer needs.
.DEFAULT_GOAL := help
.PHONY: help run test lint bench format docs model lock clean

PROFILE ?= profiles/local
PYTHON := .venv/bin/python
CHECKED := workflow plugin tests docs bench

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' Makefile | expand -t 16

run: .venv/.ready model  ## measure the demo study: tables and plots
	$(PYTHON) -m snakemake_executor_plugin_submitit unlock  # if the last run was killed
	.venv/bin/snakemake --profile $(PROFILE)

test: .venv/.dev model  ## lint, type-check and run all tests
	tests/install.sh
	$(MAKE) --no-print-directory lint
	$(PYTHON) -m pytest -n 2 tests/unit
	$(PYTHON) -m pytest -n 2 -m crowded tests/integration
	$(PYTHON) -m pytest -m "not crowded" tests/integration  # what is timed has the machine alone
	$(PYTHON) -m pytest -n 3 tests/slurm  # they mostly wait, each for a Slurm of its own

lint: .venv/.dev  ## what must be clean: ruff, mypy, snakefmt, snakemake --lint
	.venv/bin/ruff check --no-cache $(CHECKED)
	.venv/bin/ruff format --check $(CHECKED)
	.venv/bin/mypy
	.venv/bin/snakefmt --check Snakefile workflow/rules
	.venv/bin/snakemake --lint

bench: .venv/.ready model  ## what measuring costs: the machinery, the client (PEERS=1: beside others)
	$(PYTHON) bench/machinery.py
	$(PYTHON) bench/gather.py
	$(PYTHON) bench/client.py $(if $(PEERS),--peers)

format: .venv/.dev  ## let the formatters do their work
	.venv/bin/ruff check --fix $(CHECKED)
	.venv/bin/ruff format $(CHECKED)
	.venv/bin/snakefmt Snakefile workflow/rules

docs: .venv/.ready  ## write the generated parts of the documentation
	$(PYTHON) docs/generate.py

model: .venv/.ready  ## fetch and convert the demo's model, once
	.venv/bin/servegrid fetch

env-cpu: .venv/.ready  ## the environment without a GPU: .venv

env-v100: .venv-v100/.ready  ## the one for V100 GPUs (9 GB): .venv-v100

env-a100: .venv-a100/.ready  ## the one for A100 GPUs and newer: .venv-a100

lock: .venv/.dev  ## resolve the lists in workflow/envs anew
	workflow/envs/lock.sh

clean:  ## remove the environments; results stay
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache

.venv/.ready: workflow/envs/create.sh workflow/envs/cpu.txt pyproject.toml plugin/pyproject.toml
	workflow/envs/create.sh .venv workflow/envs/cpu.txt
	.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable . --editable plugin
	@touch $@

.venv-%/.ready: workflow/envs/create.sh workflow/envs/%.txt pyproject.toml plugin/pyproject.toml
	workflow/envs/create.sh .venv-$* workflow/envs/$*.txt
	.venv-$*/bin/pip install --quiet --no-deps --no-build-isolation --editable . --editable plugin
	@touch $@

.venv/.dev: .venv/.ready workflow/envs/dev.txt
	.venv/bin/pip install --quiet --no-deps -r workflow/envs/dev.txt
	@touch $@
