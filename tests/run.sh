#!/usr/bin/env bash
# Checks the style and types of the source and runs the tests. Arguments go to pytest, which then
# runs alone.
#
#   bash tests/run.sh              what everybody runs before a commit
#   bash tests/run.sh -m smoke     a short check of an installation
#   bash tests/run.sh -m slow      the slow tests alone
#
# With CI set, the slow tests run too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. ./environment.sh
use_environment "$PWD" "$PWD/tests/requirements.txt"

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy .
    [ -z "${CI:-}" ] || set -- -m "slow or not slow"
fi
exec python -m pytest "$@"
