# Functions of run_all.sh for the toolkit's tools: they find out which tools this machine has, and call them. run_all.sh sources
# this file, which uses its variables and functions.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317
set -euo pipefail

benchmark=$here/benchmark.$(uname -m)
binary=$(basename "$benchmark")
doctor() { "$python" "$here/tools/run/doctor.py" "$@"; } # it reads npu-smi's table and finds CANN's folders
cores() { PYTHONPATH=$here "$python" -c 'from lib.machine import cores; print(cores())'; } # unlike nproc, this respects a CPU quota
has_atc() { command -v atc >/dev/null; }
has_benchmark() { [ -x "$benchmark" ]; }
has_ais_bench() { "$python" "$here/tools/run/ais_bench_files.py" check / 2>/dev/null; }
has_om() { # returns whether there will be an OM for every batch size
    local batch
    runs 3 && has_atc && return
    for batch in $batch_size; do [ -e "$work_dir/deepmar_bs$batch.om" ] || return; done
}

# read_set_env: sources CANN's set_env.sh: the given one or, if atc is not on the PATH, the one found on the machine
read_set_env() {
    if [ -n "$set_env" ]; then
        if [ ! -r "$set_env" ] || [ -d "$set_env" ]; then fail "set_env: $set_env: no such file"; fi
    else
        has_atc || set_env=$(doctor set_env)
        [ -n "$set_env" ] || return 0
    fi
    set +eu # set_env.sh fails with these options
    # shellcheck disable=SC1090
    source "$set_env"
    set -eu
    export PATH
    say "read $set_env"
}

# check_machine: prints what the machine has and lacks for this run. Its status says whether the run could work
check_machine() {
    local asked=$backend name values=()
    [ "$backend" != auto ] || choose_backend
    for name in $names; do values+=("$name=${!name}"); done
    needed_packages
    exec "$python" "$here/tools/run/doctor.py" check "asked_backend=$asked" "packages=${packages[*]}" "${values[@]}"
}

# choose_backend: sets backend to what will run the model, and make_om if atc will make an OM. Stops if a part of a requested
# backend is missing
choose_backend() {
    local why=
    make_om=''
    if runs 3 && has_atc && [ "$backend" != onnxruntime ]; then make_om=yes; fi
    case $backend in
        auto)
            if ! runs 6; then
                : # this run does not run the model
            elif ! has_om; then
                backend=onnxruntime why="no atc and no OM on this machine"
            elif has_benchmark; then
                backend=benchmark why="$binary is beside the scripts"
            elif has_ais_bench; then
                backend=ais_bench why="no $binary beside the scripts, but $python has the package"
            else
                backend=onnxruntime why="no $binary beside the scripts, and $python has no ais_bench.infer with aclruntime"
            fi
            [ -z "$why" ] || say "backend $backend: $why" ;;
        benchmark | ais_bench)
            if [ "$backend" = benchmark ] && ! has_benchmark; then
                [ ! -e "$benchmark" ] || fail "backend benchmark: $benchmark is not executable; run: chmod u+x $benchmark"
                fail "backend benchmark: there is no $benchmark; get it from CANN's benchmark tool, then run:" \
                    "cp $binary $here/ && chmod u+x $benchmark"
            fi
            has_om || fail "backend $backend: no atc and no OM on this machine; put an OM for each batch size, as" \
                "deepmar_bs${batch_size%% *}.om, into $work_dir, or run: bash" \
                "./Ascend-cann-toolkit_VERSION_linux-$(uname -m).run --install" ;;
    esac
    make_twin=''
    case $aipp$backend$make_om in yesonnxruntime* | yesauto) ! runs 3 || make_twin=yes ;; esac
    no_om="there is no atc on this machine; an OM in $work_dir is taken as it is"
    [ "$backend" != onnxruntime ] || no_om="the ONNX model runs on ONNX Runtime"
}

# choose_chip: sets chip_name to the name for atc, and chips to the number of chips on a card. chip_name stays empty if no OM is
# made and the chip is unknown
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
        say "assuming $chips chips $chip_name per card, because there is no npu-smi to count them; --chips sets another number"
}

