# Start with `make demo` or `make test`: each creates the environment if it is missing.
# VENV sets another environment folder, PYTHON the interpreter for it.
# JOBS sets the number of test processes, each with one thread; default: one per core, at most 8. All tests of a file
# run in one process, which creates their fixtures once; slow tests are distributed one by one.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= logical
PYTEST = $(VENV)/bin/python -m pytest
PARALLEL = -n $(JOBS) --maxprocesses 8
TIMM_TESTS_MODELS ?= glit_tiny,glit_small,glit_base,autoformer_tiny,vitas_c

# The lowest versions that pyproject.toml allows.
LOWEST = torch==2.11.0 torchvision==0.26.0 timm==1.0.31 huggingface_hub==1.0.0 safetensors==0.5.0 numpy==1.26.4 \
         pillow==12.3.0 pyyaml==6.0.1 rich==14.3.0 accelerate==1.5.0 matplotlib==3.11.0 scipy==1.12.0 \
         onnx==1.21.0 onnxscript==0.7.0 onnxruntime==1.25.1 fastapi==0.115.0 uvicorn==0.32.0 openvino==2024.6.0 \
         pyarrow==17.0.0

FUZZ ?= --seed 0 --cases 2000

.PHONY: wheel help demo search-demo test test-slow test-extended fuzz audit test-lowest lint format types timm-tests transformers-test test-triton bench gpu gpu-rehearsal docs release-check clean

help:
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.core  ## classify the example images with the shipped weights
	$(VENV)/bin/glit demo

search-demo: $(VENV)/.dev  ## run a whole search in about two minutes, and write its report
	$(VENV)/bin/glit search smoke --out runs/search_smoke
	$(VENV)/bin/glit search report runs/search_smoke

test: $(VENV)/.dev  ## run the test suite, without slow tests
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) --dist loadfile

test-slow: $(VENV)/.dev  ## run the slow tests: whole searches, kills at random moments, large models, compilers
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) --dist worksteal -m slow

test-extended: $(VENV)/.dev  ## run more slow tests: the remaining combinations of cases
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) --dist worksteal -m extended

fuzz: $(VENV)/.dev  ## damage all kinds of input at random from a seed: FUZZ="--seed 1 --cases 500"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz $(FUZZ)

audit: $(VENV)/.dev  ## check the installed packages for known vulnerabilities; needs a network
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --skip-editable --path "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

test-lowest: .venv-lowest/.lowest  ## run the test suite with the lowest versions of the core dependencies
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(PARALLEL) --dist loadfile
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(PARALLEL) --dist worksteal -m slow

lint: $(VENV)/.dev  ## check style, spelling, wording and imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell *.md Makefile hubconf.py docs glit_models search export runtime tests benchmarks .github
	$(VENV)/bin/proselint check *.md docs/*.md docs/tutorials/*.md
	$(PYTEST) -q tests/test_layers.py tests/test_phrases.py

format: $(VENV)/.dev  ## fix the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# search/ and export/ are next to glit_models/ but imported from within it: type checkers need to see that.
types: $(VENV)/.dev  ## check types
	rm -rf .types && mkdir -p .types/glit_models
	for path in glit_models/*; do ln -s ../../$$path .types/glit_models/; done
	ln -s ../../search ../../export .types/glit_models/
	cd .types && $(abspath $(VENV))/bin/mypy --cache-dir ../.mypy_cache --config-file ../pyproject.toml -p glit_models

timm-tests: $(VENV)/.dev  ## run timm's model tests on TIMM_TESTS_MODELS
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/timm_suite.py --models $(TIMM_TESTS_MODELS) -- $(PARALLEL)

transformers-test: .venv-transformers/.transformers  ## test transformers' timm wrapper, in a separate environment
	HF_HUB_OFFLINE=1 .venv-transformers/bin/python -m pytest tests/transformers_test.py

test-triton: $(VENV)/.dev .venv-triton/.triton  ## test exported repositories in a Triton server, in a separate environment
	TRITON_ENV=.venv-triton $(PYTEST) tests/test_triton_server.py

bench: $(VENV)/.dev  ## run the benchmarks: import time, throughput, depthwise convolution, fractals, training, search, export
	$(VENV)/bin/python -m benchmarks.imports
	$(VENV)/bin/python -m benchmarks.performance
	$(VENV)/bin/python -m benchmarks.depthwise
	$(VENV)/bin/python -m benchmarks.fractals
	$(VENV)/bin/python -m benchmarks.training
	$(VENV)/bin/python -m benchmarks.memory
	$(VENV)/bin/python -m benchmarks.loading
	$(VENV)/bin/python -m benchmarks.evolution
	$(VENV)/bin/python -m benchmarks.search
	$(VENV)/bin/python -m benchmarks.export --threads 1 --clock cpu

gpu: $(VENV)/.dev  ## run all measurements that need a GPU, in nine minutes (docs/gpu.md)
	$(VENV)/bin/python -m benchmarks.gpu --out runs/gpu-results

gpu-rehearsal: $(VENV)/.dev  ## rehearse `make gpu` in miniature, on a CPU
	$(VENV)/bin/python -m benchmarks.gpu --rehearse

docs: $(VENV)/.dev  ## build the site in build/site/index.html; a dead link or a bad docstring is an error
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(VENV)/bin/mkdocs build --quiet --strict

wheel: $(VENV)/.core  ## build wheels of glit-models and glit-runtime in dist/: pip install "dist/glit_models-VERSION-py3-none-any.whl[train]"
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./runtime
	ls dist/*.whl

release-check: $(VENV)/.core  ## build and check the files of a release, and test them in a new environment outside the checkout
	rm -rf dist build/lib build/release
	$(VENV)/bin/python -m pip install --quiet -e ".[release]"
	$(VENV)/bin/python -m build --quiet --outdir dist
	$(VENV)/bin/python -m build --quiet --wheel --outdir dist runtime
	$(VENV)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/python -m pip install --quiet "$$(ls dist/glit_models-*.whl)[train,search,export,serve]" \
		pytest pytest-timeout
	$(PYTHON) -m venv build/release/runtime
	build/release/runtime/bin/python -m pip install --quiet dist/glit_runtime-*.whl
	cd "$$(mktemp -d)" && glit=$(CURDIR)/build/release/venv/bin/glit && $$glit --version && $$glit demo && \
		$$glit export glit_tiny.fashion_mnist --out model.onnx && $$glit predict --onnx model.onnx glit-demo.png && \
		$(CURDIR)/build/release/runtime/bin/python -c \
			"from glit_runtime import OnnxClassifier; print(OnnxClassifier('model.onnx')('glit-demo.png'))" && \
		$(CURDIR)/build/release/venv/bin/python -m pytest -q -p no:cacheprovider -k readme -m "slow or not slow" \
			$(CURDIR)/tests/test_documents.py  # the blocks of the README

clean:  ## remove all build results except the environments
	rm -rf .types .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e ".[all]"
	touch $@ $(VENV)/.core

.venv-lowest/.lowest: pyproject.toml
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -e ".[all]" $(LOWEST)
	touch $@

.venv-transformers/.transformers: pyproject.toml
	test -x .venv-transformers/bin/python || $(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/python -m pip install --quiet -e ".[dev]" transformers
	touch $@

# The server's backend for Python, of release 24.10, reads no arrays of NumPy 2. ONNX Runtime 1.24 and later need it.
.venv-triton/.triton:
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet nvidia-pytriton==0.7.0 "numpy<2" "onnxruntime<1.24"
	touch $@
