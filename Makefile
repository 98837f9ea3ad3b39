# Two commands matter: `make demo` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
VENV   ?= .venv
# On an index whose torch is the CUDA build: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: demo test sim chaos fuzz loops-test slurm-test systemd-test names-test ranks-test lint format docs bench package-test clean

demo: $(READY)
	$(BIN)/holdfast demo

test: lint
	$(BIN)/python -m pytest

# A real Slurm on this machine, four minutes. As root, with Debian's slurm-wlm and munge installed.
slurm-test: $(READY)
	$(BIN)/python -m pytest -m slurm tests/slurm

# Simulated clusters on all cores; each failure is one line with what replays it: make sim SEEDS=1000 FIRST=0
SEEDS ?= 200
FIRST ?= 0
sim: $(READY)
	cd tests && ../$(BIN)/python -m sim.batch --seeds $(SEEDS) --first $(FIRST)

# Real daemons under a seeded schedule of kills, stops, losses, cut and slow links, full memory and bit flips, in namespaces
# where root or user namespaces allow them: make chaos MINUTES=30 CHAOS_SEED=1
MINUTES ?= 5
CHAOS_SEED ?= 1
chaos: $(READY)
	$(BIN)/python tests/chaos/chaos.py --minutes $(MINUTES) --seed $(CHAOS_SEED)

# Nonsense for everything that hears or reads bytes; 1,500 inputs a second: make fuzz INPUTS=1000000 FUZZ_SEED=1
INPUTS ?= 100000
FUZZ_SEED ?= 1
fuzz: $(READY)
	cd tests && ../$(BIN)/python -m fuzz.fuzz --inputs $(INPUTS) --seed $(FUZZ_SEED)

# Loops of other libraries, killed and run again, three minutes. Installs them.
loops-test: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[lightning,transformers]'
	$(BIN)/python -m pytest -m loops tests/loops

# The unit under a systemd of its own, two minutes. As root.
systemd-test: $(READY)
	$(BIN)/python -m pytest -m systemd tests/systemd

# Nodes that are names, with a name server in namespaces of its own, a minute. As root.
names-test: $(READY)
	$(BIN)/python -m pytest -m names tests/names

# 64 ranks on 8 daemons, which lose two nodes, two or three minutes.
ranks-test: $(READY)
	$(BIN)/python -m pytest -s -m ranks tests/integration/test_ranks.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python docs/reference.py

bench: $(READY)
	$(BIN)/python bench/end_to_end.py

# The constraints file pins every version, so that two machines build the same environment.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --group dev --editable '.[torch,sealed,s3]'
	touch $(READY)

# The source distribution installs by itself, in an environment of its own, from a folder without the sources; the kernel is built.
PACKAGE = $(CURDIR)/build/package-test
package-test:
	rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)/elsewhere
	$(PYTHON) -m venv $(PACKAGE)/venv
	$(PACKAGE)/venv/bin/pip install --quiet 'setuptools>=77'
	$(PACKAGE)/venv/bin/python -c "import setuptools.build_meta as b; b.build_sdist('$(PACKAGE)/dist')"
	cd $(PACKAGE)/elsewhere && ../venv/bin/pip install --quiet --constraint $(CURDIR)/constraints.txt ../dist/holdfast-*.tar.gz
	cd $(PACKAGE)/elsewhere && ../venv/bin/holdfast --version && ../venv/bin/python -c \
	  "import holdfast.coding._native as n; from importlib.resources import files; \
	   assert 'package-test/venv' in n.__file__; (files('holdfast.daemon.shell') / 'page.html').read_text()"

clean:
	rm -rf $(VENV) build dist *.egg-info
