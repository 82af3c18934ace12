#!/usr/bin/env bash
# DeepMAR offline inference, all stages: checkpoint -> ONNX -> Pad removed -> OM -> bins -> info -> inference -> accuracy.
#
#   bash run_all.sh                              on sample data, with ONNX Runtime where there is no card
#   bash run_all.sh --batch-size 8 --stage 6     inference and accuracy only, at another batch size
#   bash run_all.sh --batch-size "1 4 8 16 32 64" --device-id "0 1 2 3"
#
# Edit the variables below, set them in the environment, or give them as options: batch_size is --batch-size.
set -euo pipefail

# --- variables ------------------------------------------------------------------------------------------------------
checkpoint=${checkpoint-}          # the trained checkpoint (.pth.tar); empty: the sample's, made in stage 0
images=${images-}                  # the folder of the test images; empty: the sample's
image_list=${image_list-}          # image.txt, one file name a line; empty: the sample's
label_file=${label_file-}          # label.json; empty: the sample's
published_acc=${published_acc-}    # instance_acc to compare with, as 0.789 or 78.9; empty: the sample's in PyTorch, else none
chip_name=${chip_name-}            # the card's chip for atc, Ascend310 or 310P3; empty: what npu-smi info says
backend=${backend-auto}            # what runs the model: benchmark (the binary), ais_bench, onnxruntime; auto: the first at hand
batch_size=${batch_size-1}         # images per inference, one or several: "1 4 8 16 32 64"
device_id=${device_id-0}           # the card's device, or several that share the images: "0 1 2 3"
work_dir=${work_dir-work}          # where everything is written
sample_size=${sample_size-200}     # images of the sample
python=${python-${PYTHON-python3}} # the Python to use, or to make a virtual environment with
set_env=${set_env-}                # CANN's set_env.sh; empty: where atc is not on the PATH, the one that is found
chips=${chips-}                    # chips of a card, for its rate; empty: what npu-smi info counts, else 4 of a 310, 1 of others
strict=${strict-}                  # an error, not a note, where ONNX Runtime has a card's provider that does not load
stage=${stage-0}                   # the first stage to run:
stop_stage=${stop_stage-8}         # the last stage to run: 0 sample data, 1 ONNX, 2 Pad, 3 atc, 4 bins, 5 info,
                                   # 6 inference, 7 accuracy, 8 report
check=${check-}                    # only tells what this machine has of what is needed, and how to get the rest
json=${json-}                      # with --check: a file for its findings
# --------------------------------------------------------------------------------------------------------------------

names="checkpoint images image_list label_file published_acc chip_name backend batch_size device_id work_dir sample_size
python set_env chips strict stage stop_stage check json"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf '[run_all] %s\n' "$*"; }
fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 1; }
usage() { printf 'run_all.sh: error: %s; --help lists the options\n' "$*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /{s/^# \{0,1\}//; /^set /!p}' "${BASH_SOURCE[0]}"
            sed -n 's/^\([a-z_]*\)=\${.*[-]\(.*\)}\{1,2\} *# *\(.*\)/\1 \3/p; s/^ \{30,\}# /. /p' "${BASH_SOURCE[0]}" |
                while read -r name text; do
                    [ "$name" = . ] && name='' || name=--${name//_/-}
                    printf '  %-18s %s\n' "$name" "$text"
                done
            exit ;;
        --check | --strict) name=$1 value=yes && shift ;;
        --*=*) name=${1%%=*} value=${1#*=} && shift ;;
        --*) [ $# -gt 1 ] || usage "$1 needs a value"
            name=$1 value=$2 && shift 2 ;;
        *) usage "$1 is no option" ;;
    esac
    name=${name#--} name=${name//-/_}
    case " ${names//$'\n'/ } " in *" $name "*) printf -v "$name" %s "$value" ;; *) usage "--${name//_/-} is no option" ;; esac
done

# --- checks, before any work ----------------------------------------------------------------------------------------

