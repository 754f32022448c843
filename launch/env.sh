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

# Installs each requirements file given, unless it is the same as last time.
install() {
  local file stamp
  for file in "$@"; do
    stamp="$VENV/installed-${file//\//-}"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$(<"$file")" ]]; then
      continue
    fi
    echo "Installing $file (the first time takes a minute or two)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
    cp "$file" "$stamp"
  done
}
