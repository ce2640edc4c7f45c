# Every target is one line over `python -m ...`. `make help` prints the lines that begin with `##`.
PYTHON ?= python3
CONFIG ?=
ARGS ?=
CLUSTER ?=
RUN ?=
RUNS ?=
A ?=
B ?=
SKIP_PREFLIGHT ?=
VENV := .venv
PY := $(VENV)/bin/python -m

.PHONY: train prepare study eval baseline parity projection lineage serve serve-bench report compare dashboard sync inventory up \
  status preflight clear attach stop pull down \
  test test-cluster test-fuzz test-faults check format clean help

## Train, serve, measure
## train         train a model, or resume the run of that name
train: $(VENV)/ready
	$(PY) training.launch $(if $(CONFIG),--config $(CONFIG)) $(if $(CLUSTER),--cluster $(CLUSTER)) \
	  $(if $(SKIP_PREFLIGHT),--skip-preflight) $(ARGS)

## prepare       turn a corpus into token shards (train does so where needed)
prepare: $(VENV)/ready
	$(PY) training.data.prepare $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

## study         compare optimizers at equal tuning effort
study: $(VENV)/ready
	$(PY) training.study $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

## eval          benchmarks and perplexity of a run, a checkpoint or an endpoint
eval: $(VENV)/ready
	$(PY) training.evaluate $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

## baseline      measure what this machine reaches, or a cluster (CLUSTER=)
baseline: $(VENV)/ready
	$(PY) training.baseline $(if $(CONFIG),--config $(CONFIG)) $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

## parity        compare two baselines, each against its own hardware (A=, B=)
parity: $(VENV)/ready
	$(PY) cluster.parity $(or $(A),$(error say A=FILE and B=FILE, of make baseline, or B=datasheet:h100)) $(B) $(ARGS)

## projection    predict the days of a training run on N nodes
projection: $(VENV)/ready
	$(PY) training.projection $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

## serve         serve the newest run, or model.path=, until Ctrl-C
serve: $(VENV)/ready
	$(PY) serving.app $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

## serve-bench   serve a model, and measure throughput and latency
serve-bench: $(VENV)/ready
	$(PY) serving.bench $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

##
## Review
## report        one HTML page of a run: curves, events, configuration (RUN=name)
report: $(VENV)/ready
	$(PY) cluster.review.page $(or $(RUN),$(error say RUN=, a run directory or its name in outputs/)) $(ARGS)

## compare       one HTML page of several runs: which is better (RUNS=a,b,c)
compare: $(VENV)/ready
	$(PY) cluster.review.compare $(or $(RUNS),$(error say RUNS=a,b, run directories or names in outputs/)) $(ARGS)

## lineage       which data, commit and checkpoint a result comes from (RUN=path or name)
lineage: $(VENV)/ready
	$(PY) cluster.record.lineage $(or $(RUN),$(error say RUN=, a run, checkpoint, export or file of results))

## dashboard     make the team's views in Weights & Biases, or update them
dashboard: $(VENV)/ready
	$(PY) cluster.review.dashboard $(ARGS)

## sync          send to W&B what is only on disk: all of outputs/, or RUN=name
sync: $(VENV)/ready
	$(PY) cluster.review.sync $(if $(RUN),--run $(RUN))

##
## A cluster (CLUSTER=cluster/asuncion.yaml)
## inventory     describe a new site: asks, or ARGS="from=~/.ssh/config hosts=asu-*" (CLUSTER=cluster/mine.yaml)
inventory: $(VENV)/ready
	$(PY) cluster.laptop.new_site $(or $(CLUSTER),cluster/mine.yaml) $(ARGS)

## up            start every node, or name those that did not join, with the reason
## status        nodes, runs, alarms, the last preflight; without CLUSTER=, the runs here (RUN=name)
## down          end every process of the cluster and its access; runs and data stay (ARGS=keep_access=true)
up down: $(VENV)/ready
	$(PY) cluster.laptop.fleet $@ $(or $(CLUSTER),$(error say CLUSTER=, such as CLUSTER=cluster/asuncion.yaml)) $(ARGS)

status: $(VENV)/ready
	$(PY) $(if $(CLUSTER),cluster.laptop.fleet status $(CLUSTER),cluster.review.status $(RUN))

## attach        follow a run's log (RUN=name, or the newest)
## stop          stop a run; its checkpoints stay
## pull          copy a run's metrics, plots and W&B files to outputs/
attach stop pull: $(VENV)/ready
	$(PY) cluster.laptop.remote $@ $(or $(CLUSTER),$(error say CLUSTER=, such as CLUSTER=cluster/asuncion.yaml)) \
	  $(if $(RUN),--run $(RUN))

## clear         use a drained GPU again, here or on CLUSTER= (ARGS=HOST:GPU, as `make status` names it)
clear: $(VENV)/ready
	$(PY) $(if $(CLUSTER),cluster.laptop.remote clear $(CLUSTER),cluster.heart.drained outputs) $(ARGS)

## preflight     check and measure the nodes: this machine, or CLUSTER=
preflight: $(VENV)/ready
	$(PY) $(if $(CLUSTER),cluster.laptop.remote preflight $(CLUSTER),cluster.preflight) $(ARGS)

##
## This project
## test          the tests, on two processes (ARGS="tests/optim": one room)
# tests/conftest.py divides the files between the two.
test: $(VENV)/ready
	$(PY) pytest -n 2 --no-loadscope-reorder $(ARGS)

## test-cluster  the long tests of a cluster: four hosts on one machine, as root
test-cluster: $(VENV)/ready
	$(PY) pytest -m cluster $(ARGS)

## test-faults   break real runs in every way, resume and compare them (ARGS="--seed 7": that one)
test-faults: $(VENV)/ready
	$(PY) tests.faults $(ARGS)

## test-fuzz     5,000 damaged files of every kind that the commands read
test-fuzz: $(VENV)/ready
	ASUNCION_PROPERTY_CASES=230 $(PY) pytest -n 2 --no-loadscope-reorder tests/fuzz $(ARGS)

## check         lint, format and types
check: $(VENV)/ready
	$(PY) ruff check . && $(PY) ruff format --check . && $(PY) mypy

## format        mend what lint and format can
format: $(VENV)/ready
	$(PY) ruff check --fix . && $(PY) ruff format .

## clean         remove .venv and caches; runs and data stay
clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache

## help          these lines
help:
	@sed -n 's/^## \{0,1\}//p' Makefile
	@echo
	@echo 'ARGS="key=value ..." sets keys and CONFIG=file.yaml names a file of them.'
	@echo '`.venv/bin/python -m training.launch --help` lists the keys of a command.'

# `ready` is made last, so an interrupted installation is finished by the next call.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "$(VENV): installing Python packages, this once. About 5 minutes and 3 GB, more with CUDA's torch;"
	@echo "pip says what it downloads, and is silent for the last minutes, while it unpacks."
	@started=$$(date +%s) && $(PYTHON) -m venv $(VENV) && \
	  $(VENV)/bin/pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" && \
	  touch $@ && echo "$(VENV): ready after $$(( $$(date +%s) - started )) s"
