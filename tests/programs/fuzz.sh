#!/usr/bin/env bash
# Fuzzes what reads text, files and configs of strangers, guided by coverage, and
# writes tests/programs/fuzz/RESULTS.md. Arguments are names of targets:
#
#   bash tests/programs/fuzz.sh                      all targets, 100,000 inputs each
#   N=2000 bash tests/programs/fuzz.sh layout jsonl  fewer, of two targets
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR/../..
source launch/env.sh

make_venv
install_package "[test]"
packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The fuzzer has an environment of its own, which finds the project's packages too.
export PYTHON=$PWD/$VENV/bin/python
VENV=build/fuzz
mkdir -p build
make_venv
install tests/programs/fuzz/requirements.txt
own=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$own/project.pth"
"$VENV/bin/python" -m tests.programs.fuzz.run --number="${N:-100000}" "$@"
