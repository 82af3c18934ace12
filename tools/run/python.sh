#!/usr/bin/env bash
# Prints the path of the Python that can run the project. That is $PYTHON (default: python3) if it has the packages. Otherwise it
# is a virtual environment in the checkout, which the script makes for each version of Python when needed. The packages are those
# in the given requirements files. Names after the files select some of them.
#
#   python=$(tools/run/python.sh requirements.txt)
#   python=$(tools/run/python.sh requirements.txt numpy Pillow)
set -euo pipefail
python=$(command -v "${PYTHON:-python3}") ||
    { echo "python.sh: error: ${PYTHON:-python3}: no such Python; set PYTHON to the path of one" >&2; exit 1; }
python=$(realpath -s -- "$python")
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

files=() chosen=
for argument; do
    if [[ $argument == *.txt ]]; then files+=("$argument"); else chosen=$chosen${chosen:+|}$argument; fi
done
[[ $chosen != *onnx* ]] || chosen="$chosen|protobuf" # onnx 1.7 needs an old protobuf
wanted=$(grep -hE "^(${chosen:-.*})([ =<>;#]|$)" "${files[@]}" | sort)
packages=$(sed 's/[ #;=<>].*//; /^$/d' <<<"$wanted" | sort -u)
modules=$(sed 's/^Pillow$/PIL/; s/^pytest-xdist$/xdist/; s/^fonttools$/fontTools/; s/^opencv-python-headless$/cv2/; s/^protobuf$/google/; s/-/_/g; s/\[.*//' <<<"$packages")
if "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1].split())))' "$modules"; then
    echo "$python"
    exit
fi

folder=$PWD/.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
exec 9>"$folder.lock"
flock 9 2>/dev/null || true # a second run waits for the first one's environment, if the file system has locks
# The file "installed" is written last, so the next run completes an interrupted installation.
missing=$(grep -vxFf "$folder/installed" <<<"$wanted" 2>/dev/null || [ -e "$folder/installed" ] || echo "$wanted")
if [ -n "$missing" ]; then
    echo "python.sh: installing ${packages//$'\n'/, } into $folder (some minutes, once)" >&2
    [ -x "$folder/bin/pip" ] || "$python" -m venv "$folder" >&2
    # Settings for other places would lead the packages out of the environment. Others, such as a mirror, are kept.
    env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT PIP_USER=0 "$folder/bin/pip" install --quiet --disable-pip-version-check -r /dev/stdin <<<"$wanted" >&2
    echo "$missing" >>"$folder/installed"
fi
echo "$folder/bin/python"
