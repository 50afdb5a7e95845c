# make demo: set up a fresh machine and run the main job.  make test: set up and run what CI runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: setup test fuzz lint types demo readme benchmarks device gallery claims comparison comparison-networks onnx real-models clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup.sh
	touch $@

test: setup lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# attack the library with generated cases: make fuzz MINUTES=5 SEED=0
MINUTES ?= 5
SEED ?= 0
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz --minutes $(MINUTES) --seed $(SEED)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

demo: setup
	$(BIN)/saccade compare softmax lightning moba mosa --task text --budget quick --seed 0 --out runs/demo

readme: setup
	$(BIN)/python tools/readme.py

benchmarks: setup
	$(BIN)/python benchmarks/run.py

# on a machine with a GPU: the tests that can run there, then the table; docs/speed-cuda.md
device: setup
	$(BIN)/python benchmarks/device.py

gallery: setup
	$(BIN)/saccade gallery --out docs/gallery.html

claims: setup
	$(BIN)/saccade claim --all --out docs

comparison: setup
	$(BIN)/python tools/comparison.py

comparison-networks: setup
	$(BIN)/python tools/comparison.py --networks

onnx: setup
	$(BIN)/python tools/exports.py

# the networks beside real pretrained models; sections whose packages are missing are left out
real-models: setup
	$(BIN)/python tools/real_models.py

clean:
	rm -rf $(VENV) build dist
