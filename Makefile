# `make` lists what there is. Each target makes .venv first where it is missing; .ci/venv says how, and what PYTHON and
# SYSTEM_TORCH are for.
export PYTHON SYSTEM_TORCH
# notebooks whose outputs `make notebooks` saves
NB ?= nbs/*.ipynb nbs/tutorials/*.ipynb nbs/explanations/*.ipynb

.PHONY: help demo test install notebooks docs constraints clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 20

demo: ## fine-tune a small model on real data, and see whether search got better: runs/demo/report.html
	@sh .ci/venv demo
	@.venv/bin/nixietune demo

test: ## everything that a change must pass, as CI runs it
	@bash .ci/run

install: ## the environment for working on the project
	@sh .ci/venv dev

notebooks: install ## run notebooks and save their outputs: all, or NB=nbs/52_losses.ipynb
	@for nb in $(NB); do [ ! -f $$nb ] || set -- "$$@" $$nb; done; .venv/bin/python .ci/outputs.py "$$@"

docs: install ## the site, in _docs/, and README.md
	@PATH="$(CURDIR)/.ci/bin:$(CURDIR)/.venv/bin:$$PATH"; PYTHONPATH="$(CURDIR)/.ci"; export PATH PYTHONPATH; nbdev_readme && nbdev_docs
	@.venv/bin/python .ci/links.py _docs

constraints: install ## write constraints.txt anew from what .venv has
	@.venv/bin/python .ci/constraints.py

clean: ## remove .venv and everything built; runs/ stays
	@rm -rf .venv _docs _proc build dist nixietune.egg-info .pytest_cache
	@find nbs nixietune tests .ci -name __pycache__ -prune -exec rm -rf {} +
