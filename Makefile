# demo, test, test-slow, test-all, lint, format, bench, wheel. All but `wheel` work in .venv, which is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test test-slow test-all lint format bench wheel venv-run venv-dev

demo: venv-run
	$(BIN)/diffupose lift diffupose/examples/keypoints.json --annotations diffupose/examples/images.json \
		--num-hypotheses 10 --out poses.npz --plot poses.png

test: venv-dev
	$(PYTEST) -m "not slow"

test-slow: venv-dev
	$(PYTEST) -m slow

test-all: venv-dev
	$(PYTEST)

lint: venv-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/cpp/*')
	$(BIN)/python -m mypy diffupose
	$(BIN)/lint-imports --no-cache --no-logo

format: venv-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/cpp/*')

bench: venv-dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

# .venv/.incomplete is there while an installation runs: one that was interrupted is thrown away and made again. A
# finished .venv is left alone, whoever made it; only one that `make demo` made is extended when `dev` is asked for.
venv-run:
	@if [ ! -d .venv ] || [ -e .venv/.incomplete ]; then \
		set -e; rm -rf .venv; mkdir .venv; touch .venv/.incomplete; \
		$(PYTHON) -m venv .venv; $(PIP_INSTALL) -e .; \
		touch .venv/.stamp-run; rm .venv/.incomplete; \
	fi

venv-dev:
	@if [ ! -d .venv ] || [ -e .venv/.incomplete ] || { [ -e .venv/.stamp-run ] && [ ! -e .venv/.stamp-dev ]; }; then \
		set -e; \
		if [ ! -e .venv/.stamp-run ] || [ -e .venv/.incomplete ]; then rm -rf .venv; mkdir .venv; fi; \
		touch .venv/.incomplete; \
		[ -e .venv/.stamp-run ] || $(PYTHON) -m venv .venv; \
		$(PIP_INSTALL) -e ".[dev]"; \
		touch .venv/.stamp-run .venv/.stamp-dev; rm .venv/.incomplete; \
	fi
