#!/usr/bin/env bash
# Checks style, types and imports, then runs the tests. Options go to pytest.
#   DEEPGMM_TEST_DATA=/path/to/scans bash scripts/test.sh      also runs the tests on real scans
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test,dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
# Worker processes side by side: threads of their own would only wait for each other.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" .venv/bin/python -m pytest --numprocesses auto "$@"
