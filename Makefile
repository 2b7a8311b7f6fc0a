# demo   cells in, a trained model and a report out        test   lint and all tests but slow and gpu ones
# bench  the project against its peers                     lint   ruff check and format
# Each makes .venv if it is absent. PYTHON=python3.12 make … picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,3s/^# //p' Makefile

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

lint: .venv/.dev
	@echo "== ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: .venv/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv demo_output
