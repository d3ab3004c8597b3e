# `make demo` and `make test` work in a fresh clone: they create the virtual environment, build the native code and run.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_REQUIRES := 'setuptools>=77' 'cmake>=3.26' 'ninja>=1.11' 'pybind11>=2.13'
NATIVE_SOURCES := $(shell find csrc python_bindings -type f) CMakeLists.txt setup.py
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE_SOURCES))

# A build for this machine: the GPUs that are here, else two architectures, so that the first run stays short.
GPU_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2/; s/^90$$/90a/; /^[0-9a]*$$/p' | sort -u | paste -sd ';')
LOCAL_ARCHS = $(or $(DYVTE_CUDA_ARCHS),$(GPU_ARCHS),80;90a)
DYVTE_CUDA ?= AUTO
NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
NATIVE_ENV := PATH="$(abspath $(VENV))/bin:$$PATH" DYVTE_CUDA='$(DYVTE_CUDA)' $(if $(NVCC),CUDACXX='$(NVCC)')

.PHONY: help demo docs serve serve-compat serve-faults serve-load serve-ray test build lint fuzz mutants format audit sanitize wheel wheel-test compat heads nano-results findings findings-smol smol bench bench-docs gpu-bench gpu-check gpu-prebuild gpu-rehearsal doctor clean distclean FORCE
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo 'Variables: PYTHON (python3, 3.10 or newer), VENV (.venv), TORCH ($(TORCH)), DYVTE_CUDA (AUTO, ON, OFF),'
	@echo 'DYVTE_CUDA_ARCHS (unset: the GPUs of this machine, else 80;90a; for `make wheel` every architecture that the'
	@echo 'CUDA toolkit can build for). nvcc is looked for in PATH, CUDA_HOME and /usr/local/cuda; without it the build is'
	@echo 'CPU-only.'

demo: build ## three pictures answered by the embedded model, with and without the exit; writes a PNG
	$(PY) -m dyvte_engine.commands.demo

POLICY ?= dynamic:auto,0.5
serve: build ## OpenAI's HTTP interface for nano on 127.0.0.1:8000 (docs/serving.md)
	$(VENV)/bin/dyvte-engine serve nano --allow-policy '$(POLICY)'

test: build ## the test suite (GPU tests run where there is a GPU)
	$(PY) -m pytest -q

build: $(VENV)/.built ## virtual environment, dependencies, native library; nothing else needs to be called first

doctor: build ## what was built and what works on this machine
	$(PY) -m dyvte_engine.commands.doctor

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d; 3.10 or newer is needed (make PYTHON=...)" \
	% sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==$(TORCH)
	$(PIP) install -q $(BUILD_REQUIRES)
	touch $@

build/configuration: FORCE
	@mkdir -p build && printf '%s\n' 'DYVTE_CUDA=$(DYVTE_CUDA)' 'archs=$(LOCAL_ARCHS)' 'nvcc=$(NVCC)' > $@.new
	@cmp -s $@ $@.new && rm $@.new || { rm -rf build/editable-*; mv $@.new $@; } # CMake remembers an nvcc not found

$(VENV)/.built: $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES) build/configuration
	$(NATIVE_ENV) DYVTE_CUDA_ARCHS='$(LOCAL_ARCHS)' $(PIP) install -q --no-build-isolation -e '.[dev]'
	touch $@

lint: build ## ruff, clang-format, mypy, which part may import which, the length of functions, spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) tools/function_length.py
	$(VENV)/bin/codespell

format: build ## rewrite Python and C++ sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

CALLS ?= 2000
SEED ?= 0
fuzz: build ## the engine called with random odd arguments; CALLS=20000 SEED=1 for a long run
	$(PY) -m tests.fuzz --calls $(CALLS) --seed $(SEED)

REQUESTS ?= 10000
serve-faults: build ## a server under REQUESTS requests (10000), every fifth broken; figures into docs/serving.md
	$(PY) -m tests.serve.faults --requests $(REQUESTS) --seed $(SEED) --record

serve-compat: build ## lm-eval, lmms-eval, LangChain and schemathesis against a server; figures into docs/serving.md
	$(PY) -m tools.serve_compat --record

serve-load: build ## guidellm on this server and on others (at most 12 minutes); figures into docs/serving.md
	$(PY) -m tools.serve_load

serve-ray: build ## Ray Serve with 2 and 4 replicas, killed under load; figures into docs/serving.md
	$(PIP) install -q 'ray[serve]>=2.60'
	$(PY) -m tests.serve.cluster --record

