# make bench | test | lint | docs | sanitize | install | clean
# All but the last first install what they need into $(VENV). With `VENV=`, the active environment is used as it is, and
# only the package itself is installed into it, offline. For another torch: make test TORCH=torch==2.12.0 CONSTRAINTS=
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH       ?= torch
EXTRAS      ?= dev
PIP_ARGS    ?=
# several processes if pytest-xdist is installed; the tests of a file stay together
PYTEST_ARGS ?= $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '--numprocesses auto --maxprocesses 4 --dist loadfile')
BENCH_ARGS  ?=
ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach name,c++ g++ clang++,$(shell command -v $(name))) c++)
endif

BUILD_REQUIRES := setuptools wheel pybind11 cmake ninja
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard $(CONSTRAINTS)) $(shell find csrc -type f)

ifeq ($(strip $(VENV)),)
PY        := $(PYTHON)
INSTALLED := install-package
else
PY := $(VENV)/bin/python
# the name encodes every choice, so that another choice installs again
CHOICES   := $(CURDIR) $(PYTHON) $(CONSTRAINTS) $(TORCH) $(EXTRAS) $(PIP_ARGS) $(CXX) $(DITFAST_SKIP_CUDA) $(DITFAST_CUDA_ARCHS)
INSTALLED := $(VENV)/.ditfast-$(firstword $(shell echo '$(CHOICES)' | cksum))
endif
PIP := $(PY) -m pip --disable-pip-version-check
lint sanitize: export PATH := $(if $(VENV),$(abspath $(VENV))/bin:)$(PATH)

.PHONY: bench test lint docs sanitize install install-package compiler clean

bench: $(INSTALLED)
	$(PY) benchmarks/bench_block.py $(BENCH_ARGS)

test: $(INSTALLED)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc -name '*.[ch]*' | xargs clang-format --dry-run -Werror

# the site, in site/; needs only the extra docs, not the package
docs:
	@test -x $(PY) || command -v $(PY) >/dev/null || $(PYTHON) -m venv $(VENV)
	$(if $(VENV),$(PIP) install -q $(addprefix -c ,$(CONSTRAINTS)) $(PIP_ARGS) mkdocs mkdocs-material 'mkdocstrings[python]')
	$(PY) -m mkdocs build --strict

# every CPU kernel in every instruction set of this CPU
sanitize: $(INSTALLED)
	@for kinds in address,undefined thread; do \
	    build=build/$${kinds%%,*}; \
	    cmake -S tests/every_kernel -B $$build -G Ninja -DDITFAST_SANITIZE=$$kinds && cmake --build $$build && \
	    ctest --test-dir $$build --output-on-failure || exit; \
	done

install: $(INSTALLED)

install-package: compiler
	$(PIP) install -q -e . --no-deps --no-build-isolation
	@$(PY) -m ditfast.doctor

$(VENV)/.ditfast-%: $(SOURCES) | compiler
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "ditfast: $(PYTHON) cannot make a virtual environment: install its venv module (python3-venv on Debian and Ubuntu), or use VENV="; exit 1; }
	@rm -f $(VENV)/.ditfast-*
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(addprefix -c ,$(CONSTRAINTS)) $(PIP_ARGS) $(BUILD_REQUIRES) $(TORCH)
	$(PIP) install $(addprefix -c ,$(CONSTRAINTS)) $(PIP_ARGS) --no-build-isolation -e ".[$(EXTRAS)]"
	@$(PY) -m ditfast.doctor
	@touch $@

compiler:
	@command -v $(firstword $(CXX)) >/dev/null || { echo "ditfast: no C++ compiler ($(CXX)): install one, or set CXX to yours"; exit 1; }

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks ditfast/_C.* $(addsuffix /.ditfast-*,$(VENV))
	find ditfast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
