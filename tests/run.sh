#!/usr/bin/env bash
# Runs every test on the current Python ($PYTHON, default python3) and on Python 3.7 ($PYTHON37; else python3.7, else
# pyenv's). Sets up a virtual environment for each where its packages are missing. Arguments go to pytest. The report is
# looked at in chromium ($CHROMIUM names another Chrome). It, fontconfig and the locales are installed where they are
# missing and this is root.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python37=${PYTHON37-$(command -v python3.7)}
if [ -z "$python37" ] || ! "$python37" --version >/dev/null 2>&1; then
    python37=$(compgen -G "$(pyenv root 2>/dev/null)/versions/3.7.*/bin/python" | head -n 1)
fi

packages=()
[ "${CHROMIUM:=chromium}" != chromium ] || command -v chromium >/dev/null || packages+=(chromium fonts-dejavu-core)
command -v fc-match >/dev/null || packages+=(fontconfig)
[ -e /usr/share/i18n/charmaps/GBK.gz ] || packages+=(locales)
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "tests/run.sh: installing ${packages[*]}"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
        "${packages[@]}" >/dev/null; } || echo "tests/run.sh: they cannot be installed, see above"
fi
command -v "$CHROMIUM" >/dev/null ||
    { echo "tests/run.sh: error: no $CHROMIUM, the browser that the report's tests need; run as root:" \
        "apt-get install chromium fonts-dejavu-core, or set CHROMIUM to a Chrome"; exit 1; }
export CHROMIUM

failed=
pythons=
DEEPMAR_TEST_STACKS=$(mktemp -d) && export DEEPMAR_TEST_STACKS # where each half leaves its run for tests/stacks.py
trap 'rm -rf "$DEEPMAR_TEST_STACKS"' EXIT

run() { # run PYTHON [pytest's arguments]
    local python file ran=
    echo "=== tests on $("$1" --version 2>&1)"
    python=$(PYTHON=$1 tools/python.sh requirements.txt tests/requirements.txt) || { failed="$failed $1"; return; }
    pythons=$pythons${pythons:+:}$python
    shift
    # A process for each file: where a library crashes, the other files' tests run all the same.
    for file in tests/test_*.py; do
        "$python" -m pytest -q -rs -p no:cacheprovider --durations=3 --durations-min=5 "$file" "$@"
        case $? in
            0) ran=yes ;;
            5) ;; # the arguments choose none of its tests
            *) ran=yes failed="$failed $file ($python)" ;;
        esac
    done
    [ -n "$ran" ] || failed="$failed no-test-was-chosen"
}
run "${PYTHON:-python3}" "$@"
if [ -n "$python37" ]; then
    run "$python37" "$@"
    if [ $# = 0 ] && [ -z "$failed" ]; then
        echo "=== the two stacks against each other"
        DEEPMAR_TEST_PYTHONS=$pythons "${pythons%%:*}" -m pytest -q -s -p no:cacheprovider tests/stacks.py ||
            failed="$failed both"
    fi
else
    echo "NOT RUN: the half on Python 3.7 (the guide's stack): no Python 3.7 on this machine; set PYTHON37 to one"
fi
[ -z "$failed" ] || { echo "tests/run.sh: error: failed:$failed"; exit 1; }
