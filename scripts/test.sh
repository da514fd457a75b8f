#!/usr/bin/env bash
# The whole test suite, with what this machine has: with a browser all but the device tests, without one the project's default.
#
# Chromium and its driver (for the tests of the memory page) are installed first, as Debian's packages, where that may be done
# (root, apt-get). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

has_browser() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }

install_browser() {
  echo "setup: installing chromium for the tests of the memory page (half a minute)" >&2
  DEBIAN_FRONTEND=noninteractive timeout 300 bash -c \
    'apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core' \
    >/dev/null 2>&1
}

chosen=()
if ! has_browser && [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
  install_browser || true
fi
if has_browser; then
  chosen=(-m "not device")
else
  echo "setup: the browser tests are left out; install chromium and chromium-driver to run them" >&2
fi
exec .venv/bin/python -m pytest ${chosen[@]+"${chosen[@]}"} "$@"
