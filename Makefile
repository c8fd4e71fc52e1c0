# `make demo` and `make test` work on a fresh machine: they create .venv and install into it first, once.
PYTHON ?= python3
JOBS ?= 2
OUT ?= runs/demo

BIN := .venv/bin
EXTRAS := dev,notebook,export
INSTALLED := .venv/.installed
export OUT

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs demo-model constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(INSTALLED) ## every probe on the embedded model, ending in a report [OUT=runs/demo]
	$(BIN)/workbench demo --out "$$OUT"

test: lint ## lint, then every test [JOBS=2, PYTEST="-k store"]
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST)

lint: $(INSTALLED) ## what ruff has to say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## rewrite the code as ruff would have it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure speed and memory against the neighbours
	$(BIN)/python -m workbench.experiments.benchmarks

docs: $(INSTALLED) ## write the generated pages under docs/ anew
	$(BIN)/python -m workbench.experiments.architectures
	$(BIN)/python -m workbench.experiments.findings
	$(BIN)/python -m workbench.experiments.pictures

demo-model: $(INSTALLED) ## train the embedded model and SAE anew, two seeds side by side: about an hour on two cores
	$(MAKE) -j 2 demo-run-0 demo-run-1
	$(BIN)/python -m workbench.experiments.demo_model.card runs/demo-0 runs/demo-1
	$(BIN)/python -m workbench.experiments.demo_model.ship runs/demo-0

demo-run-%: $(INSTALLED)
	$(BIN)/python -m workbench.experiments.demo_model.train --seed $* --out runs/demo-$*
	$(BIN)/python -m workbench.experiments.demo_model.sae runs/demo-$*

constraints: ## resolve constraints.txt anew, keeping its torch line
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	grep '^torch==' constraints.txt > build/constraints/torch.txt
	build/constraints/bin/pip install -c build/constraints/torch.txt -e ".[$(EXTRAS),distributed]"
	{ sed '/^#/!d' constraints.txt; \
	  build/constraints/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[^ ]*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove what was built, not what was recorded
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
