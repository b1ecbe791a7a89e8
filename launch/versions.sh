#!/usr/bin/env bash
# Runs a part of the tests on every installed Python, each with the newest packages that it allows, and prints a table.
# bash launch/versions.sh [TEST FILE...]
#
#   INTERPRETERS  Python commands, each with constraints for pip after a colon if need be
#                 (default: those of python3.11 to python3.13 that are installed), e.g.
#                 INTERPRETERS="python3.11 python3.13 python3.13:jax<0.12" bash launch/versions.sh
#   VERSIONS_DIR  where the environments and logs go (default .venvs in the checkout); those that are there are used again
#
# The exit code is 1 if tests failed anywhere. PyTorch and MONAI, against which other tests compare, are not installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${VERSIONS_DIR:-$PWD/.venvs}
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(
    tests/test_files.py tests/test_commands_main.py tests/test_config.py tests/test_data_order.py
    tests/test_data_records.py tests/test_sharding.py tests/test_training_checkpoints.py tests/test_fixtures.py
  )
fi
if [ -z "${INTERPRETERS:-}" ]; then
  for candidate in python3.11 python3.12 python3.13; do
    if "$candidate" -c '' 2>/dev/null; then INTERPRETERS="${INTERPRETERS:-} $candidate"; fi
  done
fi

# What the tests need beside the package itself: requirements-dev.txt without the linters and what compares with PyTorch.
needed=$(grep -vE '^(#|-r|torch|monai|einops|onnx|SimpleITK|mypy|ruff|shellcheck|setuptools)' requirements-dev.txt)
mkdir -p "$folder"
failed=0
table=$folder/table.md
printf '| %s | %s | %s | %s | %s | %s | %s |\n' Python jax flax numpy scipy passed failed >"$table"
echo '|---|---|---|---|---|---|---|' >>"$table"
for entry in $INTERPRETERS; do
  python=${entry%%:*}
  constraints=""
  case $entry in *:*) constraints=${entry#*:} ;; esac
  name=$(echo "${python##*/}-$("$python" -c 'import platform; print(platform.python_version())')${constraints:+-$constraints}" | tr -c 'A-Za-z0-9.\n-' _)
  venv=$folder/$name
  log=$folder/$name.log
  wanted=$({ cat requirements.txt && echo "$needed $constraints"; } | cksum)
  if [ "$(cat "$venv/.mg3d" 2>/dev/null)" != "$wanted" ]; then
    echo "versions: installing into $venv" >&2
    "$python" -m venv "$venv"
    # shellcheck disable=SC2086 # words
    "$venv/bin/python" -m pip install -q --upgrade -r requirements.txt $needed ${constraints//,/ }
    echo "$wanted" >"$venv/.mg3d"
  fi
  echo "versions: testing with $name, see $log" >&2
  code=0
  PYTHONPATH=$PWD "$venv/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}" >"$log" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then failed=1; fi
  last=$(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -1)
  count() { echo "$last" | grep -oE "[0-9]+ $1" | cut -d' ' -f1 || true; }
  "$venv/bin/python" - "$(count passed)" "$(count failed)" "$(count error)" "$code" >>"$table" <<'PYTHON'
import platform, sys
from importlib.metadata import version
passed, failed, errors, code = (int(word or 0) for word in sys.argv[1:])
bad = failed + errors or (f"pytest ended with {code}" if code else 0)
packages = (version(name) for name in ("jax", "flax", "numpy", "scipy"))
print("|", " | ".join([platform.python_version(), *packages, str(passed), str(bad)]), "|")
PYTHON
done
cat "$table"
exit "$failed"
