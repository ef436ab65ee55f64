# `make demo` and `make test` do all their set-up: a virtual environment of their own in .venv.
# Where python3 already has torch (a GPU machine), that torch is used; elsewhere the pinned CPU set-up is installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test matrix check format types lint linters clean

demo: $(READY)
	$(BIN)/python examples/llama_fp8.py

# On as many cores as there are, if pytest-xdist is installed.
test: $(READY)
	$(BIN)/python -m pytest $$($(BIN)/python -c 'import xdist; print("-n auto")' 2>/dev/null)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/lowering

# The tests with every torch that is supported, each in an environment of its own (6 GB, under build/), and a table of
# their outcome. ARGS: see `python tests/matrix.py --help`.
matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

check: lint types

# A machine's own torch comes without what developers need beside the tests.
linters: $(READY)
	test -x $(BIN)/ruff -a -x $(BIN)/mypy || $(BIN)/python -m pip install -q -c constraints.txt ruff mypy

lint: linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The type checker does not run setuptools' import hooks: show it the package as it is installed.
types: linters
	rm -rf build/types && mkdir -p build/types/fusion_pass
	ln -s $(CURDIR)/fusion_pass/* $(CURDIR)/patterns $(CURDIR)/kernels build/types/fusion_pass/
	MYPYPATH=build/types $(BIN)/mypy -p fusion_pass

$(READY): pyproject.toml constraints.txt Makefile
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	if $(PYTHON) -c 'import torch, triton' 2>/dev/null; then \
	    $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	        > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" && \
	    { $(BIN)/python -m pip install -q -e '.[test,models]' || \
	      $(BIN)/python -m pip install -q --no-build-isolation -e '.[test,models]'; }; \
	else \
	    $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) build
