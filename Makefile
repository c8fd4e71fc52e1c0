# `make demo` and `make test` work on a fresh machine: they create .venv and install into it first, once.
PYTHON ?= python3
JOBS ?= 2
SITES ?= resid_post
OUT ?= runs/demo.acts
RESULT ?= results/demo

BIN := .venv/bin
EXTRAS := dev,notebook,export
INSTALLED := .venv/.installed
export MODEL TEXT SITES OUT RESULT

.DEFAULT_GOAL := help
.PHONY: help demo demo-request test lint format bench docs constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo-request:
	@$(if $(and $(MODEL),$(TEXT)),:,$(error make demo needs a model and a text: make demo MODEL=openai-community/gpt2 TEXT=story.txt))

demo: demo-request $(INSTALLED) ## record MODEL on TEXT and draw its logit lens [SITES= OUT= RESULT=]
	set -f; $(BIN)/workbench record "$$MODEL" "$$TEXT" --sites $$SITES --out "$$OUT"
	$(BIN)/workbench probe logit-lens "$$OUT" --out "$$RESULT"

test: lint ## lint, then every test [JOBS=2, PYTEST="-k store"]
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST)

lint: $(INSTALLED) ## what ruff has to say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## rewrite the code as ruff would have it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure speed and memory against the neighbours
	$(BIN)/python -m experiments.benchmarks

docs: $(INSTALLED) ## write the generated pages under docs/ anew
	$(BIN)/python -m experiments.architectures

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
