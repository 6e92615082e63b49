# What each target needs is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
STILLHOUSE := $(BIN)/stillhouse

.PHONY: quickstart test test-slow models bench bench-methods clean

quickstart: .venv/quickstart.stamp
	$(STILLHOUSE) run quickstart --folder runs/quickstart

test: .venv/test.stamp
	$(BIN)/python -m pytest

test-slow: .venv/test.stamp
	$(BIN)/python -m pytest -m slow $(if $(ONLY),-k $(ONLY))

models: .venv/test.stamp
	$(BIN)/python tools/make_models.py

# What it costs, beside the peers; their environments are made on first use. ROWS="E1 E4" for some.
bench: models
	$(BIN)/python benchmarks/run.py $(ROWS)

# What the methods reach: hours, not minutes. ONLY="kd dhkd" for some.
bench-methods: .venv/test.stamp
	for id in $(or $(ONLY),kd dhkd datadam imdn llmlingua2 mcmi lelp dho ncfm datm fedlgd \
		bpkd lpld unidistill ffg2m leaf comodo dackl sfd); do \
		$(STILLHOUSE) bench $$id --seeds 3 || exit 1; \
	done

# torch comes by pip, which honours a machine's own choice of build; uv resolves the rest fast.
.venv/uv.stamp:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.6" "torchvision>=0.21"
	touch $@

.venv/quickstart.stamp: .venv/uv.stamp pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e .
	touch $@

.venv/test.stamp: .venv/uv.stamp pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist
