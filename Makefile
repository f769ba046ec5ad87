# Thin calls of the kit's own commands; 'python3 -m cmlib' explains them.
# Options travel in ARGS, another interpreter in PYTHON:  make lab ARGS="--port 9000" PYTHON=python3.12

PYTHON ?= python3
COMMANDS = setup lab test bench fuzz mutants notebooks exercises grade lint train clean

.DEFAULT_GOAL = help
.PHONY: help $(COMMANDS)

help:
	@$(PYTHON) -m cmlib

$(COMMANDS):
	@$(PYTHON) -m cmlib $@ $(ARGS)
