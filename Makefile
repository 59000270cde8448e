# make help         this list
# make quickstart   sample data, training, evaluation, features, in minutes
# make test         all tests, and the linter
# make test-2.6     the tests of scripts, weights, faults and several processes on paddlepaddle 2.6.2
# make soak         ends training runs in every way for half an hour (MINUTES=...), and checks that nothing is lost
# make fuzz         damaged inputs of every kind for ten minutes (MINUTES=... SEED=...), and what is promised of them
# make gpu-check    on a machine with a GPU: whether the scripts do there what they do on the CPU, and how fast; 15 minutes
# make gpu-kernels  asks the GPU build of 2.6.2 (800 MB to fetch, no GPU needed) for a kernel of all that training computes
# make bench        speed and memory against what people use instead (benchmarks/README.md); ROWS="reader losses": a part
# make clean        removes the environments that make has made; data/sample and output_quickstart stay
# PYTHON=python3.12 chooses the interpreter (3.9 to 3.13), REQUIREMENTS=... another set of packages.

PYTHON ?= python3
VENV ?= .venv
# With GPUs, the wheel of Paddle's own index that has code for the oldest and the newest of them, and that the driver can run
# (runtime/gpu.py).
CAPABILITIES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE "[0-9]+\.[0-9]+")
ifneq ($(CAPABILITIES),)
ifndef PADDLE_INDEX
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
PADDLE_INDEX := $(shell $(PYTHON) -c 'import sys; from runtime.gpu import paddle_index as i; print(i(sys.argv[2:], sys.argv[1]))' "$(DRIVER)" $(CAPABILITIES))
endif
endif
REQUIREMENTS ?= requirements.txt
OPTIONAL ?= requirements-optional.txt
RUN := $(VENV)/bin/python

.PHONY: help quickstart test test-2.6 soak fuzz gpu-check gpu-kernels bench clean

help:
	@sed -n '/^# \(make\|PYTHON\)/s/^# //p' Makefile

quickstart: $(VENV)/installed
	$(RUN) quickstart.py

# Three test processes, also on two cores: the tests wait for others that start, stop and die.
test: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 3 --dist worksteal

test-2.6:
	$(MAKE) VENV=.venv-2.6 REQUIREMENTS=requirements-2.6.txt OPTIONAL= PADDLE_INDEX= .venv-2.6/installed-dev
	.venv-2.6/bin/python -m pytest -n 3 --dist worksteal tests/test_scripts.py tests/test_bad_input.py tests/test_layouts.py \
		tests/test_formats.py tests/test_load.py tests/test_models.py tests/test_faults.py tests/test_continue.py \
		tests/test_losses.py tests/test_pair_losses.py tests/test_recipe.py tests/test_refine.py tests/test_parallel.py \
		tests/test_disks.py tests/test_pictures.py tests/test_home.py \
		tests/test_objective.py tests/test_optimizers.py tests/test_run.py tests/test_engine.py tests/test_export.py \
		tests/test_engine_distrust.py tests/test_gpu_branches.py tests/test_boxes.py tests/test_average.py \
		tests/test_effects.py

soak: $(VENV)/installed-dev
	$(RUN) tests/programs/soak.py --minutes=$(or $(MINUTES),30)

fuzz: $(VENV)/installed-dev
	$(RUN) tests/programs/fuzz.py --minutes=$(or $(MINUTES),10) --seed=$(or $(SEED),0)

gpu-check: $(VENV)/installed
	$(RUN) benchmarks/gpu_check.py

# Recorded with the CPU build of the same version, asked of the other.
gpu-kernels: .venv-gpu/installed
	$(MAKE) VENV=.venv-2.6 REQUIREMENTS=requirements-2.6.txt PADDLE_INDEX= .venv-2.6/installed-dev
	.venv-2.6/bin/python tests/programs/gpu_kernels.py .venv-gpu/bin/python

.venv-gpu/installed: requirements-gpu.txt
	@$(PYTHON) -m venv .venv-gpu
	@echo "installing paddlepaddle-gpu 2.6.2: about 800 MB to fetch and 3 GB on disk, some minutes"
	@.venv-gpu/bin/python -m pip install --quiet -r requirements-gpu.txt 2>/dev/null || \
		{ echo "error: pip finds no paddlepaddle-gpu 2.6.2 here (Linux or Windows, Python 3.8 to 3.12): no kernel was asked for" >&2; exit 2; }
	@touch $@

bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/run.py $(ROWS)

.venv-bench/installed: requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	@echo "installing requirements-bench.txt: 1 to 4 GB on disk, some minutes"
ifneq ($(PADDLE_INDEX),)
	.venv-bench/bin/python -m pip install --quiet paddlepaddle-gpu==3.3.1 -i $(PADDLE_INDEX)
	cat requirements.txt requirements-bench.txt | grep -v "paddlepaddle\|^-r" | .venv-bench/bin/python -m pip install --quiet -r /dev/stdin
else
	.venv-bench/bin/python -m pip install --quiet -r requirements-bench.txt
endif
	touch $@

$(VENV)/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	@[ -z "$(CAPABILITIES)" ] || [ -n "$(PADDLE_INDEX)" ] || echo "note: no wheel of Paddle's has code for all GPUs here" \
		"($(CAPABILITIES)): installing for the CPU; PADDLE_INDEX=... chooses another (docs/gpu.md)"
	@$(RUN) -c 'import paddle' 2>/dev/null || echo "installing $(REQUIREMENTS): about 200 MB, a few minutes"
ifneq ($(PADDLE_INDEX),)
	$(RUN) -c 'import paddle' 2>/dev/null || $(RUN) -m pip install --quiet paddlepaddle-gpu==3.3.1 -i $(PADDLE_INDEX)
	grep -v paddlepaddle $(REQUIREMENTS) | $(RUN) -m pip install --quiet -r /dev/stdin
else
	@# A paddlepaddle-gpu that somebody has put here stays.
	skip=$$($(RUN) -m pip show --quiet paddlepaddle-gpu 2>/dev/null && echo '^paddlepaddle' || echo '^$$'); \
		grep -v "$$skip" $(REQUIREMENTS) | $(RUN) -m pip install --quiet -r /dev/stdin
endif
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt $(OPTIONAL)
	$(RUN) -m pip install --quiet -r requirements-dev.txt $(OPTIONAL:%=-r %)
	touch $@

clean:
	for folder in .venv .venv-2.6 .venv-gpu .venv-bench; do [ ! -e $$folder/installed ] || rm -rf $$folder; done
