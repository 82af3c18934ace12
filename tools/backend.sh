# What run_all.sh needs of the toolkit's tools: which of them this machine has, and how each is called. Sourced by it; uses its
# variables and its say, fail, runs.
# shellcheck shell=bash disable=SC2154

benchmark=$here/benchmark.$(uname -m)
binary=$(basename "$benchmark")
command -v "$python" >/dev/null || fail "$python: no such Python; set python to one"
doctor() { "$python" "$here/tools/doctor.py" "$@"; } # it understands npu-smi's table and CANN's folders
has_atc() { command -v atc >/dev/null; }
has_benchmark() { [ -x "$benchmark" ]; }
has_ais_bench() { "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("ais_bench"))' 2>/dev/null; }
has_om() { # whether there will be an OM for every batch size
    local size
    runs 3 && has_atc && return
    for size in $batch_size; do [ -e "$work_dir/deepmar_bs$size.om" ] || return; done
}

# read_set_env: reads CANN's set_env.sh, the one that was asked for, or the machine's where atc is not on the PATH
read_set_env() {
    if [ -n "$set_env" ]; then
        if [ ! -r "$set_env" ] || [ -d "$set_env" ]; then fail "set_env: $set_env: no such file"; fi
    else
        has_atc || set_env=$(doctor set_env)
        [ -n "$set_env" ] || return 0
    fi
    set +eu # it is not written for them
    # shellcheck disable=SC1090
    source "$set_env"
    set -eu
    export PATH
    say "read $set_env"
}

# check_machine: tells what the machine has and lacks for these variables; its status says whether the backend could run
check_machine() {
    local asked=$backend name values=()
    [ "$backend" != auto ] || choose_backend
    for name in $names; do values+=("$name=${!name}"); done
    exec "$python" "$here/tools/doctor.py" check "asked_backend=$asked" "${values[@]}"
}

# choose_backend: sets backend to what will run the model, and make_om where atc is to make an OM; stops where a piece of a
# backend that was asked for is missing
choose_backend() {
    local why=
    make_om=
    if runs 3 && has_atc && [ "$backend" != onnxruntime ]; then make_om=yes; fi
    case $backend in
        auto)
            if ! runs 6; then
                : # nothing will run it
            elif ! has_om; then
                backend=onnxruntime why="no atc and no OM on this machine"
            elif has_benchmark; then
                backend=benchmark why="$binary lies beside the scripts"
            elif has_ais_bench; then
                backend=ais_bench why="no $binary beside the scripts, but $python has the package"
            else
                backend=onnxruntime why="no $binary beside the scripts, and $python has no ais_bench"
            fi
            [ -z "$why" ] || say "backend $backend: $why" ;;
        benchmark | ais_bench)
            if [ "$backend" = ais_bench ]; then
                has_ais_bench || fail "backend ais_bench: $python has no such package; run: $python -m pip install" \
                    "aclruntime-VERSION-linux_$(uname -m).whl ais_bench-VERSION-py3-none-any.whl"
            elif [ -e "$benchmark" ]; then
                has_benchmark || fail "backend benchmark: $benchmark is not executable; run: chmod u+x $benchmark"
            else
                fail "backend benchmark: there is no $benchmark; take it from CANN's benchmark tool, then run:" \
                    "cp $binary $here/ && chmod u+x $benchmark"
            fi
            has_om || fail "backend $backend: no atc and no OM on this machine; put an OM for each batch size, as" \
                "deepmar_bs${batch_size%% *}.om, into $work_dir, or run: bash" \
                "./Ascend-cann-toolkit_VERSION_linux-$(uname -m).run --install" ;;
    esac
}

# choose_chip: sets chip_name as atc takes it, empty where no OM is made and nothing names it, and chips, those of a card
choose_chip() {
    local asked=$chip_name found
    if command -v npu-smi >/dev/null && { [ -n "$make_om" ] || [ "$backend" != onnxruntime ]; }; then
        if found=$(doctor chip "$chip_name" "${devices[0]}" 2>&1); then
            read -r chip_name found <<<"$found"
            [ -n "$asked" ] || say "npu-smi info names the chip $chip_name"
            [ "$found" = 0 ] || chips=${chips:-$found}
        else
            [ -z "$make_om" ] || fail "${found#doctor.py: error: }"
            say "${found#doctor.py: error: }"
        fi
    fi
    [ -z "$make_om" ] || [ -n "$chip_name" ] ||
        fail "chip_name is empty, and there is no npu-smi to ask: set it, as in --chip-name 310P3, or --backend onnxruntime for" \
            "no OM"
    chip_name=${chip_name:+Ascend${chip_name#Ascend}}
    [ -z "$chips" ] || return 0
    case $chip_name in '') chips=0 ;; Ascend310) chips=4 ;; *) chips=1 ;; esac
    [ "$chips" = 0 ] || [ "$backend" = onnxruntime ] || ! runs 7 ||
        say "a card is taken to have $chips of the chip $chip_name, as no npu-smi counts them; --chips tells another number"
}

