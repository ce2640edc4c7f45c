# Every target is one line over `python -m ...`. ARGS are key=value pairs, CONFIG a YAML file, CLUSTER a
# cluster's YAML (cluster/asuncion.yaml), RUN one of its runs, by default the newest, and A and B two machines'
# files of `make baseline`.
PYTHON ?= python3
CONFIG ?=
ARGS ?=
CLUSTER ?=
RUN ?=
A ?=
B ?=
SKIP_PREFLIGHT ?=
VENV := .venv
PY := $(VENV)/bin/python -m

.PHONY: train prepare study eval baseline parity projection serve serve-bench up status preflight attach stop pull down \
  test test-cluster check format clean

train: $(VENV)/ready
	$(PY) training.launch $(if $(CONFIG),--config $(CONFIG)) $(if $(CLUSTER),--cluster $(CLUSTER)) \
	  $(if $(SKIP_PREFLIGHT),--skip-preflight) $(ARGS)

prepare: $(VENV)/ready
	$(PY) training.data.prepare $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

study: $(VENV)/ready
	$(PY) training.study $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

eval: $(VENV)/ready
	$(PY) training.evaluate $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

baseline: $(VENV)/ready
	$(PY) training.baseline $(if $(CONFIG),--config $(CONFIG)) $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

parity: $(VENV)/ready
	$(PY) cluster.parity $(or $(A),$(error say A=FILE and B=FILE, of make baseline, or B=datasheet:h100)) $(B) $(ARGS)

projection: $(VENV)/ready
	$(PY) training.projection $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

serve: $(VENV)/ready
	$(PY) serving.app $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

serve-bench: $(VENV)/ready
	$(PY) serving.bench $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

up status down: $(VENV)/ready
	$(PY) cluster.laptop.fleet $@ $(or $(CLUSTER),$(error say CLUSTER=, such as CLUSTER=cluster/asuncion.yaml))

attach stop pull: $(VENV)/ready
	$(PY) cluster.laptop.remote $@ $(or $(CLUSTER),$(error say CLUSTER=, such as CLUSTER=cluster/asuncion.yaml)) \
	  $(if $(RUN),--run $(RUN))

preflight: $(VENV)/ready
	$(PY) $(if $(CLUSTER),cluster.laptop.remote preflight $(CLUSTER),cluster.preflight) $(ARGS)

# Two workers, which divide the files as tests/conftest.py says.
test: $(VENV)/ready
	$(PY) pytest -n 2 --no-loadscope-reorder $(ARGS)

test-cluster: $(VENV)/ready
	$(PY) pytest -m cluster $(ARGS)

check: $(VENV)/ready
	$(PY) ruff check . && $(PY) ruff format --check . && $(PY) mypy

format: $(VENV)/ready
	$(PY) ruff check --fix . && $(PY) ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The environment is ready when its last step is done; a broken-off one is finished by the next call.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "$(VENV): installing Python packages, this once. About 5 minutes and 3 GB, more with CUDA's torch;"
	@echo "pip says what it downloads, and is silent for the last minutes, while it unpacks."
	@started=$$(date +%s) && $(PYTHON) -m venv $(VENV) && \
	  $(VENV)/bin/pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" && \
	  touch $@ && echo "$(VENV): ready after $$(( $$(date +%s) - started )) s"
