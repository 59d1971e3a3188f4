# Everything runs inside .venv, which the first target to need it makes:
# Python, git and make are all that must be there. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Where it is set, as in many container images, every process compiles torch, Ray and MLflow anew:
# seconds each, and the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow chaos lint docs audit bench lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv: the locked packages, then Arrowhead itself, editable

# The lock holds a hash for every package; uv refuses one that differs.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $(READY)

demo: $(READY)  ## the main job on images made here: fit, score, the next commands
	$(BIN)/arrowhead demo

# Two at a time, a file staying with one of them: its tests share folders, some in their order. The
# files come in the order that tests/conftest.py gives them. Not in addopts: a single file is quicker
# without workers.
test: $(READY)  ## what one waits for: every promise that one machine keeps (needs no GPU)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## clusters, several hosts, spot machines, kills, services, installations
	$(BIN)/python -m pytest -m 'slow and not chaos' -n 2 --dist loadfile --no-loadscope-reorder

chaos: $(READY)  ## kills and flipped bits at moments and places drawn at random (an hour)
	$(BIN)/python -m pytest -m chaos -s tests/test_kills.py tests/test_study.py tests/test_flips.py

lint: $(READY)  ## ruff and mypy, as in pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A link that leads nowhere fails the build. Only the reference is written anew: its pages are not in git.
docs: $(READY)  ## the documentation site, in build/site (open index.html)
	$(BIN)/python docs/make_reference.py
	NO_COLOR=1 $(BIN)/zensical build --strict --clean

# In an environment of its own, as below. It says 3 where it could ask nobody.
audit:  ## known vulnerabilities of what the locks hold
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit==2.10.1"
	rm -f .venv-audit/found.json
	-.venv-audit/bin/pip-audit --disable-pip --require-hashes --progress-spinner off --format json \
		--output .venv-audit/found.json -r requirements.lock -r deploy/mlflow.lock >/dev/null 2>&1
	.venv-audit/bin/python .ci/audit.py .venv-audit/found.json

bench: $(READY)  ## extraction against the plain torchvision loop, in one run
	$(BIN)/python bench/extract.py

COMPILE := .venv-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --quiet

# In an environment of its own: the lock must not depend on what happens to be installed.
lock:  ## compile requirements.lock, and from it what images hold (hashes, no index addresses)
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "uv==0.13.9"
	$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock
	$(COMPILE) --constraint requirements.lock pyproject.toml --output-file deploy/arrowhead.lock \
		--extra s3 --extra gcs --extra onnx --extra serve
	$(COMPILE) --constraint requirements.lock deploy/mlflow.in --output-file deploy/mlflow.lock
	$(COMPILE) --constraint requirements.lock deploy/build.in --output-file deploy/build.lock
	rm -rf .venv-lock

clean:  ## remove what the targets made (the environment too)
	rm -rf .venv .venv-audit demo out build dist .cache docs/reference/cli.md docs/reference/python.md .pytest_cache .mypy_cache .ruff_cache .hypothesis
