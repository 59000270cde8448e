# make quickstart   sample data, training, evaluation, features, in minutes
# make test         all tests, and the linter
# make test-2.6     the tests of scripts, weights, faults and several processes on paddlepaddle 2.6.2
# make soak         ends training runs in every way for half an hour (MINUTES=...), and checks that nothing is lost
# make bench        speed and memory against what people use instead (benchmarks/README.md); ROWS="reader losses" or extraction: a part
# PYTHON=python3.12 chooses the interpreter (3.9 to 3.13), REQUIREMENTS=... another set of packages.

PYTHON ?= python3
VENV ?= .venv
# The package index has GPU wheels of paddlepaddle up to 2.6.2, for GPUs up to compute capability 8.x and Python up to
# 3.12. Newer GPUs: install a 3.x wheel from Paddle's install page into $(VENV) by hand; it is then left alone.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | tail -n 1 | \
	awk '$$1 > 0 && $$1 < 9 {print "yes"}')
OLD_ENOUGH := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info < (3, 13) else "")' 2>/dev/null)
REQUIREMENTS ?= $(if $(and $(GPU),$(OLD_ENOUGH)),requirements-gpu.txt,requirements.txt)
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-2.6 soak bench clean

quickstart: $(VENV)/installed
	$(RUN) quickstart.py

test: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2

test-2.6:
	$(MAKE) VENV=.venv-2.6 REQUIREMENTS=requirements-2.6.txt .venv-2.6/installed-dev
	.venv-2.6/bin/python -m pytest -n 2 tests/test_scripts.py tests/test_bad_input.py tests/test_pretrained.py \
		tests/test_faults.py tests/test_parallel.py tests/test_checkpoints.py tests/test_engine.py

soak: $(VENV)/installed-dev
	$(RUN) tests/soak.py --minutes=$(or $(MINUTES),30)

bench: .venv-bench/installed
	$(if $(filter extraction,$(ROWS)),,.venv-bench/bin/python benchmarks/run.py $(ROWS))
	$(if $(filter-out extraction,$(ROWS)),,.venv-bench/bin/python benchmarks/extraction.py)

.venv-bench/installed: requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	@echo "installing requirements-bench.txt: 1 to 4 GB on disk, some minutes"
	.venv-bench/bin/python -m pip install --quiet -r requirements-bench.txt
	touch $@

$(VENV)/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	@$(RUN) -c 'import paddle' 2>/dev/null || echo "installing $(REQUIREMENTS): about 200 MB, a few minutes"
	$(RUN) -c 'import paddle, cv2, PIL, safetensors' 2>/dev/null || $(RUN) -m pip install --quiet -r $(REQUIREMENTS)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-2.6 .venv-bench data/sample output_quickstart
