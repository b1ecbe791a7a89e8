#!/usr/bin/env bash
# Sets up the environment and runs all tests, files in two processes at a time. Arguments go to pytest:
# bash launch/test.sh tests/test_sharding.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh test
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=60 --durations-min=5 "$@"
