# Everything runs in .venv, made from pyproject.toml and constraints.txt. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-slow test-gpu check audit site reference families bench results unseen languages tables clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/kvembed pull smollm2
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/kvembed pull smollm2
	$(BIN)/pytest -m "slow and not gpu"

# On a machine with an NVIDIA GPU, where the pinned torch is the one for it
test-gpu: $(INSTALLED)
	$(BIN)/kvembed pull smollm2
	$(BIN)/pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/tables.py --check
	$(BIN)/python tools/reference.py --check
	$(BIN)/python tools/audit.py --offline
	$(MAKE) --no-print-directory site

# Dependencies: pins, licences, withdrawn releases, known holes; 1: something was found, 3: a service could not be asked
audit: $(INSTALLED)
	$(BIN)/python tools/audit.py

# build/site: the documentation; a warning is an error. `.venv/bin/mkdocs serve` shows it while it is written.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/cli.md and docs/python.md, from help texts and docstrings
reference: $(INSTALLED)
	$(BIN)/python tools/reference.py

# docs/families.md: which decoder families work, from tiny random models of each
families: $(INSTALLED)
	$(BIN)/python tools/families.py

# docs/speed.md: ratios of interleaved runs; DATA as below, for a corpus against sentence-transformers; GGUF is a model
# file, for the same against llama.cpp, with llama-cpp-python installed by hand; SHAPE=qwen3-4b is random weights of that
# shape instead, for a GPU
bench: $(INSTALLED)
	$(BIN)/python tools/bench.py $(if $(DATA),--data $(DATA)) $(if $(GGUF),--gguf $(GGUF)) $(if $(SHAPE),--shape $(SHAPE))
	$(BIN)/python tools/tables.py

# results/: what the ledger lacks, for hours or days; DATA is a folder of tasks, MODELS as tools/results.py says
results: $(INSTALLED)
	$(BIN)/python tools/results.py --data $(DATA) $(MODELS)
	$(BIN)/python tools/auto.py --data $(DATA)
	$(BIN)/python tools/ablation.py --data $(DATA)

# results/unseen: tasks made of packages of Debian, in the folder DATA; MODELS as above
unseen: $(INSTALLED)
	$(BIN)/python tools/unseen.py make $(DATA)
	$(BIN)/python tools/unseen.py run $(DATA) $(MODELS)

# results/languages: package descriptions in eight languages, in the folder DATA; MODELS as above
languages: $(INSTALLED)
	$(BIN)/python tools/languages.py make $(DATA)
	$(BIN)/python tools/languages.py run $(DATA) $(MODELS)

# docs/results.md and docs/speed.md, plots and README's table, from the files in results/
tables: $(INSTALLED)
	$(BIN)/python tools/tables.py

clean:
	rm -rf .venv

# torch first and pinned: unpinned, or as somebody's dependency, it would bring gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
