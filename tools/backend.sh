# What run_all.sh needs of the toolkit's tools: which of them this machine has, and how each is called. Sourced by it; uses its
# variables and functions.
# shellcheck shell=bash disable=SC2034,SC2154
set -euo pipefail

benchmark=$here/benchmark.$(uname -m)
binary=$(basename "$benchmark")
has_atc() { command -v atc >/dev/null; }
has_benchmark() { [ -x "$benchmark" ]; }
has_ais_bench() { "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("ais_bench"))' 2>/dev/null; }
has_om() { # whether there will be an OM for every batch size
    local batch
    runs 3 && has_atc && return
    for batch in $batch_size; do [ -e "$work_dir/deepmar_bs$batch.om" ] || return; done
}

# read_set_env: the toolkit's settings, where atc is not on the PATH yet
read_set_env() {
    if ! has_atc && [ -f "$set_env" ]; then
        set +eu # the toolkit's script is not written for them
        # shellcheck disable=SC1090
        source "$set_env"
        set -eu
        say "read $set_env"
    fi
    export PATH
}

# choose_backend: sets backend to what will run the model, and make_om where atc is to make an OM; stops where a piece of a
# backend that was asked for is missing
choose_backend() {
    local why=
    make_om=''
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
            has_om || fail "backend $backend: no atc and no OM on this machine; run: source $set_env, after installing the" \
                "CANN toolkit (./Ascend-cann-toolkit_VERSION_linux-$(uname -m).run --install)" ;;
    esac
    make_twin=''
    case $aipp$backend$make_om in yesonnxruntime* | yesauto) ! runs 3 || make_twin=yes ;; esac
    no_om="there is no atc on this machine; an OM in $work_dir is taken as it is"
    [ "$backend" != onnxruntime ] || no_om="the ONNX model runs on ONNX Runtime"
}

# choose_chip: sets chip_name as atc takes it; empty where no OM is made and nothing names it
choose_chip() {
    if [ -z "$chip_name" ] && command -v npu-smi >/dev/null; then
        # its table has a line "| 0       310P3     | OK  ..." for each chip
        chip_name=$(npu-smi info | sed -nE 's/^\| *[0-9]+ +((Ascend)?[0-9]{3}[A-Za-z0-9]*) +\| *[A-Z].*/\1/p' | sort -u) ||
            fail "npu-smi info failed; run it by hand, or set chip_name"
        [ -n "$chip_name" ] || fail "npu-smi info names no chip; run it by hand, or set chip_name"
        [[ $chip_name != *$'\n'* ]] || fail "npu-smi info names several chips, ${chip_name//$'\n'/ and }; set chip_name to one of them"
        say "npu-smi info names the chip $chip_name"
    fi
    [ -z "$make_om" ] || [ -n "$chip_name" ] ||
        fail "chip_name is empty, and there is no npu-smi to ask: set it, as in --chip-name 310P3, or --backend onnxruntime for no OM"
    chip_name=${chip_name:+Ascend${chip_name#Ascend}}
    case $chip_name in '') chips=0 ;; Ascend310) chips=4 ;; *) chips=1 ;; esac
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
    "$@" 2>&1 | tee "$work_dir/logs/$log" || broken "${log%_bs*} ended with status ${PIPESTATUS[0]}" "$log"
}
# broken WHAT LOG: stops with a tool's last words
broken() {
    tail -n 10 "$work_dir/logs/$2" | sed 's/^/    /' >&2
    fail "$1; above are the last lines of $work_dir/logs/$2"
}
# run_atc: makes the OM of one batch size. In a folder of its own, as atc also leaves a fusion_result.json, which is not that of
# stage 7.
run_atc() {
    local insert=()
    [ "$aipp" = no ] || insert=(--insert_op_conf=../aipp.cfg --enable_small_channel=1)
    new_scratch atc
    cd "$scratch"
    tool "atc_bs$batch.log" atc --model="../$nopad" --framework=5 --output="${om%.om}" --input_format=NCHW \
        --input_shape="actual_input_1:$batch,3,$height,$width" --log=error --soc_version="$chip_name" "${insert[@]}"
    [ -e "$om" ] || broken "atc left no $om" "atc_bs$batch.log"
    cd "$work_dir"
    mv "$scratch/$om" "$om"
}

