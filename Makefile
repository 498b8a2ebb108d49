# Two commands matter: `make quickstart` and `make test`. Both set up what they need, on a plain clone with Python 3.11+.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup quickstart test test-node test-outside test-fast lint docs manifests bench clean

help:
	@echo "make quickstart   set up, then tune a small model for real on this machine (minutes, CPU, no account)"
	@echo "make test         set up, then run the tests: all but those of the next line"
	@echo "make test-node    the way from building the images to an adapter, on a real Kubernetes node (Linux, root)"
	@echo "make test-outside wheels in fresh environments, with the newest and the lowest versions of what they need (minutes)"
	@echo "make test-fast    make test without what trains a model or takes long in another way"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make docs         write the generated pages of docs/reference again"
	@echo "make manifests    write again what the chart and 'kaito install' generate (needs helm)"
	@echo "make bench        measure what the documentation claims"

setup:
	@$(PYTHON) scripts/setup.py

quickstart: setup
	$(BIN)/kaito run --local --yes examples/quickstart.yaml

test: setup
	$(BIN)/pytest -m "not node and not outside"

test-outside: setup
	$(BIN)/pytest -m outside

test-node: setup
	$(BIN)/pytest -m node

test-fast: setup
	$(BIN)/pytest -m "not slow and not node and not outside"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python scripts/reference_docs.py

manifests: setup
	$(BIN)/python scripts/manifests.py

bench: setup
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/controller.py

clean:
	rm -rf .venv quickstart-output
