# What run_all.sh does with the toolkit's tools: it finds out which ones this machine has, calls them and checks their output.
# tools/run/driver.sh sources this file, which uses run_all.sh's variables.
# shellcheck shell=bash disable=SC1090,SC2034,SC2154,SC2317

benchmark=$here/benchmark.$(uname -m)
make_om='' amct='' make_twin='' calibrate=''
doctor() { "$python" "$here/tools/run/doctor.py" "$@"; } # it reads npu-smi's table and finds CANN's folders
ais_bench_files() { "$python" "$here/tools/run/ais_bench_files.py" "$@"; }
cores() { PYTHONPATH=$here "$python" -c 'from lib.machine import cores; print(cores())'; } # unlike nproc, this respects a CPU quota
has_atc() { command -v atc >/dev/null; }
has_om() { # returns whether there will be an OM for every batch size
    local batch && runs 3 && has_atc && return
    for batch in $batch_size; do [ -e "$work_dir/deepmar_bs$batch.om" ] || return; done
}

# read_set_env: sources CANN's set_env.sh: the given one or, if atc is not on the PATH, the one found on the machine
read_set_env() {
    [ -n "$set_env" ] || has_atc || set_env=$(doctor set_env)
    [ -n "$set_env" ] || return 0
    if [ ! -r "$set_env" ] || [ -d "$set_env" ]; then fail "set_env: $set_env: no such file"; fi
    set +eu # set_env.sh fails with these options
    source "$set_env"
    set -eu
    say "read $set_env"
}

# check_machine: prints what the machine has and lacks for this run. Its status says whether the run could work
check_machine() {
    local asked=$backend name values=()
    [ "$backend" != auto ] || choose_backend
    for name in $options; do values+=("$name=${!name}"); done
    exec "$python" "$here/tools/run/doctor.py" check "asked_backend=$asked" "packages=$(needed_packages)" "${values[@]}"
}

