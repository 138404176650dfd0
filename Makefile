# make demo      environment, then a picture from the bundled checkpoint: demo.png
# make test      environment, then the test suite (CPU, no network)
# make quality   style, types and the direction of imports
# make results   what docs/results shows, again, into outputs/results: hours; a rerun goes on where it stopped.
#                One part fits in minutes: python examples/experiments/adaln_norm.py --list
# make docs      the pages as a site in outputs/docs; a warning is an error
# make dist      wheel and sdist in outputs/dist, checked
# make stress    100,000 damaged and hostile models, 20,000 images, 640 adapters, checkpoints and caches of latents, 200 loads under
#                saves, 1,200 kills and full disks, 1,000 loads and 10,000 samples: about 75 minutes, into outputs/results;
#                goes on where it stopped
# make gpu       everything that is to be measured on a GPU, in four commands of at most ten minutes, into outputs/gpu (OUT=):
#                gpu-tests, gpu-layers, gpu-steps, gpu-pictures; each goes on where it stopped. Without .venv: PYTHON must
#                have the packages, and PYTHONPATH may name a folder with more: make gpu PYTHON=.venv/bin/python
# make audit     known vulnerabilities of the locked versions, from the Python registry: needs a network, no part of CI
# make format    let ruff rewrite what `make quality` would refuse
#
# PYTHON=python3.12 picks the interpreter, TORCH=torch another torch than the tested one.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Comes with PyTorch's CUDA builds; beside the CPU build the tests run the GPU's kernel in its interpreter.
TRITON := "triton==3.6.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

OUT ?= outputs/gpu
BENCHMARK := examples/benchmarks/run.py
GPU := PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) PYTHONUNBUFFERED=1 timeout

.PHONY: demo test slow stress gpu gpu-tests gpu-layers gpu-steps gpu-pictures audit results quality docs dist format clean

demo: .venv/.ready
	$(BIN)/terdit generate emoji --labels ghost "clown face" "robot face" "face with cowboy hat" "face screaming in fear" \
	    "smiling cat face with heart-shaped eyes" "nerd face" "exploding head" imp --overwrite --output demo.png
	@echo 'Open demo.png. Then draw another face, see all names, or read docs/tutorial.md:'
	@echo '  $(BIN)/terdit generate emoji --labels "alien monster" --output face.png'
	@echo '  $(BIN)/terdit info emoji --labels'

# A process per core, at most four, each with one thread: the models of the tests are tiny. A file stays in one process.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

stress: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/files.py --inputs 100000 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/data_files.py --adapters 400 --checkpoints 40 --latents 200 \
		--images 20000 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/races.py --loads 200 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/kills.py --kills 200 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/reliability/load.py --cycles 1000 --images 10000 --output_dir outputs/results
	$(BIN)/python examples/reliability/page.py --output_dir outputs/results

# 124: out of time. What is measured by then is kept, and starting the command again measures the rest.
define within
$(GPU) $(1) $(PYTHON) $(BENCHMARK) $(2) --output_dir $(OUT) || test $$? -eq 124
endef

gpu: gpu-tests gpu-layers gpu-steps gpu-pictures

gpu-tests:
	$(call within,540,gpu-tests)

gpu-layers:
	$(call within,540,gpu-layers)

gpu-steps:
	$(call within,540,gpu-steps --dtypes bfloat16 --presets terdit-4.2b-256 terdit-600m-256 --turns 15)

gpu-pictures:
	$(call within,200,gpu-pictures)
	$(call within,170,gpu-cards --limits 2 --weights packed --placements resident 'group offload')
	$(call within,180,training --device cuda --dtype bfloat16 --preset terdit-4.2b-256 --layers 2 --batch_size 16 --repeats 5)

# In an environment of its own: what it needs is not in the lock. torch is pinned here, and not there. Strict: what could
# not be looked up is no pass.
audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip --disable-pip-version-check install --quiet pip-audit
	echo "$(TORCH)" | cat requirements.lock - > .venv/audit/requirements.txt
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .venv/audit/requirements.txt

# One thread, as the committed figures: the models are small, and a run is the same whatever else the machine does.
results: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) deployment --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) memory --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) training --batch_size 4 --repeats 5 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) kernels --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) step --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/few_steps.py --model digits --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/few_steps.py --model emoji --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/adaln_norm.py --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/worth_it.py --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/text_to_image.py --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) flux2 --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) pipeline --output_dir outputs/results
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK) numerics --output_dir outputs/results

quality: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs outputs/docs

dist: .venv/.dev
	rm -rf outputs/dist
	$(BIN)/python -m hatchling build -d outputs/dist
	$(BIN)/python -m twine check --strict outputs/dist/*

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Set PYTHON=")'
	@echo "Making the environment in .venv (torch, diffusers, ...); this takes a few minutes the first time."
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --constraint requirements.lock --editable '.[train,cpu]'
	@touch $@

.venv/.dev: .venv/.ready
	@echo "Adding what tests and checks need."
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	$(PIP) --constraint requirements.lock --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo.png outputs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
