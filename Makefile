# `make demo` and `make test` set everything up in a fresh clone, in its own .venv, which is reused while it is current.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes share the tests, which spend half of their time waiting for Ray or a command to start. `make test FILE=…` runs one file.
FILE :=
PYTEST = $(BIN)/python -m pytest -q --durations 10 $(if $(FILE),$(FILE),-n 2 --dist loadfile --no-loadscope-reorder)

.PHONY: help demo cluster cluster-demo test test-slow test-all lint format wheel constraints architecture reference docs clean

help:
	@echo "make demo      synthetic hearts, shards, training, scores and a report (a few minutes on 2 cores)"
	@echo "make cluster   a Ray cluster on this machine; make cluster-demo submits the demo to it, stage by stage"
	@echo "make test      the fast tests, and the times of the ten slowest; FILE=tests/... runs those of one file"
	@echo "make test-all  the same, and the tests that are slow or need the real data"
	@echo "make constraints  rewrites constraints.txt, the image's packages by version and hash (UPGRADE=--upgrade for newer ones)"
	@echo "make docs      the documentation as a site in build/site; make reference rewrites the list of flags"
	@echo "make lint | format | wheel | clean"

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/python -m heartseg.datasets.phantom demo/phantom --patients 40 --workers 2
	$(BIN)/python jobs/pipeline.py quick --source demo/phantom --out demo --workers 2 --train.epochs 20 --train.batch-size 8

cluster: $(VENV)/ready
	cluster/local.sh start

cluster-demo: $(VENV)/ready
	$(BIN)/python -m heartseg.datasets.phantom demo/phantom --patients 40 --workers 2
	found=$$(cluster/local.sh env) && eval "$$found" && $(BIN)/python jobs/pipeline.py quick --submit \
		--source demo/phantom --out demo/submitted --workers 2 --train.epochs 10 --train.batch-size 8

test: $(VENV)/ready
	$(PYTEST) -m "not slow and not real_data"

test-slow: $(VENV)/ready
	$(PYTEST) -rs -m "slow or real_data"

# The slow targets also try more examples of each property.
test-slow test-all: export HEARTSEG_HYPOTHESIS := full
test-all: test test-slow

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: $(VENV)/ready
	$(BIN)/python -m build --wheel

# Names, versions and hashes, without an index address, which depends on the installing machine.
constraints: $(VENV)/ready
	$(BIN)/uv pip compile pyproject.toml --extra cluster --extra formats $(UPGRADE) --quiet \
		--python-version 3.11 --python-platform x86_64-unknown-linux-gnu --only-binary :all: \
		--generate-hashes --custom-compile-command "make constraints" --no-annotate --output-file constraints.txt

# Draws the picture of docs/explanation/architecture.md from the imports.
architecture: $(VENV)/ready
	$(BIN)/python docs/draw_rooms.py

# Lists all flags in docs/reference/flags.md from the dataclasses.
reference: $(VENV)/ready
	$(BIN)/python docs/list_flags.py

# The site's packages are installed only for it. The pages keep their paths, and so their links.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE CITATION.cff cluster/README.md docs
MKDOCS = $(BIN)/mkdocs

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs: $(VENV)/docs-ready
	rm -rf build/pages && mkdir -p build/pages && tar -cf - $(PAGES) | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=true $(MKDOCS) build --strict
	@echo build/site/index.html

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
