# Everything runs in .venv at the root. `demo` and `test` install the package, and `stepgguf setup` then compiles
# llama.cpp, once: five minutes on two cores. GPU=cuda, metal, vulkan, hip or none says for what, by default for what this
# machine has. `test` and `check` install the development tools as well.
GPU ?= auto
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

SETUP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/stepgguf setup --gpu $(GPU)

.PHONY: install demo check quick test bench clean

install: .venv/dev tests/clients/node_modules

demo: .venv/package
	@echo "2/3 compiling what runs models, if it is not compiled for this GPU yet"
	@$(SETUP)
	@echo "3/3 converting the embedded model, and asking it a question"
	@$(BIN)/stepgguf demo

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# For the loop of whoever works here: half of the tests in a minute and a half on two cores.
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

.venv/package: pyproject.toml constraints.txt
	@echo "1/3 making .venv and installing stepgguf into it (half a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/package
	$(SETUP)
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json
	npm ci --prefix tests/clients --no-audit --no-fund --loglevel=error
	touch $@
