#!/usr/bin/env bash
# Runs every test on the current Python ($PYTHON, default python3) and on Python 3.7 ($PYTHON37; else python3.7, else
# pyenv's): first ruff and shellcheck, then the test files, four at a time. If a Python lacks packages, the script makes a virtual
# environment for it. Arguments go to pytest. The tests open the report in chromium ($CHROMIUM names another Chrome). If this
# browser, fontconfig, the locales or shellcheck are missing, root installs them.
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
    pythons[index]=$(PYTHON=${pythons[index]} tools/python.sh requirements.txt tests/requirements.txt) || exit 1
done
DEEPMAR_TEST_PYTHONS=$(IFS=: && echo "${pythons[*]}")

shellcheck -x run_all.sh tools/*.sh tests/run.sh .ci/run || exit 1
"${pythons[0]}" -m ruff check --quiet . || exit 1

# The longest files run first. The second Python starts with another file, because only one can make the sample.
long=(tests/test_{run_all,gallery,genuine,kill,card,machine,export,report,rehearse,bench}.py)
mapfile -t files < <(printf '%s\n' "${long[@]}" tests/test_*.py | awk '!seen[$0]++')
# The second Python leaves these out, because nothing in them depends on the stack: the benchmark, a tool for developers; the README;
# and stand-ins of ais_bench, which test_card and test_rates run on both. A genuine ais_bench may depend on it.
once=(tests/test_{bench,readme}.py)
[ -n "${AIS_BENCH-}" ] || once+=(tests/test_genuine.py)
running=()
for python in "${pythons[@]}"; do
    "$python" tests/files.py "${files[@]}" -- "$@" &
    running+=($!)
    mapfile -t files < <(printf '%s\n' "${files[@]:1:6}" "${files[0]}" "${files[@]:7}" | grep -vxFf <(printf '%s\n' "${once[@]}"))
done
failed=
for process in "${running[@]}"; do
    wait "$process" || failed="tests/files.py"
done

touch "$DEEPMAR_TEST_SHARED/done"
failed+=$(grep -v '^0 ' "$DEEPMAR_TEST_SHARED/done" | cut -d' ' -f2-)
[ -s "$DEEPMAR_TEST_SHARED/done" ] || failed="no test was chosen"
if [ $# = 0 ] && [ -z "$failed" ] && [ -n "$python37" ]; then
    echo "=== the two stacks against each other"
    "${pythons[0]}" -m pytest -q -s -p no:cacheprovider tests/stacks.py || failed=tests/stacks.py
fi
[ -n "$python37" ] ||
    echo "NOT RUN: the half on Python 3.7 (the guide's stack): no Python 3.7 on this machine; set PYTHON37 to one"
[ -z "$failed" ] || { echo "tests/run.sh: error: failed: $failed"; exit 1; }
