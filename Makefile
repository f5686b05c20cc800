# Two commands for a new user: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
RUNS := $(if $(MINILM_HOME),$(MINILM_HOME),runs)
VERSIONS := $(shell cat setup.py constraints.txt | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(VERSIONS)
READY_SLOW := $(VENV)/.ready-slow-$(VERSIONS)
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: setup demo test test-slow test-exhaustive test-launchers check bench clean

setup: $(READY)

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev,eval]'
	@rm -f $(VENV)/.ready-* && touch $@

$(READY_SLOW): $(READY)
	$(INSTALL) --editable '.[dev,eval,ray,interop,onnx]'
	@touch $@

demo: setup
	minilm samples
	minilm prepare --tokenizer $(RUNS)/samples/all-MiniLM-L6-v2 \
	    --source wikipedia:$(RUNS)/samples/enwiki-sample.xml.bz2 \
	    --source jsonl,language=en:$(RUNS)/samples/leads-en.jsonl \
	    --validation 0.02 --out $(RUNS)/demo/corpus
	minilm inspect $(RUNS)/demo/corpus
	deepspeed --num_gpus 2 launch/distill.sh --recipe demo --stop-at 150
	deepspeed --num_gpus 2 launch/distill.sh --recipe demo
	minilm export $(RUNS)/demo/run
	minilm evaluate $(RUNS)/demo/run --probe $(RUNS)/samples/leads-en.jsonl
	minilm evaluate $(RUNS)/demo/run --tasks topics:text --data $(RUNS)/samples --lr 3e-4 --seeds 1
	@echo "Curves: tensorboard --logdir $(RUNS)/demo/run/tensorboard"

test: setup
	pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not exhaustive and not gpu"

test-slow: $(READY_SLOW)
	pytest -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

test-exhaustive: setup
	pytest -m "exhaustive and not launchers"

test-launchers: setup
	pytest -m launchers

check: setup
	ruff check .
	ruff format --check .

# Without the peers: each script's head says how to have them beside.
bench: setup
	minilm samples
	python tests/benchmarks/relations.py
	python tests/benchmarks/step.py
	python tests/benchmarks/loader.py
	python tests/benchmarks/prepare.py --text $(RUNS)/samples/leads-en.jsonl \
	    --tokenizer wordpiece=$(RUNS)/samples/all-MiniLM-L6-v2
	python tests/benchmarks/teacher_memory.py
	minilm prepare --tokenizer $(RUNS)/samples/all-MiniLM-L6-v2 --validation 0.02 \
	    --source jsonl,language=en:$(RUNS)/samples/leads-en.jsonl --out $(RUNS)/bench/corpus
	python tests/benchmarks/overheads.py data.corpus=$(RUNS)/bench/corpus

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache runs/demo runs/bench
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
