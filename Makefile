# `make demo` and `make test` work on a fresh machine: they create .venv and install into it first, once.
PYTHON ?= python3
# A worker for each core: a third one on two cores imports everything once more, and all of them became slower.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
OUT ?= runs/demo

BIN := .venv/bin
EXTRAS := dev,notebook,export
INSTALLED := .venv/.installed
MODELS := models/smollm2-135m/.complete
SOURCES := $(shell find workbench probes experiments -name '*.py')
OLDEST := tests/io tests/store tests/results tests/probes/test_logit_lens.py tests/sae/test_sparsity.py
export OUT MODEL
# The oldest jaxtyping instruments packages after conftest files have imported them: there, shapes are not checked.
# Every worker and every process that a test starts would compile the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest torture lint style types format models bench docs gallery notebooks site demo-model constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(INSTALLED) ## every probe on the embedded model or MODEL, ending in a report [OUT=runs/demo, MODEL=folder]
	$(BIN)/workbench demo --out "$$OUT" $(if $(MODEL),--model "$$MODEL")

test: style $(MODELS) ## check style, then run every test [JOBS=2, PYTEST="-k store"]
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST)

test-oldest: ## run a smaller set of tests with the oldest supported versions of the dependencies
	test -x build/oldest/bin/pip || $(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install -c constraints-oldest.txt -e ".[dev,export]"
	build/oldest/bin/pytest -p no:xdist -o addopts="--import-mode=importlib -p no:logging -m 'not torture'" $(OLDEST)

torture: $(INSTALLED) ## try every crash point and 10,000 damages of each file; resumes; writes docs/reliability.md
	$(BIN)/python tests/torture $(TORTURE)

lint: style types ## check style and types

style: $(INSTALLED) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build/types.txt ## check static types, where a source has changed since the last check

build/types.txt: $(INSTALLED) $(SOURCES) pyproject.toml
	rm -rf build/types && mkdir -p build/types && cp -R workbench build/types/workbench
	cp -R probes experiments build/types/workbench
	$(BIN)/basedpyright > $@ || { \
	  sed -e 's#build/types/workbench/\(probes\|experiments\)/#\1/#' -e 's#build/types/##' $@; exit 1; }

format: $(INSTALLED) ## format the code and apply the fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure speed and memory against other libraries
	$(BIN)/python -m workbench.experiments.benchmarks

docs: $(INSTALLED) ## write the generated pages and pictures under docs/: about 40 minutes on one core
	$(BIN)/python -m workbench.experiments.demo_model.card
	$(BIN)/python -m workbench.experiments.architectures
	$(BIN)/python -m workbench.experiments.findings
	$(BIN)/python -m workbench.experiments.pictures

gallery: $(INSTALLED) $(MODELS) ## draw docs/gallery.md: every probe on two models, more than an hour on one core
	$(BIN)/python -m workbench.experiments.pictures.gallery

notebooks: $(INSTALLED) ## run the notebooks and keep their outputs in them [NOTEBOOKS=notebooks/steering.ipynb]
	$(BIN)/python -m workbench.experiments.pictures.notebooks $(NOTEBOOKS)

site: $(INSTALLED) ## build the documentation as a site in build/site; a broken link or an undocumented name fails
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict --site-dir build/site

models: $(MODELS) ## fetch the real model of the tests, SmolLM2-135M, into models/ (93 MB fetched, 540 MB written)

$(MODELS): $(INSTALLED)
	$(BIN)/python tests/support/fetch_models.py models/smollm2-135m || echo "no real model: its tests are skipped"

demo-model: $(INSTALLED) ## train the embedded model and SAE anew, two seeds side by side: about an hour on two cores
	$(MAKE) -j 2 demo-run-0 demo-run-1
	$(BIN)/python -m workbench.experiments.demo_model.ship runs/demo-0
	$(BIN)/python -m workbench.experiments.demo_model.card --measure runs/demo-1
	$(BIN)/python -m workbench.experiments.demo_model.card

demo-run-%: $(INSTALLED)
	$(BIN)/python -m workbench.experiments.demo_model.train --seed $* --out runs/demo-$*
	$(BIN)/python -m workbench.experiments.demo_model.sae runs/demo-$*

constraints: ## resolve constraints.txt anew, keeping its torch line
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	grep '^torch==' constraints.txt > build/constraints/torch.txt
	build/constraints/bin/pip install -c build/constraints/torch.txt -e ".[$(EXTRAS),distributed,docs]"
	{ sed '/^#/!d' constraints.txt; \
	  build/constraints/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[^ ]*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove what was built, not what was recorded
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