MUTANTS ?=
mutants: build ## mutation testing, hours for all: MUTANTS=dyvte_engine/heads for a part, MUTANTS='--sample 200' for some
	$(PY) tools/mutants.py $(MUTANTS)

$(VENV)/.docs: $(VENV)/.built
	$(NATIVE_ENV) DYVTE_CUDA_ARCHS='$(LOCAL_ARCHS)' $(PIP) install -q --no-build-isolation -e '.[docs]'
	touch $@

docs: $(VENV)/.docs ## the documentation as a site in build/site; the notebook is run for it
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q

audit: build ## what the native libraries ask of the system they are loaded on
	$(PY) tools/audit_symbols.py

sanitize: $(VENV)/.torch ## the kernels without torch, under the address and undefined-behaviour sanitisers
	$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DDYVTE_SANITIZE=ON
	$(VENV)/bin/cmake --build build/sanitize
	build/sanitize/kernels

wheel: build ## the source archive and, built from it, a wheel for this Python in dist/
	rm -rf build/egg && mkdir -p build/egg
	$(PY) setup.py -q egg_info --egg-base build/egg sdist -d dist
	$(NATIVE_ENV) $(PIP) wheel -q --no-deps --no-build-isolation -w dist "$$(ls -t dist/*.tar.gz | head -1)"
	$(PY) tools/tag_wheel.py
	ls -l dist

wheel-test: wheel ## the wheel in an empty environment, from another directory
	$(PY) tools/wheel_smoke.py --torch $(TORCH)

compat: build ## the built library on the oldest supported and the newest torch and transformers
	$(PY) tools/compat.py

BENCH := $(PY) -m benchmarks
bench: build ## benchmarks, quick set for a CPU (10 to 15 minutes); tables, JSON and plots in outputs/benchmarks
	$(BENCH).policies --name policies-nano --batch 1 8
	$(BENCH).policies --name policies-llava-200m --model llava-200m --batch 1 --new-tokens 1 3 16 --seconds 25
	$(BENCH).policies --name policies-llava-200m-bf16 --model llava-200m --dtype bfloat16 --batch 1 --new-tokens 1 3 16 --seconds 25
	$(BENCH).curves --n 30 --seconds 30
	$(BENCH).breakdown --seconds 5
	$(BENCH).decisions --seconds 4
	$(BENCH).growth --seconds 8
	$(BENCH).capacity --seconds 8
	$(BENCH).kernels --batch 1 --seconds 0.3

HEADS ?= outputs/heads
SMALL := --kind default --hidden 64 --rms-eps 1e-6
heads: build ## nano's exit heads, light, the paper's and three small ones: labels, training, the nine tasks (docs/training.md); in outputs/heads
	$(VENV)/bin/dyvte-engine label nano --data nano --samples 5000 --mode self --batch 32 --out $(HEADS)/labels
	$(VENV)/bin/dyvte-engine train-heads $(HEADS)/labels --kind light --out $(HEADS)/light.safetensors
	$(VENV)/bin/dyvte-engine train-heads $(HEADS)/labels --kind paper --out $(HEADS)/paper.safetensors
	$(VENV)/bin/dyvte-engine train-heads $(HEADS)/labels $(SMALL) --out $(HEADS)/label.safetensors
	$(VENV)/bin/dyvte-engine train-heads $(HEADS)/labels $(SMALL) --by-layer --out $(HEADS)/by-layer.safetensors
	$(VENV)/bin/dyvte-engine train-heads $(HEADS)/labels $(SMALL) --targets regret --out $(HEADS)/regret.safetensors
	$(VENV)/bin/dyvte-engine eval nano --limit 100 --answers $(HEADS)/answers.jsonl --out $(HEADS)/tasks.json \
		--policy keep-all --policy light=dynamic:$(HEADS)/light.safetensors --policy paper=dynamic:$(HEADS)/paper.safetensors

nano-results: build ## nano on the nine tasks under its own heads and those of `make heads`, and the accuracy/FLOPs curve; into docs/
	$(VENV)/bin/dyvte-engine eval nano --limit 200 --batch 32 --answers $(HEADS)/results.jsonl --page docs/nano-tasks.md --policy keep-all \
		--policy own=auto --policy light=dynamic:$(HEADS)/light.safetensors --policy paper=dynamic:$(HEADS)/paper.safetensors
	$(VENV)/bin/dyvte-engine sweep nano --limit 200 --batch 32 --answers $(HEADS)/results.jsonl \
		--heads own=dyvte_engine/assets/nano/exit_heads.safetensors --heads light=$(HEADS)/light.safetensors \
		--heads label=$(HEADS)/label.safetensors --heads by-layer=$(HEADS)/by-layer.safetensors \
		--heads regret=$(HEADS)/regret.safetensors \
		--out docs/nano-curve.json --plot docs/nano-curve.png --page docs/nano-curve.md

