PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
NATIVE := $(wildcard augment_cli/layers/native/*.cpp augment_cli/layers/native/*.h)

LOWEST := out/lowest
QUICK := tests/cli tests/reporting tests/training tests/planning tests/test_files.py tests/test_signals.py \
	tests/test_dataset.py tests/checkpoint/test_files.py tests/layers/aa/test_conv.py tests/layers/aw/test_conv.py

.PHONY: demo test test-fast coverage docs sanitize fuzz lowest lint format benchmark gpu sweep story clean

demo: $(INSTALLED)
	mkdir -p out
	$(VENV)/bin/augment convert resnet50 --recipe aa-resnet --set budget.params=keep \
		--output out/resnet50-aa.safetensors --overwrite
	$(VENV)/bin/augment check out/resnet50-aa.safetensors
	@echo
	@echo "out/resnet50-aa.safetensors is a ResNet-50 with attention and no more parameters. Its weights are random. Next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  augment report out/resnet50-aa.safetensors -o out/report.html"
	@echo "  augment models 'efficientnet*'            # which models can have attention, and how much"
	@echo "  augment plan efficientnetv2_s             # what would become of your model"
	@echo "  augment convert resnet50 --pretrained -o out/resnet50-aa    # with trained weights, for timm"
	@echo "docs/howto/ shows the rest, page by page; README.md lists the pages."

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto

# Under two minutes on four quiet cores. tests/conftest.py says what is slow.
test-fast: $(READY)
	$(VENV)/bin/python -m pytest -n auto -m "not slow"

coverage: $(READY)
	$(VENV)/bin/python -m pytest -n auto --cov --cov-report=term:skip-covered --cov-report=html:out/coverage

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict
	@echo "out/site/index.html is the documentation; '$(VENV)/bin/mkdocs serve' shows it while it is edited"

# The layers' tests on kernels that were built with sanitizers, in a copy of the tree: for each set of instructions that
# the processor has. Inductor's cache is not told which set was asked for, so each has its own.
SANITIZED := out/sanitize
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(READY)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r augment_cli tests recipes docs pyproject.toml $(SANITIZED)
	rm -f $(SANITIZED)/$(dir $(firstword $(NATIVE)))kernels-*
	CXXFLAGS="$(SANITIZERS)" $(VENV)/bin/python augment_cli/layers/native/compiling.py \
		$(SANITIZED)/$(dir $(firstword $(NATIVE)))
	cd $(SANITIZED); for instructions in $$(grep -qw avx512f /proc/cpuinfo && echo avx512) avx2; do \
		echo "sanitized kernels, $$instructions:"; \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		ATEN_CPU_CAPABILITY=$$instructions TORCHINDUCTOR_CACHE_DIR=$$PWD/inductor-$$instructions AUGMENT_NATIVE=1 \
			$(abspath $(VENV))/bin/python -m pytest -n auto tests/layers || exit 1; \
	done

fuzz: $(READY)
	$(VENV)/bin/python -m tests.fuzz

# Fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	grep -oE '"[a-z-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest -n auto $(QUICK)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(NATIVE)

benchmark: $(READY)
	$(VENV)/bin/python benchmarks/convert.py

# On a machine with an NVIDIA card: everything there is to check and to measure on one (docs/gpu.md).
#   GPU_PYTHON  a Python that has torch for CUDA, timm, pytest and the package's other requirements; nothing is installed
#   OUT         a folder for the results, in place of benchmarks/results
#   GPU         options: GPU="--parts models --budget 300"
gpu: $(if $(GPU_PYTHON),,$(READY))
	$(or $(GPU_PYTHON),$(VENV)/bin/python) benchmarks/gpu.py $(if $(OUT),--results $(OUT)) $(GPU)

sweep: $(READY)
	$(VENV)/bin/python docs/sweep.py

story: $(READY)
	$(VENV)/bin/python benchmarks/retrofit.py --tasks recall odd digits --rows source "AA, carried" "AA, fitted"
	$(VENV)/bin/python docs/story.py

# The environment is made when it is missing, broken or older than what it is made from: with what the program needs, and
# for development with what is needed besides.
$(INSTALLED): pyproject.toml hatch_build.py $(NATIVE)
	$(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(READY): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) out
