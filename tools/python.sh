#!/usr/bin/env bash
# Prints the Python to run the project with: $PYTHON (default python3) itself if it has the packages of the requirements
# files given, else that of a virtual environment in the checkout, one for each version of Python, made when needed.
#
#   python=$(tools/python.sh requirements.txt)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(command -v "${PYTHON:-python3}") ||
    { echo "python.sh: error: ${PYTHON:-python3}: no such Python; set PYTHON to one" >&2; exit 1; }
modules=$(cat "$@" | sed 's/[ #;=<>].*//; s/^Pillow$/PIL/; s/^protobuf$/google/' | sort -u)
if "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1].split())))' "$modules"; then
    echo "$python"
    exit
fi

folder=$PWD/.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
exec 9>"$folder.lock"
flock 9 # a second run waits for the first one's environment
# What is installed is written down last, so an installation that was interrupted is taken up again.
if ! grep -qsx "$(cat "$@" | cksum)" "$folder/installed"; then
    echo "python.sh: installing the packages of $* into $folder (some minutes, once)" >&2
    [ -x "$folder/bin/pip" ] || "$python" -m venv "$folder" >&2
    # shellcheck disable=SC2046 # one -r for each file
    "$folder/bin/pip" install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") >&2
    cat "$@" | cksum >>"$folder/installed"
fi
echo "$folder/bin/python"