# new_scratch NAME: an empty folder in the work folder, for a tool to leave its files in. Its name has the devices, so that
# what a killed run with one of them left is cleared away, and no other run's.
new_scratch() {
    local device
    for device in "${devices[@]}"; do rm -rf ./*.partial*"-$device-"*; done
    scratch=$work_dir/$1.partial-${device_id// /-}-
    mkdir "$scratch"
}

# tool LOG COMMAND ...: runs a tool of the toolkit, whose output goes to the screen and to logs/LOG
tool() {
    local log=$1
    shift
    "$@" 2>&1 | tee "$work_dir/logs/$log" || broken "${log%_bs*} ended with status ${PIPESTATUS[0]}$(explain "$log")" "$log"
}
# explain LOG: prints what a known failure of atc means, for the end of a sentence
explain() {
    local why=
    case $1 in atc_*) why=$(doctor explain "$work_dir/logs/$1" "$chip_name") || why= ;; esac
    [ -z "$why" ] || printf ': %s' "$why"
}
# broken WHAT LOG: stops with a tool's last words
broken() {
    tail -n 10 "$work_dir/logs/$2" | sed 's/^/    /' >&2
    fail "$1; above are the last lines of $work_dir/logs/$2"
}
# run_device DEVICE INFO: runs the model over an info file's bins; the binary and its stand-in have the same options.
# Takes the place of the subshell that it is called in, so that a signal to this one reaches the tool.
run_device() {
    local command=("$benchmark")
    if [ "$backend" = onnxruntime ]; then
        command=("$python" "$here/tools/benchmark.py")
        [ ${#devices[@]} = 1 ] || command+=("-threads=$((threads > 0 ? threads : 1))")
        [ -z "$strict" ] || command+=(-strict)
    fi
    exec "${command[@]}" -model_type=vision -batch_size="$size" -device_id="$1" -om_path="$model" -input_width=224 \
        -input_height=224 -input_text_path="$2" -useDvpp=false -output_binary=true
}

# run_devices: the same on all devices at the same time, each with its part of the images and an info file of its own
run_devices() {
    local count=${#devices[@]} threads=$(($(nproc) / ${#devices[@]})) index device failed='' jobs=()
    [ "$(wc -l <deepmar.info)" -ge "$count" ] || fail "$count devices, but fewer images in $work_dir/deepmar.info"
    for index in "${!devices[@]}"; do
        device=${devices[index]}
        awk -v n="$count" -v k="$index" 'NR % n == (k + 1) % n { sub(/^[0-9]+/, i++ ""); print }' deepmar.info \
            >"deepmar_device$device.info"
        run_device "$device" "deepmar_device$device.info" >"$work_dir/logs/${backend}_bs${size}_device$device.log" 2>&1 &
        jobs+=($!)
    done
    for index in "${!devices[@]}"; do
        wait "${jobs[index]}" || failed=$failed${failed:+ }${devices[index]}
    done
    [ -z "$failed" ] || broken "$backend failed on device $failed" "${backend}_bs${size}_device${failed%% *}.log"
}

# run_ais_bench: it splits the images over several devices by itself and leaves a subfolder device<D> for each
run_ais_bench() {
    local log=ais_bench_bs$size.log folder=dumpOutput_device${device_id// /_} device from
    mkdir result
    tool "$log" "$requested" -m ais_bench --model "$model" --input input_bin --output result --output_dirname "$folder" \
        --outfmt BIN --batchsize "$size" --device "${device_id// /,}"
    ! grep -q '\[ERROR\]' "$work_dir/logs/$log" || broken "ais_bench reports an error" "$log"
    [ ${#devices[@]} = 1 ] && return
    for device in "${devices[@]}"; do
        # some versions number the processes too: device0_0
        for from in "result/$folder/device$device" "result/$folder/device$device"_*[0-9]; do
            [ ! -d "$from" ] || mv -T "$from" "result/part$device"
        done
    done
    mv "result/$folder" "result/whole"
    for device in "${devices[@]}"; do mv "result/part$device" "result/dumpOutput_device$device"; done
}
