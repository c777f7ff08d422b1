# The two targets that matter do all their set-up: `make quickstart` and `make test`.
PYTHON ?= $(shell python3.13 -c "" 2>/dev/null && echo python3.13 || echo python3)
VENV ?= .venv
WORKDIR ?= runs/quickstart
WORKERS ?= 2
FUZZ_SECONDS ?= 300
BIN = $(VENV)/bin
# On CPUs a step's temporaries are GiBs that XLA maps and frees each time: in huge pages it is a tenth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-new test-oracles test-long gpu fuzz reliability lint docs docs-check clean

quickstart: $(VENV)/run
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --output=$(WORKDIR)/eval
	@echo "Open $(WORKDIR)/eval/scenes.png"

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0

test: $(VENV)/test lint  # all tests with Python 3.11, elsewhere all but the oracles
	$(PYTEST)

test-new: $(VENV)/test $(VENV)/cuda  # a fast part, for another Python and newer libraries
	$(PYTEST) tests/model tests/aot tests/eval

test-oracles: $(VENV)/test  # those that need torch and transformers, which requirements-test.txt has for Python 3.11
	$(PYTEST) -m 'oracle and not long and not gpu'

test-long: $(VENV)/test
	$(BIN)/python -m pytest -m long

# On a machine with an NVIDIA GPU of 80 GB, with jax[cuda13] and torch for CUDA in the environment: what needs one is
# tested, then timed beside the peer, and a trace is written. JSON and the trace go to build/gpu.
GPU_BENCHMARK = XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m benchmarks
gpu: $(VENV)/test
	mkdir -p build/gpu
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -n 0 -m gpu
	$(GPU_BENCHMARK) training --device=gpu --dtype=bfloat16 --batch=256 --steps=10 --output=build/gpu/train_256.json
	$(GPU_BENCHMARK) training --device=gpu --dtype=bfloat16 --batch=1024 --steps=5 --peer_modes --output=build/gpu/train_1024.json
	$(GPU_BENCHMARK) encoding --device=gpu --dtype=bfloat16 --batch=256 --steps=10 --output=build/gpu/encoding.json
	$(GPU_BENCHMARK) windows --device=gpu --dtype=bfloat16 --batch=64 --steps=10 --output=build/gpu/windows.json
	JAX_PLATFORMS=cuda,cpu $(BIN)/python train.py --config=configs/quickstart.py --workdir=build/gpu/run --config.model.dtype=bfloat16 \
	  --config.profile=True --config.total_steps=10 --config.optim.warmup_steps=2 --config.eval.panel_steps='()'
	$(BIN)/python -m groupvit_jax.aot --config=configs/groupvit_vits16_gcc_yfcc.py --config.batch_size=1024 \
	  --topology=h100:1 --by_scope --json=build/gpu/aot.json

fuzz: $(VENV)/test  # damaged and hostile files, for minutes of each kind; counts go to build/fuzz.jsonl
	mkdir -p build
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_REPORT=build/fuzz.jsonl $(BIN)/python -m pytest -n 0 -o timeout=0 tests/fuzz

reliability: $(VENV)/test  # kills and preempts tiny runs, minutes on two cores; writes docs/reliability.md
	$(BIN)/python -m benchmarks reliability

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

$(VENV)/run: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("error: $(PYTHON) is Python %d.%d; \
	it takes 3.11 or newer: name one, as in  make PYTHON=python3.13 $(MAKECMDGOALS)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test: requirements-test.txt requirements-demo.txt $(VENV)/run
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

# XLA's compiler for GPUs. In the environment itself JAX would look for a GPU at each start.
$(VENV)/cuda: $(VENV)/test
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	  $(BIN)/python -m pip install --quiet --no-deps --target $@ "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"

# These pages and the API reference as a site, build/site/index.html; after `make quickstart` with its model as page/.
docs: $(VENV)/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	test ! -e $(WORKDIR)/config.json || \
	  $(BIN)/python -m groupvit_jax.commands.export --workdir=$(WORKDIR) --format=web --output=build/site/page

docs-check: $(VENV)/test  # with Python 3.11: it writes weights with torch
	$(BIN)/python docs/rooms.py --check
	$(BIN)/python docs/check.py README.md $(wildcard docs/*.md)

clean:
	rm -rf build $(VENV) .cache .pytest_cache .ruff_cache
