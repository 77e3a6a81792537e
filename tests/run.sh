#!/usr/bin/env bash
# Checks the style and types of the source and runs the tests. Arguments go to pytest.
#
#   bash tests/run.sh              what everybody runs before a commit
#   bash tests/run.sh -m slow      the slow tests alone
#
# With CI set, the slow tests run too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. ./environment.sh
use_environment "$PWD" "$PWD/tests/requirements.txt"

ruff check .
ruff format --check .
mypy .
if [ -n "${CI:-}" ] && [ $# -eq 0 ]; then
    set -- -m "slow or not slow"
fi
exec python -m pytest "$@"