# infer: runs one batch size's model over the bins, on all devices, in the scratch folder. Stops where the tool left fewer
# results than there are images, or no rate. Sets ran, what ran the model.
infer() {
    local device count made=0 wanted log=${backend}_bs${batch}_device${devices[0]}.log
    [ "$backend" != ais_bench ] || log=ais_bench_bs$batch.log
    [ "$backend" != onnxruntime ] || [ ${#devices[@]} = 1 ] ||
        say "these devices are not cards: ${#devices[@]} processes on ONNX Runtime share this machine's $(nproc) cores"
    wanted=$(wc -l <deepmar.info)
    new_scratch "$result" # the tools write into result/ of the folder that they run in, over what is there
    ln -s ../input_bin ../deepmar.info "../$model" "$scratch"
    cd "$scratch"
    if [ "$backend" = ais_bench ]; then
        run_ais_bench
        cp "$work_dir/logs/$log" "result/ais_bench_batchsize_${batch}_device_${device_id// /_}.log"
    elif [ ${#devices[@]} -gt 1 ]; then
        run_devices
    elif [ "$backend" = benchmark ]; then
        tool "$log" run_device "$device_id" deepmar.info
    else # its progress bar goes to the terminal
        run_device "$device_id" deepmar.info | tee "$work_dir/logs/$log"
    fi
    for device in "${devices[@]}"; do
        count=$(find "result/dumpOutput_device$device" -name '*_[01].bin' 2>/dev/null | wc -l)
        made=$((made + count))
        [ "$backend" = ais_bench ] || [ -e "result/perf_vision_batchsize_${batch}_device_$device.txt" ] ||
            broken "$backend left no result/perf_vision_batchsize_${batch}_device_$device.txt, which holds its rate" "$log"
    done
    [ "$made" = "$wanted" ] || broken "$backend left $made results for $wanted images" "$log"
    cd "$work_dir"
    case $backend in
        ais_bench) ran=ais_bench ;;
        benchmark) ran=$binary ;;
        onnxruntime) ran=$(sed -n 's/^\[INFO\] \(ONNX Runtime .*\), .*/\1/p' "logs/$log" | head -n 1) ;;
    esac
}

# collect: puts what the tool left into the place of all that an earlier run on these devices left
collect() {
    local device folder
    mkdir -p "$result"
    for folder in "${folders[@]}"; do record "$folder"; done # of nothing, should this be interrupted here
    for device in "${devices[@]}"; do
        rm -rf "$result/dumpOutput_device$device" "$result"/perf_vision_batchsize_*"_device_$device.txt"
    done
    rm -f "$result"/dumpOutput_device*_summary.json "$result"/ais_bench_batchsize_*.log "$result/fusion_result.json"
    find "$scratch/result" -mindepth 1 -maxdepth 1 -exec mv -t "$result" {} +
    for folder in "${folders[@]}"; do
        record "$folder" info=deepmar.info model="$model" backend="$ran" model_name="$model"
    done
}

# run_device DEVICE INFO: runs the model over an info file's bins; the binary and its stand-in have the same options.
# Takes the place of the subshell that it is called in, so that a signal to this one reaches the tool.
run_device() {
    local command=("$benchmark")
    if [ "$backend" = onnxruntime ]; then
        command=("$python" "$here/tools/benchmark.py")
        [ ${#devices[@]} = 1 ] || command+=("-threads=$((threads > 0 ? threads : 1))")
    fi
    exec "${command[@]}" -model_type=vision -batch_size="$batch" -device_id="$1" -om_path="$model" -input_width="$width" \
        -input_height="$height" -input_text_path="$2" -useDvpp=false -output_binary=true
}

# run_devices: the same on all devices at the same time, each with its part of the images and an info file of its own
run_devices() {
    local count=${#devices[@]} threads=$(($(nproc) / ${#devices[@]})) index device failed='' jobs=()
    [ "$(wc -l <deepmar.info)" -ge "$count" ] || fail "$count devices, but fewer images in $work_dir/deepmar.info"
    for index in "${!devices[@]}"; do
        device=${devices[index]}
        awk -v n="$count" -v k="$index" 'NR % n == (k + 1) % n { sub(/^[0-9]+/, i++ ""); print }' deepmar.info \
            >"deepmar_device$device.info"
        run_device "$device" "deepmar_device$device.info" >"$work_dir/logs/${backend}_bs${batch}_device$device.log" 2>&1 &
        jobs+=($!)
    done
    for index in "${!devices[@]}"; do
        wait "${jobs[index]}" || failed=$failed${failed:+ }${devices[index]}
    done
    [ -z "$failed" ] || broken "$backend failed on device $failed" "${backend}_bs${batch}_device${failed%% *}.log"
}

# run_ais_bench: it splits the images over several devices by itself and leaves a subfolder device<D> for each
run_ais_bench() {
    local log=ais_bench_bs$batch.log folder=dumpOutput_device${device_id// /_} device from
    mkdir result
    tool "$log" "$requested" -m ais_bench --model "$model" --input input_bin --output result --output_dirname "$folder" \
        --outfmt BIN --batchsize "$batch" --device "${device_id// /,}"
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
