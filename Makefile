# make quickstart  an experiment on the glyph world: reward curves, image grids, exported LoRA (about 5 minutes on 2 cores)
# make test        lint, format, types, tests (creates .venv if there is none)
# make test-rewards  the same tests in a second environment, .venv-rewards, which includes `make rewards`
# make format      format the files as `make test` requires
# make rewards     the packages that the rewards hpsv2 (backend: hpsv2), image_reward and ocr need in addition
# make world       train the embedded glyph networks again (an hour or two on 2 cores)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-rewards format rewards world clean
.DELETE_ON_ERROR:

# torch is installed first and alone; see constraints.txt.
$(VENV)/installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev-installed: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/odeon launch experiments/quickstart.yaml
	$(BIN)/odeon compare runs/quickstart --out runs/quickstart/curve.png
	$(BIN)/odeon export runs/quickstart
	@echo "curves    runs/quickstart/report.html, the main ones in runs/quickstart/curve.png"
	@echo "images    runs/quickstart/samples/ (teacher above, trained below)"
	@echo "LoRA      runs/quickstart/export/diffusers/"

test: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-rewards:
	$(MAKE) VENV=.venv-rewards .venv-rewards/dev-installed rewards
	.venv-rewards/bin/pytest

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --no-deps: the versions that these packages pin would downgrade protobuf, timm and pytest by years; rewards/parts/compat.py makes
# them work with current versions. pip then warns about the missing dependencies; see requirements/rewards.txt.
rewards: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[rewards]'
	$(BIN)/pip install -q --no-deps -r requirements/rewards.txt

world: $(VENV)/dev-installed
	$(BIN)/python -m worlds.glyphs.make
	$(BIN)/python -m generators.glyphs.train

clean:
	rm -rf .venv .venv-rewards build *.egg-info .pytest_cache .ruff_cache .mypy_cache