# new_scratch NAME: makes an empty folder in the work folder for a tool's files. The folder's name holds the devices, so a run
# deletes only what killed runs on its own devices left.
new_scratch() {
    local device
    for device in "${devices[@]}"; do rm -rf ./*.partial*"-$device-"*; done
    scratch=$work_dir/$1.partial-${device_id// /-}-
    mkdir "$scratch"
}

# tool LOG COMMAND ...: runs a tool of the toolkit. Its output goes to the screen and to logs/LOG
tool() {
    local log=$1
    shift
    "$@" 2>&1 | tee "$work_dir/logs/$log" || broken "${log%_bs*} ended with status ${PIPESTATUS[0]}$(explain "$log")" "$log"
}
# explain LOG: prints the meaning of a known failure of atc, as the end of a sentence
explain() {
    local why=
    case $1 in atc_*) why=$(doctor explain "$work_dir/logs/$1" "$chip_name") || why= ;; esac
    [ -z "$why" ] || printf ': %s' "$why"
}
# broken WHAT LOG: stops and prints a tool's [ERROR] lines and its last lines, which alone may only be its usage text
broken() {
    local log=$work_dir/logs/$2 last=10
    if tr '\r' '\n' <"$log" | grep -F '[ERROR]' | sed -n '1,10s/^/    /p' >&2; then last=3; fi
    tr '\r' '\n' <"$log" | tail -n "$last" | grep -vF '[ERROR]' | sed 's/^/    /' >&2 || :
    fail "$1; above are the errors and the last lines of $log"
}
# run_atc: makes the OM of one batch size. atc runs in its own folder, because it also writes a fusion_result.json, which would
# overwrite stage 7's.
run_atc() {
    local insert=()
    [ "$aipp" = no ] || insert=(--insert_op_conf=../aipp.cfg --enable_small_channel=1)
    new_scratch atc
    cd "$scratch"
    tool "atc_bs$batch.log" atc --model="../$nopad" --framework=5 --output="${om%.om}" --input_format=NCHW \
        --input_shape="actual_input_1:$batch,3,$height,$width" --log=error --soc_version="$chip_name" "${insert[@]}"
    [ -e "$om" ] || broken "atc wrote no $om" "atc_bs$batch.log"
    cd "$work_dir"
    mv "$scratch/$om" "$om"
}

# infer: runs one batch size's model over the bins on all devices, in the scratch folder. Stops if the tool wrote fewer results
# than there are images, or no rate. Sets ran to what ran the model.
infer() {
    local device count made=0 wanted log=${backend}_bs${batch}_device${devices[0]}.log
    [ "$backend" != ais_bench ] || log=ais_bench_bs$batch.log
    [ "$backend" != onnxruntime ] || [ ${#devices[@]} = 1 ] ||
        say "these devices are not cards, but ${#devices[@]} processes on ONNX Runtime that share $(cores) cores"
    wanted=$(wc -l <deepmar.info)
    new_scratch "$result" # the tools write into result/ of their current folder and overwrite files there
    [ "$backend" = ais_bench ] || ln -s ../input_bin ../deepmar.info "../$model" "$scratch"
    cd "$scratch"
    if [ "$backend" = ais_bench ]; then
        run_ais_bench
    elif [ ${#devices[@]} -gt 1 ]; then
        run_devices
    elif [ "$backend" = benchmark ]; then
        tool "$log" run_device "$device_id" deepmar.info
    else # without tool, which would send the progress bar to the log
        run_device "$device_id" deepmar.info | tee "$work_dir/logs/$log"
    fi
    for device in "${devices[@]}"; do
        count=$(find "result/dumpOutput_device$device" -name '*_[01].bin' 2>/dev/null | wc -l)
        made=$((made + count))
        [ "$backend" = ais_bench ] || [ -e "result/perf_vision_batchsize_${batch}_device_$device.txt" ] ||
            broken "$backend wrote no result/perf_vision_batchsize_${batch}_device_$device.txt, which holds its rate" "$log"
    done
    [ "$made" = "$wanted" ] || broken "$backend wrote $made results for $wanted images" "$log"
    [ "$pure" = no ] || run_pure
    cd "$work_dir"
    case $backend in
        ais_bench) ran=ais_bench ;;
        benchmark) ran=$binary ;;
        onnxruntime) ran=$(sed -n 's/^\[INFO\] \(ONNX Runtime .*\), .*/\1/p' "logs/$log" | head -n 1) ;;
    esac
}

# collect: replaces the results of an earlier run on these devices by the new ones
collect() {
    local device folder
    mkdir -p "$result"
    for folder in "${folders[@]}"; do record "$folder"; done # an empty record, in case the run is interrupted here
    for device in "${devices[@]}"; do
        rm -rf "$result/dumpOutput_device$device" "$result/dumpOutput_device${device}_summary.json" \
            "$result"/perf_vision_batchsize_*"_device_$device.txt" "$result"/PureInfer_perf_of_*"_in_device_$device"{.txt,_summary.json} \
            "$result/pure_device${device}_summary.json"
    done
    rm -f "$result/fusion_result.json"
    find "$scratch/result" -mindepth 1 -maxdepth 1 -exec mv -t "$result" {} +
    for folder in "${folders[@]}"; do
        record "$folder" info=deepmar.info model="$model" backend="$ran" model_name="$model"
    done
}

