#!/usr/bin/env bash
# Rewrite constraints.txt from the present .venv. Run it after the whole suite is green with new versions.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Every dependency of '.[demo,dev]', pinned. Written by scripts/lock.sh from a venv whose whole test suite is green."
  # A local version (2.13.0+cpu) would tie the pin to one index; the public one lets each machine take its build.
  .venv/bin/python -m pip freeze --all | grep -v -E '^(#|-e |brim[ =]|pip==)' | sed 's/+cpu$//'
} >constraints.new
mv constraints.new constraints.txt
