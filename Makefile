# Everything runs in the project's own virtual environment, made on first use. `make demo` and `make test` need nothing else.
VENV := $(abspath .venv)
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-faults test-network test-lan test-llama fuzz soak check docs format clean
.PHONY: bench bench-quality bench-speed bench-billion bench-fleet bench-transfer bench-assembly bench-generation \
	bench-prepare bench-memory bench-startup bench-attacks bench-audit bench-busy

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py --run-dir runs/demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 $(PYTEST_ARGS)

# Kills a coordinator or a node at every change of state that it makes: an hour or two, and a table.
test-faults: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults.sweep $(ARGS)

# A node behind bad lines: ten minutes, and a table.
test-network: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults.network $(ARGS)

# Run after run on one coordinator process each, nodes that live on: does anything grow? ARGS="--hours 0.25" is a shorter one.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults.soak $(ARGS)

# A run across four machines, which are network namespaces: needs Linux and root, and takes minutes on two idle cores.
test-lan: $(VENV)/.installed-dev
	$(BIN)/python -m tests.lan $(ARGS)

# The code of the export: .ci/run holds it against llama.cpp once more when it is not what it was the last time.
EXPORT := forge/publish/gguf.py forge/model/names.py

# llama.cpp itself on an exported model; compiling its Python binding takes ten minutes.
test-llama: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt llama-cpp-python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rP tests/publish/test_llama.py
	sha256sum $(EXPORT) > tests/publish/llama.sha256

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy forge coordinator node benchmarks tests docs
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 forge coordinator node
	PYTHON=$(BIN)/python $(BIN)/python benchmarks/check_proto.py
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py --run-dir runs/bench

bench-quality: $(VENV)/.installed
	$(BIN)/python benchmarks/quality.py --data $(DATA) $(ARGS)

bench-speed: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.speed --output benchmarks/results/speed.md $(ARGS)

# Beside programs that keep a processor busy, as on a machine that somebody uses.
bench-busy: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.busy $(ARGS)

# A billion parameters in 8 GB: two hours on two cores.
bench-billion: $(VENV)/.installed
	$(BIN)/python -m benchmarks.billion --output benchmarks/results/billion.md $(ARGS)

# A thousand nodes on one coordinator: a quarter of an hour. ARGS="--nodes 100 --seconds 60" is a shorter one.
bench-fleet: $(VENV)/.installed
	$(BIN)/python -m benchmarks.fleet $(ARGS)

bench-transfer: $(VENV)/.installed
	$(BIN)/python -m benchmarks.transfer $(ARGS)

# Against mergekit too with ARGS="--mergekit PATH/TO/bin/mergekit-moe".
bench-assembly: $(VENV)/.installed
	$(BIN)/python -m benchmarks.assembly $(ARGS)

bench-generation: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.generation $(ARGS)

# DATA is a file of JSON lines with a `text`, or one of the names that data.source takes.
bench-prepare: $(VENV)/.installed
	$(BIN)/python -m benchmarks.prepare --data $(or $(DATA),python-stdlib) $(ARGS)

bench-startup: $(VENV)/.installed
	$(BIN)/python -m benchmarks.startup $(ARGS)

# Hostile shards against the gate of a small run that is trained first.
bench-attacks: $(VENV)/.installed
	$(BIN)/python -m benchmarks.attacks --output benchmarks/results/attacks.md $(ARGS)

# A part of a training repeated with other threads and types, and against made-up checkpoints.
bench-audit: $(VENV)/.installed
	$(BIN)/python -m benchmarks.audit --output benchmarks/results/audit.md $(ARGS)

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --inputs 1000000

bench-memory: $(VENV)/.installed
	$(BIN)/python -m benchmarks.memory --output benchmarks/results/memory.md $(ARGS)

# The pages that are written from the code: docs/cli.md and docs/configuration.md.
docs: $(VENV)/.installed
	$(BIN)/python -m docs.generate

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build
