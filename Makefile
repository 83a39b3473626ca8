# make demo        set up, start the server on the bundled checkpoint, transcribe wavs/, stop the server
# make serve       set up and leave the server running; MODEL=./model make serve takes the full weights
# make test        set up and run all tests
# make docker-test build the image and try it in a container (installs a Docker engine if there is none)
# make train       rebuild the bundled checkpoint on one GPU
# make bench       measure upstream's GLM-ASR and this one on this machine: bench/results/ gets a table and a plot
.PHONY: demo serve test docker-test train bench patched
SHELL := /bin/bash
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

demo: patched
	$(VENV_PYTHON) server/demo.py

serve: patched
	exec $(VENV_PYTHON) server/serve.py

test: patched
	tests/chromium.sh
	$(VENV_PYTHON) -m pytest tests -rP --durations=10

docker-test:
	tests/docker/run.sh

train: patched
	$(VENV_PYTHON) training/train.py

bench: patched
	$(VENV_PYTHON) bench/run.py

# Copies our files into the installed vLLM again, in case they have changed.
patched: .venv/.ready
	$(VENV_PYTHON) server/registry.py

.venv/.ready: requirements.txt requirements-test.txt server/install.sh
	server/install.sh $(PYTHON)
	touch $@
