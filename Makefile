# make demo · make test · make help: each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n auto --dist loadgroup
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
PARTS := part1 part2 part3 part4 part5 part6 part7 part8
.PHONY: help demo test check bench chaos soak dashboard screenshots cluster sentinel $(PARTS) stop clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@printf 'part1 … part8\ta clean server, and what that part of the tutorial needs\n' | expand -t 14

demo: .venv/ready  ## three tasks, an agent, and their streams, live in this terminal
	@$(BIN)/python demo.py

test: .venv/ready-dev  ## the tests, several at a time, in about 3 minutes (make chaos runs the long ones)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: .venv/ready-dev  ## formatting, lint, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: .venv/ready  ## how fast, as ratios to bare Redis; writes docs/performance.md (about 8 minutes)
	@for part in speed memory watchers capacity; do $(BIN)/python benchmarks/$$part.py --write || exit 1; done

chaos: .venv/ready-dev  ## break everything, 20 s each, on both engines (SECONDS_EACH=2: 10 minutes at most; ARGS="-k sentinel": some)
	@CHAOS_SECONDS=$(or $(SECONDS_EACH),20) $(BIN)/python -m pytest $(PARALLEL) -m "chaos or smoke" $(ARGS)

soak: .venv/ready  ## 10 minutes of work, to see that memory stays flat
	@$(BIN)/python benchmarks/soak.py

$(PARTS): .venv/ready
	@$(BIN)/python tutorial/start.py $(@:part%=%)

cluster: .venv/ready  ## a Redis Cluster of six nodes on this machine, until Ctrl-C
	@$(BIN)/python tutorial/topologies.py cluster

sentinel: .venv/ready  ## a master, a replica and three sentinels on this machine, until Ctrl-C
	@$(BIN)/python tutorial/topologies.py sentinel

dashboard: .venv/ready  ## watch tasks in the browser
	@$(BIN)/python dashboard.py

screenshots: .venv/ready-dev  ## make the pictures that README.md shows (needs Chromium)
	@$(BIN)/python tests/web/screenshots.py

stop: .venv/ready  ## stop the embedded server (its data stay in .redis/)
	@$(BIN)/python -m ailf.messaging.redis stop

clean:  ## stop it, and remove its data, the outbox and .venv
	@if [ -e .venv/ready ]; then $(BIN)/python -m ailf.messaging.redis stop; fi
	rm -rf .redis outbox .venv

# What the scripts need: about 150 MB. pip's own output is long; its "Collecting" lines show the progress.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
# In bash, because Debian's awk holds back what it reads.
SHOW = while read -r word name _; do case $$word in \
	Collecting|Processing) name=$${name\#\#*/}; name=$${name%%[<>=!~;]*}; printf ' %s' "$${name%%-[0-9]*}";; Installing) printf '\n  unpacking ...\n';; esac; done

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv, once (about 150 MB, half a minute):"
	@$(PYTHON) -m venv .venv || { echo "cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@$(INSTALL) -r requirements.txt | $(SHOW)
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	@echo "Adding what tests and checks need, once (about 400 MB, a minute):"
	@$(INSTALL) -r requirements-dev.txt | $(SHOW)
	@touch $@