findings: build ## the paper's figures and tables for nano, after `make heads` (docs/findings.md); into docs/findings
	$(VENV)/bin/dyvte-engine analyze nano --batch 32 --out outputs/findings
	$(VENV)/bin/dyvte-engine ablate-heads $(HEADS)/labels --kind light --out $(HEADS)/ablation
	$(VENV)/bin/dyvte-engine reproduce nano --batch 32 --ablation $(HEADS)/ablation --out outputs/findings
	mkdir -p docs/findings && cp outputs/findings/*.md outputs/findings/*.png docs/findings/

NINE := pope,gqa,vqav2,textvqa,sqa,mmb,seed,mme,mmvet
# no examples: pictures of emoji sets, whose licences ask to be named, stay out of docs/
FINDINGS_SMOL ?= --limit 60 --batch 12 --dtype bfloat16
FINDINGS_SMOL_ATTENTION ?= 24
findings-smol: build ## the same for smol, on emoji scenes, less the token states; continues what was killed; into docs/findings/smol
	$(VENV)/bin/dyvte-engine analyze smol --source emoji --data $(NINE) $(FINDINGS_SMOL) --attention $(FINDINGS_SMOL_ATTENTION) --examples 0 --out outputs/findings-smol
	$(VENV)/bin/dyvte-engine reproduce smol --source emoji $(FINDINGS_SMOL) --out outputs/findings-smol
	mkdir -p docs/findings/smol && cp outputs/findings-smol/*.md outputs/findings-smol/*.png docs/findings/smol/

SMOL ?= --workers 2
SMOL_STEPS ?= 100 1500 500
SMOL_EVAL ?= --limit 300
smol: build ## trains smol, on CPU cores with bfloat16 units in hours, on a GPU in minutes (docs/smol.md); continues what was killed; in outputs/smol
	for stage in align lora tower; do \
		set -- $(SMOL_STEPS); case $$stage in lora) shift;; tower) shift 2;; esac; \
		$(PY) -m dyvte_engine.training.smol.train --stage $$stage --steps $$1 $(SMOL) --out outputs/smol || exit 1; \
	done
	$(PY) -m dyvte_engine.training.smol.train --stage report --checked 600 --out outputs/smol
	$(PY) -m dyvte_engine.training.smol.train --stage assemble --out outputs/smol
	$(VENV)/bin/dyvte-engine eval outputs/smol/model --source emoji --max-len 1024 --policy keep-all $(SMOL_EVAL)

bench-docs: $(VENV)/.built ## outputs/benchmarks among the records in benchmarks/results; from these docs/benchmarks.md, plots, the tables of README.md and docs/nano.md; the floors in docs/performance.md
	$(BENCH).document --results outputs/benchmarks
	$(BENCH).floors --page docs/performance.md

GPU = '$(PYTHON)' tools/gpu.py
GPU_RUN = $(GPU) run $(if $(OUT),--out '$(OUT)') $(if $(DRY),--dry)
gpu-bench: ## benchmarks at published sizes (random weights) on one GPU, with the python3 in PATH; PART="c d e", or others (tools/gpu.py), OUT=folder
	$(GPU_RUN) $(or $(PART),c d e)

gpu-check: ## GPU tests and compute-sanitizer with the python3 in PATH; no network, no virtual environment
	$(GPU_RUN) a b

GPU_ARCH ?= 90a
GPU_PYTHON ?=
gpu-prebuild: $(VENV)/.torch ## on a machine without a GPU: libraries for one with it, in build/gpu/native; GPU_ARCH, GPU_PYTHON (its version, with headers)
	$(NATIVE_ENV) $(PY) tools/gpu.py prebuild --arch '$(GPU_ARCH)' --module-python '$(GPU_PYTHON)'

gpu-rehearsal: build ## every part of gpu-check and gpu-bench on the CPU, with tiny models
	$(PY) tools/gpu.py run --dry a b c d e f g s

clean: ## remove everything built; distclean also removes the virtual environment
	rm -rf build dist .cache .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info dyvte_engine/*.so $(VENV)/.built $(VENV)/.docs

distclean: clean
	rm -rf $(VENV)
