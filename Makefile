# make demo   train on simulated studies and show what was learnt: everything from a bare Python 3.10+
# make test   all tests, likewise
# make gpu    on a machine with an NVIDIA GPU and torch >= 2.11: build, GPU tests, sanitizer, benchmarks, into runs/gpu (OUT=...)
# make stress attention on random layouts against float64 for ten minutes (MINUTES=...), on the GPU if there is one
# make bench  benchmarks on this machine
# make lint   ruff, check and format
# make clean  remove the virtual environment and what was built

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/gpu
MINUTES ?= 10
BIN    := $(VENV)/bin
# Python compiles what is imported, and keeps it; compiling all that torch brings would take a third of the installation.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: help demo test bench gpu stress lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make \)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "hlip-kernels needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: installing again only when the sources of the build changed.
$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(COMPILE) --disable-pip-version-check --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-model,data,demo
	$(BIN)/hlip demo

test: $(VENV)/.installed-all
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

bench: $(VENV)/.installed-all
	rm -f $(VENV)/rows.csv
	$(BIN)/python -m pytest benchmarks --rows $(VENV)/rows.csv
	$(BIN)/python -m benchmarks.report $(VENV)/rows.csv

lint: $(VENV)/.installed-all
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# No virtual environment and no network here: the Python that already has torch is the one with the right CUDA.
gpu:
	$(PYTHON) tools/gpu_gate.py --out $(OUT)

stress:
	$(PYTHON) tools/stress.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build *.egg-info hlip_kernels/*.so hlip_kernels/_build_note.txt
