# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# packages from `make wheelhouse`, for a machine without internet: make WHEELHOUSE=wheelhouse setup
FROM := $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
# two files of tests at a time, one thread each; threads that wait leave the core to others; the hundreds of processes
# that tests start find the kit compiled, whatever the shell says
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2

# whatever the machine's locale, and whatever a library makes of it, text is UTF-8
export PYTHONUTF8 := 1

help:  ## list these commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(FROM) -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check $(FROM) --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix --display-name kit >/dev/null
	@touch $(READY)

setup: $(READY)  ## make .venv from requirements.lock

demo: $(READY)  ## the whole path through every notebook on the sample cohort (15 minutes on two cores)
	$(BIN)/python -m kit.execute params/demo

test: $(READY)  ## all tests: unit, integration, every notebook (29 minutes on two cores)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy kit & types=$$!; $(TESTS) --nbval --durations=30; tests=$$?; wait $$types && exit $$tests

check: $(READY)  ## the quick loop (3 minutes)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(TESTS) tests -m "not slow and not real"

types: $(READY)  ## check the types of kit/
	$(BIN)/mypy kit

lab: $(READY)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: $(READY)  ## ratios against the peers, into outputs/bench/bench.json
	$(BIN)/python -m benchmarks.run

gpu: $(READY)  ## what a CUDA device does with the kit: its tests, then times, into outputs/bench/gpu.json
	$(BIN)/python -m benchmarks.gpu

wheelhouse:  ## all packages as files, to carry to a cluster without internet
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --dest wheelhouse -r requirements.lock 'setuptools>=77'

notebooks: $(READY)  ## renew the committed notebooks
	outputs=$$(mktemp -d) && trap 'rm -rf "$$outputs"' EXIT && KIT_OUTPUTS=$$outputs KIT_PROGRESS=off \
		$(BIN)/jupyter nbconvert --to notebook --inplace notebooks/*.ipynb \
		--execute --ExecutePreprocessor.timeout=1200 --ExecutePreprocessor.store_widget_state=False \
		--ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.preserve_cell_metadata_mask=tags \
		--ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec

clean:  ## remove .venv, outputs and caches
	rm -rf .venv outputs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache kit.egg-info build
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup demo test check types lab bench gpu wheelhouse notebooks clean
.DEFAULT_GOAL := help
