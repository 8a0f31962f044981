# Everything runs in .venv at the root. `demo` installs what running needs (llama-cpp-python is compiled once, about
# five minutes on two cores; CMAKE_ARGS is passed on to it), `test` and `check` the development tools as well.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: install demo check quick test bench clean

install: .venv/dev tests/clients/node_modules

demo: .venv/run
	$(BIN)/stepgguf demo

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# For the loop of whoever works here: half of the tests in about a minute on two cores.
quick: .venv/dev
	$(BIN)/python -m pytest -q -m 'not slow' -n 2 --dist loadfile --ignore tests/clients --ignore tests/server/page

test: .venv/dev tests/clients/node_modules
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/dev
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.real_layer
	$(BIN)/python -m benchmarks.allocation
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.load

clean:
	rm -rf .venv tests/clients/node_modules .mypy_cache .pytest_cache .ruff_cache dist

.venv/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[run]'
	touch $@

.venv/dev: .venv/run
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json
	npm ci --prefix tests/clients --no-audit --no-fund --loglevel=error
	touch $@
