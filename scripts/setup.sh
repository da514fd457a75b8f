#!/usr/bin/env bash
# Prepare .venv/: pinned dependencies, Brim itself (editable), the C kernels, the demo model.
#
# Idempotent: each part keeps a stamp with the checksum of what it was made from and is skipped while that holds, so a second
# call takes a fraction of a second. PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
bin=$venv/bin

hash_of() { cat "$@" | cksum | tr ' ' -; }
is_done() { [[ -f $venv/.stamp-$1 && "$(cat "$venv/.stamp-$1")" == "$2" ]]; }
mark_done() { printf '%s\n' "$2" >"$venv/.stamp-$1"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.13 python3.12; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11 or newer was found; install one or set PYTHON=/path/to/python3.11" >&2
  return 1
}

install_packages() {
  if [[ ! -x $bin/python ]]; then
    local python
    python=$(find_python)
    echo "setup: creating $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
  fi
  local pip=("$bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
  # torch first and alone: the exact pin picks the build the index offers for this machine, before anything can pull another.
  echo "setup: installing torch (a few minutes on a slow network)" >&2
  "${pip[@]}" setuptools torch
  echo "setup: installing Brim and its dependencies" >&2
  "${pip[@]}" --no-build-isolation --editable '.[demo,dev]'
  "$bin/python" -m compileall -q src/brim || true
}

packages="$(hash_of pyproject.toml constraints.txt) $PWD"  # a moved folder needs its scripts written anew
if [[ ! -x $bin/brim ]] || ! is_done packages "$packages"; then
  install_packages
  mark_done packages "$packages"
fi

kernels=$(hash_of src/brim/kernels/cpu/*.py src/brim/kernels/cpu/csrc/*)
if ! is_done kernels "$kernels"; then
  echo "setup: building the CPU kernels" >&2
  # Without a working C compiler Brim falls back to its torch kernels, so this is no reason to stop.
  if "$bin/python" -m brim.kernels.cpu.build >&2; then
    mark_done kernels "$kernels"
  else
    echo "setup: the CPU kernels were not built (is a C compiler installed?); Brim will use its slower torch kernels" >&2
  fi
fi

if ! is_done demo "$packages"; then
  echo "setup: assembling the demo model" >&2
  "$bin/python" scripts/prepare_demo.py >&2
  mark_done demo "$packages"
fi
