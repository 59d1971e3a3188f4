# All targets use .venv, which is created when it is first needed. Only Python, git and make must be
# installed. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# With this variable, which many container images set, every process compiles torch, Ray and MLflow
# again. That takes seconds, and the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bodies chaos lint docs audit bench lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## create .venv with the locked packages and Arrowhead, editable

# The lock has a hash for every package; uv refuses a package with another hash. Bytecode is compiled here:
# where PYTHONDONTWRITEBYTECODE is set, every command would compile torch and MLflow again (twice the CPU time).
$(READY): requirements.lock pyproject.toml
	@echo "installing $$(grep -c '^[a-z0-9].*==' requirements.lock) packages into .venv (7 GB):" \
		"some minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $(READY)

demo: $(READY)  ## draw images, train on them, score a folder, show the next commands
	$(BIN)/arrowhead demo

# Two processes. All tests of a file run in one process and in their order, because they share folders.
# tests/conftest.py sets the order of the files. This is not in addopts, because a single file is
# faster without worker processes.
test: $(READY)  ## run the tests that need one machine and no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## test clusters, several hosts, spot machines, kills, services, installations
	$(BIN)/python -m pytest -m 'slow and not chaos and not bodies' -n 2 --dist loadfile --no-loadscope-reorder

bodies: $(READY)  ## check that every backbone of torchvision and 100 of timm keep the contract
	$(BIN)/python -m pytest -m slow -n 2 tests/test_many_backbones.py

chaos: $(READY)  ## test kills and flipped bits at random moments and places (an hour)
	$(BIN)/python -m pytest -m chaos -s tests/test_kills.py tests/test_study.py tests/test_flips.py

lint: $(READY)  ## run ruff and mypy, as in pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A broken link fails the build. The generated reference pages are not in git.
docs: $(READY)  ## build the documentation site in build/site (open index.html)
	$(BIN)/python docs/make_reference.py
	NO_COLOR=1 $(BIN)/zensical build --strict --clean

# In a separate environment, as for `lock`. The exit code is 3 if no advisory database could be reached.
audit:  ## look up known vulnerabilities of the locked packages
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet "pip-audit==2.10.1"
	rm -f .venv-audit/report.json
	-.venv-audit/bin/pip-audit --disable-pip --require-hashes --progress-spinner off --format json \
		--output .venv-audit/report.json -r requirements.lock -r deploy/mlflow.lock >/dev/null 2>&1
	.venv-audit/bin/python .ci/audit.py .venv-audit/report.json

bench: $(READY)  ## compare extraction with a plain torchvision loop, in one run
	$(BIN)/python bench/extract.py

COMPILE := .venv-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --quiet

# In a separate environment, because the lock must not depend on installed packages.
lock:  ## compile requirements.lock and the locks of the images (hashes, no index addresses)
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "uv==0.13.9"
	$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock
	$(COMPILE) --constraint requirements.lock pyproject.toml --output-file deploy/arrowhead.lock \
		--extra s3 --extra gcs --extra onnx --extra serve
	$(COMPILE) --constraint requirements.lock deploy/mlflow.in --output-file deploy/mlflow.lock
	$(COMPILE) --constraint requirements.lock deploy/build.in --output-file deploy/build.lock
	rm -rf .venv-lock

clean:  ## remove everything that the targets made, including the environment
	rm -rf .venv .venv-audit demo out build dist .cache docs/reference/cli.md docs/reference/python.md .pytest_cache .mypy_cache .ruff_cache .hypothesis
