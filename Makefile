# Two commands do everything: `make train` and `make test`. Each works alone on a machine with python3, pip and make.
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/digits
BIN    := $(VENV)/bin

.PHONY: help install train test test-long bench lint clean

help:
	@echo "make train   train on the embedded digits into $(RUN) (again: resumes it); then see $(RUN)/report.html"
	@echo "make test    the tests;  make test-long: the long counts too"
	@echo "make bench   the benchmark rows of this machine;  make lint: ruff"

install: $(VENV)/.installed

# torch goes first, so that the project's build can see it (--no-build-isolation).
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

train: install
	@if [ -e $(RUN)/config.json ]; then $(BIN)/python -m dcgan.train --resume $(RUN); \
	else $(BIN)/python -m dcgan.train --fused --data digits --out $(RUN); fi

test: install lint
	$(BIN)/python -m pytest --benchmark-skip -m "not long"

test-long: install
	$(BIN)/python -m pytest --benchmark-skip

bench: install
	$(BIN)/python -m pytest --benchmark-only

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .benchmarks
