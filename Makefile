PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
NATIVE := $(wildcard augment_cli/layers/native/*.cpp augment_cli/layers/native/*.h)

LOWEST := out/lowest
QUICK := tests/cli tests/report tests/training tests/test_files.py tests/test_signals.py tests/test_dataset.py \
	tests/test_budget.py tests/test_checkpoint.py tests/test_recipe.py tests/layers/test_aa_conv.py tests/layers/test_aw_conv.py

.PHONY: demo test lowest lint format benchmark sweep story clean

demo: $(READY)
	mkdir -p out
	$(VENV)/bin/augment convert resnet50 --recipe aa-resnet --set budget.params=keep \
		--output out/resnet50-aa.safetensors --overwrite
	$(VENV)/bin/augment check out/resnet50-aa.safetensors

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto

# Fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	grep -oE '"[a-z-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest -n auto $(QUICK)

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
