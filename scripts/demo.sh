#!/usr/bin/env bash
# Makes a small synthetic cohort, segments it, measures it, writes the pages, and says where to look.
#   bash scripts/demo.sh [FOLDER]      (default: demo_out)
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
.venv/bin/deepgmm demo "${1:-demo_out}"
