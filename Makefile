# demo   cells in, a trained model and a report out        test   lint and all tests but slow and gpu ones
# bench  the project against its peers                     lint   ruff check and format, codespell, mypy
# docs   the documentation, into build/site                notebooks   run them, into build/notebooks
# test-fast   the quick half of the tests                  test-slow   the slow ones, and many more examples
# gpu    the gpu tests, then the GPU benchmark; needs no network, and no .venv
# model  train the model of packages/fetal_tiny on DATA=geact_fetal.h5ad, and make its wheel
# test-transformers   transformers' tests of its own models, from its source distribution, on the models here
# Each makes .venv if it is absent. PYTHON=python3.12 make … picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Tests start many processes, which would each compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast test-slow gpu model test-transformers bench docs notebooks lint format clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,7s/^# //p' Makefile

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
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0

# Rooms that need neither training nor a process of their own.
FAST = $(addprefix tests/,genes sources/test_every_door.py sources/test_matrix_market.py sources/test_obs_columns.py \
	store/test_cell_store.py models/test_gene_columns.py models/test_tokenization_gene_bert.py models/test_rank_tokens.py \
	models/test_modeling_gene_bert.py models/test_packed_attention.py batches/test_collators.py batches/test_samplers.py)
test-fast: .venv/.dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 $(FAST)

test-slow: .venv/.dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 -m "slow or hypothesis" --hypothesis-profile many

# Without .venv, PYTHON's own packages serve, and those of a folder in PYTHONPATH: a machine with a GPU may lack a network.
# GPU="--device cpu" runs the benchmark on a CPU, where the gpu tests are skipped.
GPU ?= --minutes 8
GPU_OUT ?= gpu_out
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	@mkdir -p $(GPU_OUT)
	@echo "== running the gpu tests, a process per file, at most 180 s, into $(GPU_OUT)/tests.log"
	@rm -rf $(GPU_OUT)/tests && mkdir $(GPU_OUT)/tests && for file in $$(grep -rl --include='*.py' 'pytest\.mark\.gpu' tests); do \
		(HF_HUB_OFFLINE=1 timeout 180 $(GPU_PYTHON) -m pytest -v --tb=short -m gpu $$file > $(GPU_OUT)/tests/$$(basename $$file).log 2>&1 \
		|| touch $(GPU_OUT)/tests/failed) & done; wait
	@cat $(GPU_OUT)/tests/*.log > $(GPU_OUT)/tests.log; grep -h "PASSED\|SKIPPED\|FAILED\|ERROR\|^E  " $(GPU_OUT)/tests.log || true
	@echo "== running the benchmark, into $(GPU_OUT)"
	@HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 timeout 900 $(GPU_PYTHON) -m benchmarks gpu $(GPU) --out $(GPU_OUT)
	@test ! -e $(GPU_OUT)/tests/failed || { echo "the gpu tests failed: see $(GPU_OUT)/tests.log"; exit 1; }

model: .venv/.demo
	@test -f "$(DATA)" || { echo "pass the cells of GeACT: make model DATA=geact_fetal.h5ad"; exit 1; }
	@rm -rf build/fetal_tiny
	@$(BIN)/stformer-hf finetune --config recipes/finetune_fetal_tiny.yaml --data $(DATA) --split_by batch --output build/fetal_tiny
	@$(BIN)/python packages/pack_model.py build/fetal_tiny packages/fetal_tiny
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist packages/fetal_tiny

# The installed version's. Its tests have markers of their own, and import one package that nothing else here needs.
TRANSFORMERS = $(shell $(BIN)/python -c "import transformers; print('transformers-' + transformers.__version__)")
test-transformers: .venv/.dev
	@$(MAKE) --no-print-directory .transformers_tests/$(TRANSFORMERS)
	@echo "== running the tests of $(TRANSFORMERS)"
	@OMP_NUM_THREADS=1 TRANSFORMERS_SOURCES=.transformers_tests/$(TRANSFORMERS) RUN_SLOW=1 HF_HUB_OFFLINE=1 \
		PYTHONPATH=.transformers_tests/packages $(BIN)/python -m pytest -q -m slow -rx --show-capture=no \
		-o strict_markers=false -W ignore::pytest.PytestUnknownMarkWarning tests/models/test_transformers_mixins.py

.transformers_tests/transformers-%:
	@echo "== fetching the source distribution of transformers $*"
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .transformers_tests transformers==$*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .transformers_tests/packages parameterized
	@tar -xzf $@.tar.gz -C .transformers_tests transformers-$*/tests

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
	@echo "== ruff check, ruff format --check, codespell, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

format: .venv/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv .transformers_tests demo_output build
