#!/usr/bin/env bash
# Makes or updates the virtual environment: launch/make_venv.sh PYTHON VENV. Called by the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if ! { new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  if ! new_enough "$python"; then
    found=$("$python" --version 2>/dev/null || true)
    echo "error: Python 3.10 or newer is needed, but '$python' is ${found:-not there};" \
      "name another with make PYTHON=python3.11" >&2
    exit 1
  fi
  echo "making $venv with $("$python" --version 2>&1)"
  "$python" -m venv --clear "$venv"
fi

seconds=$SECONDS
echo "installing what setup.cfg asks for, at the versions of constraints.txt (about a minute and a half the first time)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
echo "installed in $((SECONDS - seconds)) s"
