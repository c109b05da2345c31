PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
NATIVE := $(wildcard augment_cli/layers/native/*.cpp augment_cli/layers/native/*.h)

.PHONY: demo test fuzz lint format benchmark sweep story clean

demo: $(READY)
	mkdir -p out
	$(VENV)/bin/augment convert resnet50 --recipe aa-resnet --set budget.params=keep \
		--output out/resnet50-aa.safetensors --overwrite
	$(VENV)/bin/augment check out/resnet50-aa.safetensors

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto

fuzz: $(READY)
	$(VENV)/bin/python -m tests.fuzz

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(NATIVE)

benchmark: $(READY)
	$(VENV)/bin/python benchmarks/convert.py

sweep: $(READY)
	$(VENV)/bin/python docs/sweep.py

story: $(READY)
	$(VENV)/bin/python docs/story.py

# The environment is made when it is missing, broken or older than what it is made from.
$(READY): pyproject.toml hatch_build.py $(NATIVE)
	$(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out
