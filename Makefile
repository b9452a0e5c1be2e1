# `make demo` and `make test` do all the set-up on a machine with Python and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
VENV4 ?= .venv-transformers4
VENVF ?= .venv-fairseq
# Threads of OpenMP; two keep a small machine from fighting with itself.
export OMP_NUM_THREADS ?= 2
# Build CUDA kernels for the GPUs in this machine only; without a GPU, the CPU part alone.
export EET_CUDA_ARCHS ?= native
PYTEST_ARGS ?=
PY = $(VENV)/bin/python
PY4 = $(VENV4)/bin/python
PYF = $(VENVF)/bin/python
SOURCES = $(shell find csrc eet_patch -type f -not -name '*.pyc' -not -name '*.so') setup.py pyproject.toml

.PHONY: docs demo test test-transformers5 test-transformers4 test-fairseq lint format types cuda-check tables clean

# The main job on real models: a BERT (MiniLM) and a small GPT-2, patched and unpatched.
demo: $(VENV)/installed
	$(PY) examples/bert_transformers_example.py
	$(PY) examples/gpt2_transformers_example.py

# All tests, against the newest and the oldest line of transformers that we support, and fairseq.
test: test-transformers5 test-transformers4 test-fairseq

test-transformers5: $(VENV)/installed
	cd integration_tests && ../$(PY) -m pytest -q $(PYTEST_ARGS)

test-transformers4: $(VENV4)/installed
	cd integration_tests && ../$(PY4) -m pytest -q patching transformers generation models $(PYTEST_ARGS)

# Trains four small models first, two minutes on two cores, and keeps them in ~/.cache/eet_patch.
test-fairseq: $(VENVF)/installed
	cd integration_tests && ../$(PYF) -m pytest -q fairseq $(PYTEST_ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip

$(VENV)/installed: $(VENV)/bin/python requirements-dev.txt $(SOURCES)
	$(PY) -m pip install -q -r requirements-dev.txt
	$(PY) -m pip install -q ".[transformers,serve,serve-ray,docs,dev]"
	touch $@

# The second environment sees the first one's packages (torch among them) behind its own.
$(VENV4)/installed: $(VENV)/installed requirements-transformers4.txt
	$(PYTHON) -m venv $(VENV4)
	$(PY) -c "import site; print(site.getsitepackages()[0])" \
	  > "$$($(PY4) -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(PY4) -m pip install -q -r requirements-transformers4.txt
	touch $@

# fairseq goes in without its dependencies: they would bring a torchaudio that breaks transformers.
$(VENVF)/installed: $(VENV)/installed requirements-fairseq.txt
	$(PYTHON) -m venv $(VENVF)
	$(PY) -c "import site; print(site.getsitepackages()[0])" \
	  > "$$($(PYF) -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(PYF) -m pip install -q -r requirements-fairseq.txt
	$(PYF) -m pip install -q --no-deps ve-fairseq==0.12.3
	touch $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/hadolint Dockerfile packaging/*.Dockerfile
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix -q .
	$(VENV)/bin/ruff format -q .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

types: $(VENV)/installed
	$(VENV)/bin/mypy eet_patch

# The pages of docs/ into build/site; a broken link or reference fails.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# Compiles the CUDA part too, for sm_80 and sm_90a, and fails on a warning. Needs nvcc, no GPU.
cuda-check: $(VENV)/installed
	EET_CUDA=1 EET_CUDA_ARCHS="80;90a" EET_WERROR=1 \
	  $(PY) setup.py -q build_ext --build-temp build/cuda-check --build-lib build/cuda-check/lib

# The README's tables and charts, from benchmarks/results.
tables: $(VENV)/installed
	$(PY) benchmarks/make_chart.py
	$(PY) benchmarks/make_table.py

clean:
	rm -rf build $(VENV) $(VENV4) $(VENVF) eet_patch/*.so *.egg-info
