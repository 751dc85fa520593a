# From Maps to Masks.  `make run` computes every result, `make test` is what CI checks. Both set up what is missing.
SHELL := /bin/bash
PY    ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV  := .venv
RUN   := $(VENV)/bin/python
STAMP  = $(VENV)/.ready-$(shell $(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
TORCH  = import tomllib; print(*(r for r in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["course"] if r.startswith("torch")))
export OMP_NUM_THREADS ?= 1

help:              ## say what there is
	@awk -F ' +## ' '/^[a-z]+:.*##/ { sub(/:.*/, "", $$1); printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP)       ## data, all notebooks (solved, mini profile), build/report.html
	$(RUN) -m course_lib data
	$(RUN) -m course_lib run

test: $(STAMP)      ## everything that CI checks
	$(RUN) -m course_lib data
	$(RUN) -m pytest -q -n 2 --dist loadgroup

lab: $(STAMP)       ## open the lessons in JupyterLab, as copies of your own in work/
	$(RUN) -m course_lib lab $(LAB)

update: $(STAMP)    ## bring your copies in work/ to a corrected release; your answers stay
	$(RUN) -m course_lib update

evidence: $(STAMP)  ## measure the lessons with several seeds, into data/evidence
	$(RUN) -m course_lib data
	$(RUN) -m course_lib evidence

bench: $(STAMP)     ## our speed beside that of other libraries
	$(RUN) -m pip install -q -e ".[bench]"
	$(RUN) -m course_lib data
	$(RUN) -m course_lib bench

notebooks: $(STAMP) ## write the lessons in notebooks/ anew from notebooks/src; changed ones are refused
	$(RUN) -m course_lib build

clean:              ## remove what was computed and generated; the environment and your own data and work/ stay
	rm -rf build data/mini-* data/photographs data/.*.lock

# torch goes first and alone: the largest download, the simplest resolve, and the clearest error if it fails.
$(STAMP): pyproject.toml
	@[ -n "$(PY)" ] || { echo "The course needs Python 3.11 or newer; none was found. Debian, Ubuntu: apt-get install python3 python3-venv"; exit 1; }
	@$(PY) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PY) cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv"; exit 1; }
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear $(VENV)
	$(RUN) -m pip install -q $$($(RUN) -c '$(TORCH)')
	$(RUN) -m pip install -q -e ".[course,dev]"
	@touch $(VENV)/.ready-$$($(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: help run test lab update evidence bench notebooks clean