# choose_backend: sets backend to what will run the model, and what stage 3 makes: make_om, amct, make_twin, calibrate. Stops if a
# part of a requested backend is missing
choose_backend() {
    local why='' binary=${benchmark##*/}
    if runs 3 && has_atc && [ "$backend" != onnxruntime ]; then make_om=yes; fi
    if [ "$backend" = auto ] && runs 6; then
        backend=onnxruntime why="no $binary beside the scripts, and $python has no ais_bench.infer with aclruntime that works"
        if ! has_om; then
            why="no atc and no OM on this machine"
        elif [ -x "$benchmark" ]; then
            backend=benchmark why="$binary is beside the scripts"
        elif ais_bench_files check / >/dev/null 2>&1; then
            backend=ais_bench why="no $binary beside the scripts, but $python has the package"
        fi
        say "backend $backend: $why"
    elif [ "$backend" = benchmark ] && [ ! -x "$benchmark" ]; then
        [ ! -e "$benchmark" ] || fail "backend benchmark: $benchmark is not executable; run: chmod u+x $benchmark"
        fail "backend benchmark: there is no $benchmark; get it from CANN's benchmark tool, then run:" \
            "cp $binary $here/ && chmod u+x $benchmark"
    fi
    case $backend in benchmark | ais_bench)
        has_om || fail "backend $backend: no atc and no OM on this machine; put an OM for each batch size, as" \
            "deepmar_bs${batch_size%% *}.om, into $work_dir, or run: bash" \
            "./Ascend-cann-toolkit_VERSION_linux-$(uname -m).run --install" ;;
    esac
    case $int8$aipp$backend$make_om in nono*) ;; *onnxruntime* | *auto) ! runs 3 || make_twin=yes ;; esac
    if [ "$int8" = yes ]; then
        [ -n "$card_model" ] || amct=$make_om
        calibrate=${amct:-$make_twin}
    fi
    runtime_options=(${provider:+"-provider=$provider"} ${tolerance:+"-tolerance=$tolerance"} ${strict:+-strict})
    if [ "$backend" = onnxruntime ] && [ ${#devices[@]} -gt 1 ]; then
        say "these devices are not cards, but ${#devices[@]} processes on ONNX Runtime that share $(cores) cores"
        runtime_options+=("-threads=$(($(cores) > ${#devices[@]} ? $(cores) / ${#devices[@]} : 1))")
    fi
}

# check_stage_3: says if stage 3 makes no OM. Stops if it lacks what INT8 needs
check_stage_3() {
    [ -n "$make_om" ] || ! runs 3 ||
        say "no OM is made: $(has_atc && echo "backend onnxruntime needs none" || echo "there is no atc on this machine")"
    if [ -n "$card_model" ] && runs 3 && [ -z "$make_om" ]; then
        has_atc && usage "card_model is for atc, but backend onnxruntime makes no OM"
        fail "card_model: there is no atc on this machine to make an OM of it; leave card_model out to run a model with the same" \
            "arithmetic on ONNX Runtime"
    fi
    if [ -n "$amct" ] && ! command -v amct_onnx >/dev/null; then
        fail "int8: there is atc, but no amct_onnx on the PATH, which makes INT8 models for it; run: $(doctor amct); or give" \
            "--card-model NAME_deploy_model.onnx, made elsewhere, or --backend onnxruntime for a rehearsal without an OM"
    fi
    if [ -n "$calibrate" ] && [ -z "$sample" ]; then
        calibration_images=${calibration_images:-$images}
        [ -n "$calibration_list" ] || usage "calibration_list is not set, and INT8 needs a list of training or validation images"
        [ -n "$calibration_images" ] || usage "calibration_images is not set, and INT8 needs the folder of these images"
    fi
}

# choose_chip: sets chip_name to the name for atc, and chips to the number of chips on a card
choose_chip() {
    local found count=0 note
    if [ -n "$make_om" ] || [ "$backend" != onnxruntime ]; then
        found=$(set +x && doctor chip "$chip_name" "$chips" "${devices[0]}" "$make_om" 2>&1) || fail "${found#doctor.py: error: }"
        read -r chip_name count note <<<"$found"
        [ -z "$note" ] || say "$note"
    fi
    chips=${chips:-$count}
}

# check_oms BATCH_SIZES: stops if an OM says that it is for another chip, batch size, size or kind of bins than the run's
check_oms() {
    local bins=$aipp
    if [ "$backend" = onnxruntime ] || ! runs 6; then return 0; fi
    runs 4 || bins=$work_dir/input_bin
    doctor om "$work_dir" "$1" "$size" "$bins" "$device_id" || exit 1
}

# check_ais_bench: if ais_bench will run, stops if it does not start or would refuse the files. Sets how it divides the images
check_ais_bench() {
    local files=() batch
    if [ "$backend" != ais_bench ] || ! runs 6; then return 0; fi
    [[ $python != */* ]] || python=$(realpath -s -- "$python") # it will be called from other folders
    runs 4 || files+=("$work_dir/input_bin")
    for batch in $batch_size; do [ -n "$make_om" ] || files+=("$work_dir/deepmar_bs$batch.om"); done
    ais_bench_files check "$work_dir" "${files[@]}" || exit 1
    ais_bench_folder=dumpOutput_device$device_id divide_input=$(ais_bench_files options) || exit 1
    if [ ${#devices[@]} -gt 1 ]; then ais_bench_folder=devices; else divide_input=; fi
}

# tool LOG COMMAND ...: runs a tool of the toolkit. Its output goes to the screen and to logs/LOG.log
tool() {
    say "${*:2}"
    "${@:2}" 2>&1 | tee "$work_dir/logs/$1.log" || broken "${1%_bs*} ended with status ${PIPESTATUS[0]}" "$1"
}
# broken WHAT LOG: stops. Prints a tool's [ERROR] lines and its last lines, which alone may only be its usage text
broken() {
    local log=$work_dir/logs/$2.log last=10 why
    why=$(doctor explain "$log" "$chip_name") || why=''
    if tr '\r' '\n' <"$log" | grep -F '[ERROR]' | sed -n '1,10s/^/    /p' >&2; then last=3; fi
    tr '\r' '\n' <"$log" | tail -n "$last" | grep -vF '[ERROR]' | sed 's/^/    /' >&2 || :
    fail "$1${why:+: $why}; above are the errors and the last lines of $log"
}
# keep TOOL FILE: moves what atc or amct_onnx has made from the scratch folder into the work folder, and goes there
keep() {
    [ -e "$2" ] || broken "$1 wrote no $2" "$1_bs$batch"
    mv "$2" "$work_dir/"
    cd "$work_dir"
    [ "$1" != atc ] || check_oms "$batch"
}

# announce: says what stage 6 runs. Stops if there are fewer images than devices
announce() {
    local count
    count=$(wc -l <deepmar.info)
    say "batch size $batch: $model, $count images -> $result"
    [ "$count" -ge ${#devices[@]} ] || fail "${#devices[@]} devices, but fewer images in $work_dir/deepmar.info"
}

# info_of DEVICE: prints the name of a device's info file. If there are several devices, each has its own part of the images
info_of() {
    [ ${#devices[@]} -gt 1 ] || { echo deepmar.info && return; }
    awk -v devices="$device_id" -v device="$1" '{ n = split(devices, all) }
        all[(NR - 1) % n + 1] == device { sub(/^[0-9]+/, i++ ""); print }' deepmar.info >"deepmar_device$1.info"
    echo "deepmar_device$1.info"
}

# on_device LOG COMMAND ...: runs a command for one device. Pure inference and several devices run in the background
declare -A running=()
on_device() {
    if [ ${#devices[@]} -gt 1 ] || [[ $1 = pure_* ]]; then
        say "${*:2}"
        "${@:2}" >"$work_dir/logs/$1.log" 2>&1 &
        running[$1]=$!
    elif [ "$backend" = onnxruntime ]; then
        "${@:2}" | tee "$work_dir/logs/$1.log" # without tool, which would send the progress bar to the log
    else
        tool "$@"
    fi
}
# all_devices: waits for the commands in the background
all_devices() {
    local log failed=()
    for log in "${!running[@]}"; do wait "${running[$log]}" || failed+=("$log"); done
    running=()
    [ ${#failed[@]} = 0 ] || broken "$backend failed on device ${failed[*]##*_device}" "${failed[0]}"
}

# pure_inference: runs the model without images, on all devices at the same time
pure_inference() {
    local device log
    say "pure inference"
    for device in "${devices[@]}"; do
        log=pure_${backend}_bs${batch}_device$device
        case $backend in
            ais_bench) on_device "$log" "$user_python" -m ais_bench --model "$model" --output result --output_dirname \
                "pure_device$device" --outfmt BIN --batchsize "$batch" --device "$device" --loop 20 ;;
            *) on_device "$log" "${program[@]}" -round=20 -om_path="$model" -device_id="$device" -batch_size="$batch" ;;
        esac
    done
    all_devices
    for device in "${devices[@]}"; do
        [ -n "$(find result -name "PureInfer_perf_of_*_in_device_$device.txt" -o -name "pure_device${device}_summary.json")" ] ||
            broken "$backend wrote no rate of pure inference" "pure_${backend}_bs${batch}_device$device"
        rm -rf "result/pure_device$device" # the outputs for empty input
    done
}

# collect RESULT: checks that there is a result for each image, and a rate. Replaces the results of an earlier run on these devices
collect() {
    local device lock count=0 wanted perf ran=$backend log=${backend}_bs${batch}_device${devices[0]}
    [ "$backend" != ais_bench ] || log=ais_bench_bs$batch
    wanted=$(wc -l <../deepmar.info)
    for device in "${devices[@]}"; do
        count=$((count + $(find "result/dumpOutput_device$device" -name '*_[01].bin' 2>/dev/null | wc -l)))
        perf=result/perf_vision_batchsize_${batch}_device_$device.txt
        [ "$backend" = ais_bench ] || [ -e "$perf" ] || broken "$backend wrote no $perf, which holds its rate" "$log"
    done
    [ "$count" = "$wanted" ] || broken "$backend wrote $count results for $wanted images" "$log"
    [ "$backend" != benchmark ] || ran=${benchmark##*/}
    [ "$backend" != onnxruntime ] || ran=$(sed -n 's/^\[INFO\] \(ONNX Runtime .*\), .*/\1/p' "$work_dir/logs/$log.log" | head -n 1)
    cd "$work_dir"
    mkdir -p "$1"
    for device in "${devices[@]}"; do made "$1/dumpOutput_device$device" from; done # from nothing yet, in case this is interrupted
    for device in "${devices[@]}"; do
        rm -rf "$1"/{{dumpOutput,pure}_device,{perf_vision,PureInfer_perf}_*_device_}"$device"{,.txt,_summary.json}
    done
    exec {lock}>>"$work_dir/.scoring.lock" && locked "$lock" # a run on another device may be scoring these results
    rm -f "$1/fusion_result.json"
    exec {lock}>&-
    find "$scratch_folder/result" -mindepth 1 -maxdepth 1 -exec mv -t "$1" {} +
    for device in "${devices[@]}"; do
        made "$1/dumpOutput_device$device" from deepmar.info "$model" model="$model" backend="$ran"
    done
}
