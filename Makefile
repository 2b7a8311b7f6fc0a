# demo   cells in, a trained model and a report out        test   lint and all tests but slow and gpu ones
# bench  the project against its peers                     lint   ruff check and format, codespell
# docs   the documentation, into build/site                notebooks   run them, into build/notebooks
# Each makes .venv if it is absent. PYTHON=python3.12 make … picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench docs notebooks lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,4s/^# //p' Makefile

# The stamp says which extras are installed; a change of the dependencies installs anew. Byte code is made at the first
# import of a module, not here for all of them: that is two thirds of the time of an installation.
.venv/.%: pyproject.toml constraints.txt
	@echo "== making .venv and installing stformer_hf[$*]"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: .venv/.demo
	@echo "== running the demo into demo_output"
	@$(BIN)/stformer-hf demo --output demo_output --overwrite

test: lint
	@echo "== running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: .venv/.bench
	@echo "== running the benchmarks"
	@$(BIN)/python -m benchmarks

# Strict: a broken link, or a name of the API that is not there, fails (--quiet would hide it). No network is used.
docs: .venv/.docs
	@echo "== building the documentation into build/site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

notebooks: .venv/.docs
	@echo "== running the notebooks into build/notebooks"
	@$(BIN)/python docs/run_notebooks.py --output build/notebooks

lint: .venv/.dev
	@echo "== ruff check, ruff format --check, codespell"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell

format: .venv/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv demo_output build
