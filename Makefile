# Every target is one line over `python -m ...`. ARGS are key=value pairs, CONFIG a YAML file.
PYTHON ?= python3
CONFIG ?=
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: train prepare study serve serve-bench test check format clean

train: $(VENV)/ready
	$(RUN) training.launch $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

prepare: $(VENV)/ready
	$(RUN) training.prepare $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

study: $(VENV)/ready
	$(RUN) training.study $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

serve: $(VENV)/ready
	$(RUN) serving.app $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

serve-bench: $(VENV)/ready
	$(RUN) serving.bench $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

test: $(VENV)/ready
	$(RUN) pytest $(ARGS)

check: $(VENV)/ready
	$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy

format: $(VENV)/ready
	$(RUN) ruff check --fix . && $(RUN) ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The environment is ready when its last step is done; a broken-off one is finished by the next call.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
