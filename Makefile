# Every target does its own set-up. `make run` and `make test` are all that a newcomer needs.
.DEFAULT_GOAL := help
.PHONY: help run test lint format docs model lock clean

PROFILE ?= profiles/local
PYTHON := .venv/bin/python
CHECKED := workflow tests docs

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

run: .venv/.ready model  ## measure the demo study: tables and plots
	$(PYTHON) -m snakemake_executor_plugin_submitit unlock  # if the last run was killed
	.venv/bin/snakemake --profile $(PROFILE)

test: .venv/.dev model  ## lint, type-check and run all tests
	$(MAKE) --no-print-directory lint
	$(PYTHON) -m pytest

lint: .venv/.dev  ## what must be clean: ruff, mypy, snakefmt, snakemake --lint
	.venv/bin/ruff check --no-cache $(CHECKED)
	.venv/bin/ruff format --check $(CHECKED)
	.venv/bin/mypy
	.venv/bin/snakefmt --check Snakefile workflow/rules
	.venv/bin/snakemake --lint

format: .venv/.dev  ## let the formatters do their work
	.venv/bin/ruff check --fix $(CHECKED)
	.venv/bin/ruff format $(CHECKED)
	.venv/bin/snakefmt Snakefile workflow/rules

docs: .venv/.ready  ## write the generated parts of the documentation
	$(PYTHON) docs/generate.py

model: .venv/.ready  ## fetch and convert the demo's model, once
	.venv/bin/servegrid prepare

lock: .venv/.dev  ## resolve the lists in workflow/envs anew
	workflow/envs/lock.sh

clean:  ## remove the environment; results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

.venv/.ready: workflow/envs/create.sh workflow/envs/cpu.txt pyproject.toml
	workflow/envs/create.sh .venv workflow/envs/cpu.txt
	.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.ready workflow/envs/dev.txt
	.venv/bin/pip install --quiet --no-deps -r workflow/envs/dev.txt
	@touch $@
