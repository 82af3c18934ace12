#!/usr/bin/env bash
# Runs every test on the current Python ($PYTHON, default python3) and on Python 3.7 ($PYTHON37; else python3.7, else
# pyenv's): first ruff and shellcheck, then the test files, four at a time, with one Python after the other. If a Python lacks
# packages, the script makes a virtual environment for it. Arguments go to pytest. The tests open the report in chromium ($CHROMIUM
# names another Chrome). If this browser, fontconfig, the locales or shellcheck are missing, root installs them. $AIS_BENCH and
# $AMCT name what genuine tools are tested with, too: see docs/development.md.
set -uo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit 1

python37=${PYTHON37-$(command -v python3.7)}
if [ -z "$python37" ] || ! "$python37" --version >/dev/null 2>&1; then
    python37=$(compgen -G "$(pyenv root 2>/dev/null)/versions/3.7.*/bin/python" | head -n 1)
fi

packages=()
[ "${CHROMIUM:=chromium}" != chromium ] || command -v chromium >/dev/null || packages+=(chromium fonts-dejavu-core)
command -v shellcheck >/dev/null || packages+=(shellcheck)
command -v fc-match >/dev/null || packages+=(fontconfig)
[ -e /usr/share/i18n/charmaps/GBK.gz ] || packages+=(locales)
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "tests/run.sh: installing ${packages[*]}"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
        "${packages[@]}" >/dev/null; } || echo "tests/run.sh: the packages cannot be installed, see above"
fi
for program in "$CHROMIUM" shellcheck; do
    command -v "$program" >/dev/null ||
        { echo "tests/run.sh: error: no $program; run as root: apt-get install chromium fonts-dejavu-core shellcheck"; exit 1; }
done
export CHROMIUM

export DEEPMAR_TEST_SHARED DEEPMAR_TEST_PYTHONS=
DEEPMAR_TEST_SHARED=$(mktemp -d) # holds the sample, which a Python's tests share, and tests/stacks.py's input
trap 'rm -rf "$DEEPMAR_TEST_SHARED"' EXIT
# Four test files run at the same time, so more threads would only wait for each other.
export OMP_NUM_THREADS=1

pythons=("${PYTHON:-python3}")
[ -z "$python37" ] || pythons+=("$python37")
for index in "${!pythons[@]}"; do
    pythons[index]=$(PYTHON=${pythons[index]} bash -p tools/run/python.sh requirements.txt tests/requirements.txt) || exit 1
done
DEEPMAR_TEST_PYTHONS=$(IFS=: && echo "${pythons[*]}")

shellcheck -x run_all.sh tools/run/*.sh tests/run.sh .ci/run || exit 1
"${pythons[0]}" -m ruff check --quiet . || exit 1

# The second Python leaves these out, because nothing in them depends on the stack: the benchmark, a tool for developers; the documents;
# and stand-ins of ais_bench, which test_card and test_rates run on both. A genuine ais_bench may depend on it.
once=(--ignore=tests/test_bench.py --ignore=tests/test_docs.py)
[ -n "${AIS_BENCH-}" ] || once+=(--ignore=tests/test_genuine.py)
options=(-q -rs -p no:cacheprovider)
failed=
for index in "${!pythons[@]}"; do
    python=${pythons[index]}
    echo "=== $("$python" --version)"
    [ "$index" = 0 ] && left_out=() || left_out=("${once[@]}")
    "$python" -m pytest "${options[@]}" -n 4 --dist loadfile --durations=20 --durations-min=5 "${left_out[@]}" tests "$@" ||
        failed+=" the tests on $python;"
done

if [ $# = 0 ] && [ -z "$failed" ] && [ -n "$python37" ]; then
    echo "=== the two stacks against each other"
    "${pythons[0]}" -m pytest "${options[@]}" -s tests/stacks.py || failed=" tests/stacks.py;"
fi
[ -n "$python37" ] ||
    echo "NOT RUN: the half on Python 3.7 (the guide's stack): no Python 3.7 on this machine; set PYTHON37 to one"
[ -z "$failed" ] || { echo "tests/run.sh: error: failed:${failed%;}"; exit 1; }
