# What run_all.sh needs of the toolkit's tools: which of them this machine has, and how each is called. Sourced by it; uses its
# variables and functions.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317
set -euo pipefail

benchmark=$here/benchmark.$(uname -m)
binary=$(basename "$benchmark")
doctor() { "$python" "$here/tools/doctor.py" "$@"; } # it understands npu-smi's table and CANN's folders
cores() { PYTHONPATH=$here/tools "$python" -c 'import common; print(common.cores())'; } # fewer than nproc's under a CPU quota
has_atc() { command -v atc >/dev/null; }
has_benchmark() { [ -x "$benchmark" ]; }
has_ais_bench() { "$python" "$here/tools/ais_bench_files.py" check / 2>/dev/null; }
has_om() { # whether there will be an OM for every batch size
    local batch
    runs 3 && has_atc && return
    for batch in $batch_size; do [ -e "$work_dir/deepmar_bs$batch.om" ] || return; done
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
    needed_packages
    exec "$python" "$here/tools/doctor.py" check "asked_backend=$asked" "packages=${packages[*]}" "${values[@]}"
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
                backend=onnxruntime why="no $binary beside the scripts, and $python has no ais_bench.infer with aclruntime"
            fi
            [ -z "$why" ] || say "backend $backend: $why" ;;
        benchmark | ais_bench)
            if [ "$backend" = benchmark ] && ! has_benchmark; then
                [ ! -e "$benchmark" ] || fail "backend benchmark: $benchmark is not executable; run: chmod u+x $benchmark"
                fail "backend benchmark: there is no $benchmark; take it from CANN's benchmark tool, then run:" \
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
# broken WHAT LOG: stops with a tool's errors, where it marks them, as its last words may be those of its usage text
broken() {
    local log=$work_dir/logs/$2 last=10
    if tr '\r' '\n' <"$log" | grep -F '[ERROR]' | sed -n '1,10s/^/    /p' >&2; then last=3; fi
    tr '\r' '\n' <"$log" | tail -n "$last" | grep -vF '[ERROR]' | sed 's/^/    /' >&2 || :
    fail "$1; above are the errors and the last lines of $log"
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
        say "these devices are not cards: ${#devices[@]} processes on ONNX Runtime share $(cores) cores"
    wanted=$(wc -l <deepmar.info)
    new_scratch "$result" # the tools write into result/ of the folder that they run in, over what is there
    [ "$backend" = ais_bench ] || ln -s ../input_bin ../deepmar.info "../$model" "$scratch"
    cd "$scratch"
    if [ "$backend" = ais_bench ]; then
        run_ais_bench
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
    [ "$pure" = no ] || run_pure
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

# run_device DEVICE [INFO]: runs the model over an info file's bins, without one pure inference; the binary and its stand-in have
# the same options. Takes the place of the subshell that it is called in, so that a signal to this one reaches the tool.
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

# run_devices: the same on all devices, each with its part of the images and an info file of its own
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

# on_devices LOG COMMAND ...: runs COMMAND ... DEVICE on all devices at the same time, with logs/LOG_deviceD.log each
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

# run_pure: pure inference, which has no images; on all devices at the same time
run_pure() {
    local device left threads
    say "pure inference"
    [ "$backend" != onnxruntime ] || threads=$(($(cores) / ${#devices[@]}))
    on_devices "pure_${backend}_bs$batch" pure_device
    for device in "${devices[@]}"; do
        left=$(find result -name "PureInfer_perf_of_*_in_device_$device.txt" -o -name "pure_device${device}_summary.json")
        [ -n "$left" ] || broken "$backend left no rate of pure inference" "pure_${backend}_bs${batch}_device$device.log"
        rm -rf "result/pure_device$device" # what the model makes of nothing
    done
}
pure_device() {
    [ "$backend" = ais_bench ] || run_device "$1"
    exec "$requested" -m ais_bench --model "$model" --output result --output_dirname "pure_device$1" --outfmt BIN \
        --batchsize "$batch" --device "$1" --loop 20
}

# check_ais_bench: where ais_bench is to run, stops if it does not start, or would refuse what is there. Sets ais_bench_help.
check_ais_bench() {
    local paths=() batch
    if [ "$backend" != ais_bench ] || ! runs 6; then return 0; fi
    [[ $python != */* ]] || python=$(realpath -s -- "$python") # it is called in other folders
    runs 4 || paths+=("$work_dir/input_bin")
    for batch in $batch_size; do [ -n "$make_om" ] || paths+=("$work_dir/deepmar_bs$batch.om"); done
    "$python" "$here/tools/ais_bench_files.py" check "$work_dir" "${paths[@]}" || exit 1
    ais_bench_help=$(cd / && "$python" -m ais_bench --help 2>&1) ||
        fail "backend ais_bench: $python -m ais_bench --help ends with: ${ais_bench_help##*$'\n'}; install what is missing, or" \
            "source CANN's set_env.sh where that is a library"
}

# run_ais_bench: it shares the images among several devices by itself
run_ais_bench() {
    local folder=dumpOutput_device$device_id divide=() taken
    if [ ${#devices[@]} -gt 1 ]; then
        [ "$wanted" -ge ${#devices[@]} ] || fail "${#devices[@]} devices, but fewer images in $work_dir/deepmar.info"
        folder=devices
        # without it, versions since 2024 give each device all images
        [[ $ais_bench_help != *--divide_input* ]] || divide=(--divide_input 1)
    fi
    "$python" "$here/tools/ais_bench_files.py" give ../input_bin "../$model"
    tool "$log" "$requested" -m ais_bench --model "$model" --input input_bin --output result --output_dirname "$folder" \
        --outfmt BIN --batchsize "$batch" --device "${device_id// /,}" "${divide[@]}"
    ! grep -qF '[ERROR]' "$work_dir/logs/$log" || broken "ais_bench reports an error" "$log"
    taken=$(sed -n 's/.*filesperbatch:\([0-9]*\) .*/\1/p' "$work_dir/logs/$log" | sort -u)
    [ -z "$taken" ] || [ "$taken" = "$batch" ] || # it does not compare them, but computes its throughput with --batchsize
        broken "$model takes $taken images at a time, not $batch; put another there, or run stage 3" "$log"
    "$python" "$here/tools/ais_bench_files.py" collect ../input_bin "${devices[@]}"
}