# run_device DEVICE [INFO]: runs the model over an info file's bins, or pure inference if there is no INFO. The benchmark binary
# and tools/benchmark.py have the same options. exec replaces the calling subshell, so that its signals reach the tool.
run_device() {
    local command=("$benchmark")
    if [ "$backend" = onnxruntime ]; then
        command=("$python" "$here/tools/benchmark.py" ${provider:+"-provider=$provider"} ${tolerance:+"-tolerance=$tolerance"})
        [ ${#devices[@]} = 1 ] || command+=("-threads=$((threads > 0 ? threads : 1))")
        [ -z "$strict" ] || command+=(-strict)
    fi
    command+=(-batch_size="$batch" -device_id="$1" -om_path="$model")
    [ $# = 2 ] || exec "${command[@]}" -round=20
    exec "${command[@]}" -model_type=vision -input_width="$width" -input_height="$height" -input_text_path="$2" \
        -useDvpp=false -output_binary=true
}

# run_devices: runs the model on all devices at the same time. Each device has its own part of the images and its own info file
run_devices() {
    local count=${#devices[@]} threads index
    [ "$backend" != onnxruntime ] || threads=$(($(cores) / count))
    [ "$(wc -l <deepmar.info)" -ge "$count" ] || fail "$count devices, but fewer images in $work_dir/deepmar.info"
    for index in "${!devices[@]}"; do
        awk -v n="$count" -v k="$index" 'NR % n == (k + 1) % n { sub(/^[0-9]+/, i++ ""); print }' deepmar.info \
            >"deepmar_device${devices[index]}.info"
    done
    on_devices "${backend}_bs$batch" run_part
}
run_part() { run_device "$1" "deepmar_device$1.info"; }

# on_devices LOG COMMAND ...: runs COMMAND ... DEVICE on all devices at the same time. Each writes logs/LOG_deviceD.log
on_devices() {
    local log=$1 device failed='' jobs=()
    shift
    for device in "${devices[@]}"; do
        "$@" "$device" >"$work_dir/logs/${log}_device$device.log" 2>&1 &
        jobs+=($!)
    done
    for device in "${devices[@]}"; do
        wait "${jobs[0]}" || failed=$failed${failed:+ }$device
        jobs=("${jobs[@]:1}")
    done
    [ -z "$failed" ] || broken "$backend failed on device $failed" "${log}_device${failed%% *}.log"
}

# run_pure: runs pure inference, which needs no images, on all devices at the same time
run_pure() {
    local device left threads
    say "pure inference"
    [ "$backend" != onnxruntime ] || threads=$(($(cores) / ${#devices[@]}))
    on_devices "pure_${backend}_bs$batch" pure_device
    for device in "${devices[@]}"; do
        left=$(find result -name "PureInfer_perf_of_*_in_device_$device.txt" -o -name "pure_device${device}_summary.json")
        [ -n "$left" ] || broken "$backend wrote no rate of pure inference" "pure_${backend}_bs${batch}_device$device.log"
        rm -rf "result/pure_device$device" # the outputs for empty input
    done
}
pure_device() {
    [ "$backend" = ais_bench ] || run_device "$1"
    exec "$requested" -m ais_bench --model "$model" --output result --output_dirname "pure_device$1" --outfmt BIN \
        --batchsize "$batch" --device "$1" --loop 20
}

# check_ais_bench: if ais_bench will run, stops if it does not start or would refuse the files. Sets ais_bench_help.
check_ais_bench() {
    local paths=() batch
    if [ "$backend" != ais_bench ] || ! runs 6; then return 0; fi
    [[ $python != */* ]] || python=$(realpath -s -- "$python") # it will be called from other folders
    runs 4 || paths+=("$work_dir/input_bin")
    for batch in $batch_size; do [ -n "$make_om" ] || paths+=("$work_dir/deepmar_bs$batch.om"); done
    "$python" "$here/tools/run/ais_bench_files.py" check "$work_dir" "${paths[@]}" || exit 1
    ais_bench_help=$(cd / && "$python" -m ais_bench --help 2>&1) ||
        fail "backend ais_bench: $python -m ais_bench --help ends with: ${ais_bench_help##*$'\n'}; install what is missing; if that" \
            "is a library, source CANN's set_env.sh"
}

# run_ais_bench: runs ais_bench, which itself divides the images among several devices
run_ais_bench() {
    local folder=dumpOutput_device$device_id divide=() taken
    if [ ${#devices[@]} -gt 1 ]; then
        [ "$wanted" -ge ${#devices[@]} ] || fail "${#devices[@]} devices, but fewer images in $work_dir/deepmar.info"
        folder=devices
        # without this option, versions since 2024 give each device all images
        [[ $ais_bench_help != *--divide_input* ]] || divide=(--divide_input 1)
    fi
    "$python" "$here/tools/run/ais_bench_files.py" give ../input_bin "../$model"
    tool "$log" "$requested" -m ais_bench --model "$model" --input input_bin --output result --output_dirname "$folder" \
        --outfmt BIN --batchsize "$batch" --device "${device_id// /,}" "${divide[@]}"
    ! grep -qF '[ERROR]' "$work_dir/logs/$log" || broken "ais_bench reports an error" "$log"
    taken=$(sed -n 's/.*filesperbatch:\([0-9]*\) .*/\1/p' "$work_dir/logs/$log" | sort -u)
    [ -z "$taken" ] || [ "$taken" = "$batch" ] || # ais_bench does not compare them, but computes its throughput from --batchsize
        broken "$model takes $taken images at a time, not $batch; put the right OM there, or run stage 3" "$log"
    "$python" "$here/tools/run/ais_bench_files.py" collect ../input_bin "${devices[@]}"
}
