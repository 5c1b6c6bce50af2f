# Every command installs what it needs first (Debian packages, a virtual environment); `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: ## install what the other commands need: Debian packages, .venv
	@tests/setup.sh

.PHONY: check
check: setup ## formatting, linting, types, layers: ruff, mypy, import-linter, clang-format, shellcheck, kustomize
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/clang-format --dry-run --Werror bpf/*.[ch] bpf/include/*/*.h tests/lab/*.c
	shellcheck tests/*.sh .ci/run
	$(PYTHON) -m tests.kustomize

.PHONY: test
test: check ## everything this machine can test; skips are listed with their reasons (CI=true: a skip fails)
	@$(PYTHON) -m tests.peers.build otelcol kubernetes prometheus loki tempo kustomize || echo "the tests with what was not built will be skipped"
	$(PYTHON) -m pytest -n 2

.PHONY: fuzz
fuzz: setup ## random packets by the million, kernel against oracle: make fuzz N=10000000 SEED=1
	$(PYTHON) -m tests.kernel.fuzz $(or $(N),10000000) $(SEED)

.PHONY: test-kernels
test-kernels: ## chosen tests under Debian's kernels 6.1 and 6.12 in virtual machines, and here: a table (KERNELS="6.1 here")
	@tests/setup.sh kmod qemu-system-x86 busybox-static wireguard-tools ipset
	@$(PYTHON) -m tests.peers.build otelcol kubernetes
	$(PYTHON) -m tests.kernels $(KERNELS)

.PHONY: soak
soak: setup ## agents while everything around them comes and goes: make soak MINUTES=10 SEED=1
	nice $(PYTHON) -m tests.soak $(or $(MINUTES),10) $(SEED)

.PHONY: demo
demo: setup ## real traffic through two VIPs, an agent on each node, and what it tells
	$(PYTHON) -m tests.demo

.PHONY: queries
queries: setup ## run the worked queries of docs/queries.md and write their output into it
	@$(PYTHON) -m tests.peers.build otelcol prometheus loki tempo
	$(PYTHON) -m tests.backends.queries

.PHONY: pictures
pictures: setup ## draw docs/images from the results of real queries
	@$(PYTHON) -m tests.peers.build otelcol prometheus loki tempo
	$(PYTHON) -m tests.backends.pictures

.PHONY: bench
bench: setup ## what it costs, each row a ratio or a figure of one run
	$(PYTHON) -m tests.bench

.PHONY: lab
lab: setup ## a lab to look around in: make lab CMD="up --nodes 3"
	$(PYTHON) -m tests.lab $(or $(CMD),--help)

.PHONY: dashboards
dashboards: setup ## write the dashboards' JSON from their source, deploy/grafana/*.py
	$(PYTHON) -m deploy.grafana

.PHONY: format
format: setup ## format the sources
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
	.venv/bin/clang-format -i bpf/*.[ch] bpf/include/*/*.h tests/lab/*.c

.PHONY: clean
clean: ## remove what the commands made in this tree
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -prune -exec rm -rf {} +
