# Every target sets up what it needs: a virtual environment with the tested versions, and the native extension.
#   PYTHON=python3.12   the interpreter the environment is made with
#   CONSTRAINTS=        the newest versions instead of the tested ones
#   SYSTEM=1            PYTHON as it is, with what it has installed; nothing is downloaded, linters are left out
#   ARGS="-k rollback"  handed to pytest; by `make bench` to `curvkern bench`
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
OUT ?= out

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test bench results gpu-check has-gpu wheel lint format build clean

ifdef SYSTEM
PY := $(PYTHON)
READY :=
ISOLATION := --no-build-isolation
JOBS := $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && printf -- '-n 2')
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
JOBS := -n 2
endif
CPP = $(wildcard csrc/*.* csrc/*/*.*)

demo: build
	$(PY) -m curvkern demo

test: $(if $(SYSTEM),,lint) build
	$(PY) -m pytest $(JOBS) $(ARGS)

bench: build
	$(PY) -m curvkern bench $(ARGS)

# FROM=DIR/campaign.jsonl, of `curvkern demo --seeds 5 --poison 0.02,0.05,0.1 --out DIR`: docs/results.md, docs/methods.
results: build
	$(PY) benchmarks/write_results.py $(FROM)

# Builds for the GPU of this machine only. Under nine minutes: every part has its share. Logs, CSV and page go to OUT, the
# short table comes last.
gpu-check: export CURVKERN_CUDA := 1
gpu-check: export CURVKERN_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | paste -sd ';')
gpu-check: has-gpu build
	mkdir -p $(OUT)
	$(PY) -m curvkern env | tee $(OUT)/env.txt
	status=0
	timeout 180 $(PY) -m pytest -m gpu -ra --continue-on-collection-errors --junitxml=$(OUT)/gpu.xml $(ARGS) 2>&1 | tee $(OUT)/gpu.log || status=$$?
	sanitizer=$$(type -P compute-sanitizer /usr/local/cuda/bin/compute-sanitizer | head -n 1) || true
	if [ -n "$$sanitizer" ]; then
	    timeout 60 $$sanitizer --error-exitcode 9 $(PY) -m pytest tests/ops -x -k "every_case and cuda" 2>&1 | tee $(OUT)/sanitizer.log || status=$$(($$? == 124 ? status : $$?))
	else
	    echo "gpu-check: no compute-sanitizer here" | tee $(OUT)/sanitizer.log
	fi
	[ ! -f $(OUT)/gpu.xml ] || $(PY) tests/summary.py $(OUT)/gpu.xml | tee $(OUT)/gpu.md
	timeout 170 $(PY) -m curvkern bench --seconds 0.1 --limit 120 --csv $(OUT) --html $(OUT)/bench.html 2>&1 | tee $(OUT)/bench.txt || status=$$?
	exit $$status

has-gpu:
	@nvidia-smi -L || { echo "gpu-check: nvidia-smi shows no GPU here" >&2; exit 1; }

wheel: $(READY)
	rm -rf build/lib.*
	$(PY) -m pip wheel --no-deps $(ISOLATION) -w dist .
	ls -l dist/*.whl

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Incremental: a second where nothing changed.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build dist $(VENV) curvkern/_C.*.so *.egg-info

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(CONSTRAINTS:%=-c %) setuptools pybind11 ninja
	$(PY) -m pip install -q $(CONSTRAINTS:%=-c %) --no-build-isolation -e ".[dev]"
	touch $@