# numbers NAME PATTERN TEXT: the variable must hold one or several different numbers
numbers() {
    local list=${!1//,/ } number
    read -ra list <<<"${list//$'\n'/ }"
    [ ${#list[@]} -gt 0 ] || usage "$1 must be $3, not '${!1}'"
    for number in "${list[@]}"; do [[ $number =~ ^$2$ ]] || usage "$1 must be $3, not '$number'"; done
    number=$(printf '%s\n' "${list[@]}" | sort | uniq -d | head -n 1)
    [ -z "$number" ] || usage "$1 names $number twice"
    printf -v "$1" %s "${list[*]}"
}
numbers batch_size '[1-9][0-9]{0,5}' "a positive whole number, or several"
numbers device_id '(0|[1-9][0-9]{0,5})' "a whole number, or several"
[[ $sample_size =~ ^[1-9][0-9]*$ ]] || usage "sample_size must be a positive whole number, not '$sample_size'"
for name in stage stop_stage; do
    [[ ${!name} =~ ^[0-8]$ ]] || usage "$name must be one of 0 to 8, not '${!name}'"
done
[[ $chips =~ ^([1-9][0-9]?)?$ ]] || usage "chips must be a positive whole number, not '$chips'"
for name in check strict; do [[ ${!name} =~ ^(yes)?$ ]] || usage "$name must be yes or empty, not '${!name}'"; done
[ -z "$json" ] || [ -n "$check" ] || usage "json is for --check"
[[ $chip_name =~ ^((Ascend)?[0-9]+[A-Za-z0-9_-]*)?$ ]] || usage "chip_name must be as in Ascend310 or 310P3, not '$chip_name'"
case $backend in auto | benchmark | ais_bench | onnxruntime) ;; *)
    usage "backend must be auto, benchmark, ais_bench or onnxruntime, not '$backend'" ;;
esac
read -ra devices <<<"$device_id"

# The user's data, all of it or none: a checkpoint scored on drawings would give a number that means nothing.
given=$(for name in checkpoint images image_list label_file; do [ -z "${!name}" ] || echo "$name"; done)
if [ -n "$given" ]; then
    for name in checkpoint images image_list label_file; do
        [ -n "${!name}" ] || usage "${given//$'\n'/, } set, but not $name: set all of checkpoint, images, image_list, label_file, or none"
    done
    for name in checkpoint images image_list label_file; do
        [ -e "${!name}" ] || [ -n "$check" ] || fail "$name: ${!name}: no such file or folder"
        printf -v "$name" %s "$(realpath -m -- "${!name}")"
    done
fi

runs() { [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ]; } # runs N: whether stage N is asked for

# shellcheck source=tools/backend.sh
source "$here/tools/backend.sh"
read_set_env
[ -z "$check" ] || check_machine
choose_backend
choose_chip

# --- the work folder ------------------------------------------------------------------------------------------------

mkdir -p "$work_dir"
# Whoever makes files has the folder alone; runs that only infer and score (--stage 6) share it, each with devices of its own.
exec 8<"$work_dir"
for device in "${devices[@]}"; do
    exec {lock}>>"$work_dir/.device$device.lock"
    flock -n "$lock" || fail "$work_dir: another run is at work on device $device in this folder; wait, or choose another --work-dir"
done
mode=-x
[ "$stage" -lt 6 ] || mode=-s
flock -n $mode 8 || {
    say "waiting for the run on another device in $work_dir"
    flock $mode 8
}
requested=$python
python=$(PYTHON=$python "$here/tools/python.sh" requirements.txt) || fail "no Python with the packages; see above"
cd "$work_dir"
work_dir=$PWD
if [ -z "$given" ]; then
    checkpoint=$work_dir/sample/checkpoint.pth.tar images=$work_dir/sample/images
    image_list=$work_dir/sample/image.txt label_file=$work_dir/sample/label.json
fi

# begin N TEXT: whether stage N is asked for; says so, and remembers it for the message of a failure
begin() {
    runs "$1" || return 1
    current=$1
    started=$SECONDS
    say "stage $1: $2"
}
finish() { say "stage $current done in $((SECONDS - started)) s"; }
current='' scratch=''
ended() {
    local status=$?
    trap - EXIT
    # shellcheck disable=SC2046 # one number each
    kill $(jobs -p) 2>/dev/null && wait
    [ -z "$scratch" ] || rm -rf "$scratch"
    [ "$status" = 0 ] || [ -z "$current" ] || printf 'run_all.sh: error: stage %s failed\n' "$current" >&2
    exit "$status"
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# need FILE STAGE: stops where an earlier stage's output is missing
need() { [ -e "$1" ] || fail "$work_dir/${1#"$work_dir"/} is missing; run stage $2 first"; }

# What a file or folder is: its content's checksum; a folder, which a stage replaces as a whole, by its inode and time.
identity() {
    if [ -d "$1" ]; then stat -Lc '%i %y' -- "$1"; else cksum <"$1"; fi
}
# record PRODUCT INPUT ...: notes what a stage made its product from
record() {
    mkdir -p .made_from
    local product=$1 input
    shift
    for input; do identity "$input"; done >".made_from/${product//\//_}"
}
# fresh PRODUCT STAGE INPUT ...: stops where the product is missing, or was made from other inputs than these. A product
# without a record, as an OM converted elsewhere, is the user's own.
fresh() {
    local product=$1 number=$2 input
    shift 2
    need "$product" "$number"
    [ -e ".made_from/${product//\//_}" ] || return 0
    for input; do
        [ ! -e "$input" ] || grep -qxF -- "$(identity "$input")" ".made_from/${product//\//_}" ||
            fail "$work_dir/$product was made from another ${input##*/}; run stage $number again"
    done
}

mkdir -p logs

# The model's names at a batch size. Several batch sizes have a folder of results each.
names_of() {
    onnx=deepmar_bs$1.onnx nopad=deepmar_bs${1}_nopad.onnx om=deepmar_bs$1.om result=result
    [ "$batch_size" = "$1" ] || result=result_bs$1
    model=$om
    [ "$backend" != onnxruntime ] || model=$nopad
    folders=("${devices[@]/#/$result/dumpOutput_device}")
}

# --- the stages -----------------------------------------------------------------------------------------------------

if [ -z "$given" ] && begin 0 "sample data (no checkpoint and images are set)"; then
    if [ -e sample/image.txt ] && [ "$(wc -l <sample/image.txt)" = "$sample_size" ]; then
        say "kept $work_dir/sample, which has $sample_size images already"
    else
        "$python" "$here/tools/sample.py" sample --images "$sample_size"
    fi
    finish
fi

if begin 1 "checkpoint -> ONNX"; then
    need "$checkpoint" 0
    for size in $batch_size; do
        names_of "$size"
        "$python" "$here/export_onnx.py" "$checkpoint" "$onnx" "$size"
        record "$onnx" "$checkpoint"
    done
    finish
fi

if begin 2 "Pad removed from ONNX"; then
    for size in $batch_size; do
        names_of "$size"
        fresh "$onnx" 1 "$checkpoint"
        "$python" "$here/remove_pad.py" "$onnx" "$nopad"
        record "$nopad" "$onnx"
    done
    finish
fi

if begin 3 "ONNX -> OM with atc"; then
    for size in $batch_size; do
        names_of "$size"
        fresh "$nopad" 2 "$onnx"
        if [ -n "$make_om" ]; then
            # in a folder of its own, as it also leaves a fusion_result.json, which is not that of stage 7
            new_scratch atc
            cd "$scratch"
            tool "atc_bs$size.log" atc --model="../$nopad" --framework=5 --output="${om%.om}" --input_format=NCHW \
                --input_shape="actual_input_1:$size,3,224,224" --log=error --soc_version="$chip_name"
            [ -e "$om" ] || broken "atc left no $om" "atc_bs$size.log"
            cd "$work_dir"
            mv "$scratch/$om" "$om"
            record "$om" "$nopad"
        elif [ -e "$om" ] && [ "$backend" != onnxruntime ]; then
            say "no atc on this machine: $om is taken as it is"
        fi
    done
    [ -n "$make_om" ] || [ "$backend" != onnxruntime ] || say "no OM is made, as the ONNX model runs on ONNX Runtime"
    finish
fi

if begin 4 "images -> input_bin"; then
    need "$image_list" 0
    "$python" "$here/preprocess_deepmar_pytorch.py" "$images" input_bin "$image_list"
    record input_bin "$image_list"
    finish
fi

if begin 5 "input_bin -> deepmar.info"; then
    fresh input_bin 4 "$image_list"
    "$python" "$here/get_info.py" ./input_bin deepmar.info 224 224
    record deepmar.info input_bin
    finish
fi

# belongs: stops unless everything that stages 6 and 7 take was made from what they are given now
belongs() {
    fresh input_bin 4 "$image_list"
    fresh deepmar.info 5 input_bin
    [ ! -e "$onnx" ] || fresh "$onnx" 1 "$checkpoint"
    [ "$model" = "$nopad" ] || [ ! -e "$nopad" ] || fresh "$nopad" 2 "$onnx"
    if [ "$model" = "$om" ]; then fresh "$om" 3 "$nopad"; else fresh "$nopad" 2 "$onnx"; fi
}

if begin 6 "inference on backend $backend, device $device_id"; then
    [ "$backend" != onnxruntime ] || [ ${#devices[@]} = 1 ] ||
        say "these devices are not cards: ${#devices[@]} processes on ONNX Runtime share this machine's $(nproc) cores"
    for size in $batch_size; do
        names_of "$size"
        belongs
        wanted=$(wc -l <deepmar.info)
        say "batch size $size: $model, $wanted images -> $result"
        new_scratch "$result" # the tools write into result/ of the folder that they run in, over what is there
        ln -s ../input_bin ../deepmar.info "../$model" "$scratch"
        cd "$scratch"
        if [ "$backend" = ais_bench ]; then
            run_ais_bench
        elif [ ${#devices[@]} -gt 1 ]; then
            run_devices
        elif [ "$backend" = benchmark ]; then
            tool "benchmark_bs${size}_device$device_id.log" run_device "$device_id" deepmar.info
        else # its progress bar goes to the terminal
            run_device "$device_id" deepmar.info | tee "$work_dir/logs/onnxruntime_bs${size}_device$device_id.log"
        fi
        made=0
        for device in "${devices[@]}"; do
            count=$(find "result/dumpOutput_device$device" -name '*_[01].bin' 2>/dev/null | wc -l)
            made=$((made + count))
        done
        log=${backend}_bs${size}_device${devices[0]}.log
        [ "$backend" != ais_bench ] || log=ais_bench_bs$size.log
        [ "$made" = "$wanted" ] || broken "$backend left $made results for $wanted images" "$log"
        cd "$work_dir"
        ran=$backend
        [ "$backend" != benchmark ] || ran=$binary
        [ "$backend" != onnxruntime ] || ran=$(sed -n 's/^\[INFO\] \(ONNX Runtime .*\), .*/\1/p' "logs/$log" | head -n 1)
        [ "$backend" != ais_bench ] || cp "logs/$log" "$scratch/result/ais_bench_batchsize_${size}_device_${device_id// /_}.log"
        mkdir -p "$result"
        for folder in "${folders[@]}"; do record "$folder" /dev/null; done # of nothing, should this be interrupted here
        rm -rf "${folders[@]}"
        mv "${folders[@]/#$result/$scratch/result}" "$result/"
        find "$scratch/result" -maxdepth 1 -type f -exec mv -t "$result" {} + # perf files, ais_bench's summary
        for folder in "${folders[@]}"; do
            record "$folder" deepmar.info "$model"
            printf 'backend %s\nmodel %s\n' "$ran" "$model" >>".made_from/${folder//\//_}"
        done
    done
    finish
fi

# What stages 7 and 8 write is written by one run at a time, so that it belongs together.
exec {lock}>>.scoring.lock
[ "$stop_stage" -lt 7 ] || flock "$lock"
dropped=
if begin 7 "accuracy and throughput"; then
    need "$image_list" 0
    if [ -z "$published_acc" ] && [ -z "$given" ]; then
        published_acc=$(cat sample/accuracy.txt)
        say "no card's or paper's accuracy applies to the sample: compared with PyTorch's own on the same images"
    fi
    rows=()
    for size in $batch_size; do
        names_of "$size"
        for folder in "${folders[@]}"; do need "$folder" 6; done
        made=.made_from/${folders[0]//\//_}
        ran=unknown
        if [ -e "$made" ]; then
            ran=$(sed -n 's/^backend //p' "$made") model=$(sed -n 's/^model //p' "$made")
        fi
        belongs
        for folder in "${folders[@]}"; do fresh "$folder" 6 deepmar.info "$model"; done
        [ "$batch_size" = "$size" ] || say "batch size $size"
        new_scratch "$result"
        if ! (cd "$scratch" && "$python" "$here/postprocess_deepmar_pytorch.py" "${folders[@]/#/$work_dir/}" "$label_file" \
            --image_list "$image_list" ${published_acc:+--published "$published_acc"}); then
            [ -e "$scratch/fusion_result.json" ] || exit 1
            dropped=$dropped${dropped:+, }$size # scored, but more than 1 % below: the table and the report show it
        fi
        mv "$scratch/fusion_result.json" "$result/"
        cp "$result/fusion_result.json" "$scratch/"
        mv "$scratch/fusion_result.json" fusion_result.json
        rows+=(--run "$size" "$result" "$model" "$ran")
    done
    "$python" "$here/tools/table.py" throughput "${rows[@]}" --devices "${devices[@]}" --chips "$chips"
    finish
fi

if begin 8 "report -> report.html"; then
    for size in $batch_size; do names_of "$size"; done # fusion_result.json is of the last batch size
    need throughput.csv 7
    "$python" "$here/tools/report.py" --images "$images" --list "$image_list" --labels "$label_file" \
        --results "${folders[@]}" --fusion "$result/fusion_result.json" --throughput throughput.csv --output report.html
    finish
    say "open $work_dir/report.html in a browser"
fi
current=
[ -z "$dropped" ] || fail "the accuracy at batch size $dropped is more than 1 % below the published one"
