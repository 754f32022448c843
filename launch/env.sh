# shellcheck shell=bash
# Makes the virtual environment of the other scripts here, which source it.
# A second run finds everything in place and takes no time.

VENV=.venv

# Prints the first Python that runs, is 3.11 to 3.13 and can make a venv. A name
# on the PATH proves nothing: a pyenv shim may stand for no installation at all.
find_python() {
  local candidate
  local usable='import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c "$usable" >/dev/null 2>&1; then
      if [[ "$candidate" != "${PYTHON:-$candidate}" ]]; then
        echo "PYTHON=$PYTHON is of no use here, so $candidate is taken" >&2
      fi
      printf '%s\n' "$candidate"
      return
    fi
  done
  echo "No usable Python found. Needed: 3.11 to 3.13 with venv and ensurepip" \
    "(Debian, Ubuntu: apt install python3-venv). Name one with PYTHON=..." >&2
  return 1
}

make_venv() {
  if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  local python
  python=$(find_python)
  echo "Making $VENV with $("$python" --version)"
  "$python" -m venv --clear "$VENV"
}

# Runs pip install, unless the last time was with the same: pip_install NAME CONTENT
# ARGUMENTS... An environment that is a link is another checkout's, and stays as it is.
pip_install() {
  local stamp="$VENV/installed-$1" content=$2 last
  shift 2
  for last in "$stamp"*; do # with more extras will do
    if [[ -L "$VENV" || (-f "$last" && "$(<"$last")" == "$content") ]]; then
      return
    fi
  done
  echo "Installing ${*: -1} (the first time takes a minute or two)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  printf '%s\n' "$content" >"$stamp"
}

# Installs this package, to be edited in place, with extras: install_package "[test]"
install_package() {
  local extras=${1:-}
  pip_install "package$extras" \
    "$(cat setup.py requirements.txt && sed '/no matter to an installation/,$d' pyproject.toml)" \
    --editable ".$extras"
}

# Installs requirements files.
install() {
  local file
  for file in "$@"; do
    pip_install "${file//\//-}" "$(<"$file")" --requirement "$file"
  done
}
