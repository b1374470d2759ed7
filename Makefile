# Everything a person runs. `make demo` and `make test` set up what they need themselves.

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := python3 python3-dev python3-venv gcc libc6-dev linux-libc-dev strace spin git
SOURCES := setup.py pyproject.toml $(shell find coherence server guest -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

.PHONY: demo check test test-long test-hours bench compare modes dax docs lint build setup lab lab-all clean help

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: build ## Two virtual machines share a directory: who sees what, after how long, in each cache mode
	$(BIN)/python -m demo

check: lint ## Lint, types and unit tests: for every commit
	$(BIN)/pytest -n 2 --dist loadfile tests/unit

test: build lab-all lint docs ## Lint, types, documents, and all tests but the slow ones, real guests included
	$(BIN)/pytest -m 'not slow and not hours'

test-long: build lab-all ## The tests that take long: large trees, full user lands, User-Mode Linux
	$(BIN)/pytest -m slow --timeout 3600

test-hours: build lab-all ## 100,000 random changes in each way, hundreds of rounds of the litmus tests
	$(BIN)/pytest -m hours

bench: build ## What the version table costs, with pytest-benchmark
	$(BIN)/pytest bench --benchmark-columns min,median,mean,rounds --benchmark-disable-gc

compare: build lab-all ## Against Rust and C virtiofsd in real guests; writes docs/development/benchmarks.md
	$(BIN)/python -m bench.compare --write-docs

modes: build lab-all ## What cache=shared gains and costs in real guests; writes docs/development/benchmarks.md
	$(BIN)/python -m bench.modes --write-docs

dax: build lab-all ## What DAX gains and costs in real guests (QEMU 11.1); writes docs/development/benchmarks.md
	$(BIN)/python -m bench.dax --write-docs

docs: build $(VENV)/.docs ## The site in build/site, man pages in build/man, shell completion in build/completion
	$(BIN)/python docs/generate.py build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/.docs: pyproject.toml | $(VENV)/.installed
	@$(BIN)/pip install -qq --no-build-isolation --editable '.[docs]'
	@touch $@

lint: build ## ruff, mypy --strict and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell coherence server guest tests bench demo docs examples packaging *.md

build: $(VENV)/.built ## The compiled modules, and the commands in .venv/bin

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace --parallel 2
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.packages
	@echo 'setup: Python packages into $(VENV)'
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@$(BIN)/pip install -qq --upgrade pip 'setuptools>=77' 'Cython>=3.1'
	@$(BIN)/pip install -qq --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.packages:
	@echo 'setup: Debian packages $(PACKAGES)'
	@$(SUDO) apt-get update -qq
	@DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -qq --no-install-recommends $(PACKAGES) >/dev/null
	@mkdir -p $(VENV) && touch $@

setup: build lab-all ## Everything that the demo and the tests need, without running them

lab: build ## What QEMU guests need: QEMU, a kernel, busybox
	$(BIN)/python -m tests.lab.setup

lab-all: build ## Also User-Mode Linux, a full user land, and the virtiofsd programs to compare with
	$(BIN)/python -m tests.lab.setup --all

clean: ## Everything that was built; keeps .venv and .lab
	rm -rf build dist *.egg-info $(VENV)/.built
	find coherence server guest bench -name '*.so' -o -name '*.pyx' -printf '%p\n' | sed 's/\.pyx$$/.c/' | xargs rm -f
