#!/usr/bin/env bash
# DeepMAR offline inference, all stages: checkpoint -> ONNX -> Pad removed -> OM -> bins -> info -> inference -> accuracy.
#
#   bash run_all.sh                              on sample data, with ONNX Runtime where there is no card
#   bash run_all.sh --batch-size 8 --stage 6     inference and accuracy only, at another batch size
#
# Edit the variables below, set them in the environment, or give them as options: batch_size is --batch-size.
set -euo pipefail

# --- variables ------------------------------------------------------------------------------------------------------
checkpoint=${checkpoint-}          # the trained checkpoint (.pth.tar); empty: the sample's, made in stage 0
images=${images-}                  # the folder of the test images; empty: the sample's
image_list=${image_list-}          # image.txt, one file name a line; empty: the sample's
label_file=${label_file-}          # label.json; empty: the sample's
published_acc=${published_acc-}    # instance_acc to compare with, as 0.789 or 78.9; empty: the sample's in PyTorch, else none
chip_name=${chip_name-Ascend310}   # the card's chip, for atc's --soc_version; npu-smi info shows it
batch_size=${batch_size-1}         # images per inference
device_id=${device_id-0}           # the card's device
work_dir=${work_dir-work}          # where everything is written
sample_size=${sample_size-200}     # images of the sample
python=${python-${PYTHON-python3}} # the Python to use, or to make a virtual environment with
set_env=${set_env-/usr/local/Ascend/ascend-toolkit/set_env.sh} # the toolkit's settings, read where atc is not on the PATH
stage=${stage-0}                   # the first stage to run:
stop_stage=${stop_stage-7}         # the last stage to run: 0 sample data, 1 ONNX, 2 Pad, 3 atc, 4 bins, 5 info,
                                   # 6 inference, 7 accuracy
# --------------------------------------------------------------------------------------------------------------------

names="checkpoint images image_list label_file published_acc chip_name batch_size device_id work_dir sample_size python
set_env stage stop_stage"
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
        --*=*) name=${1%%=*} value=${1#*=} && shift ;;
        --*) [ $# -gt 1 ] || usage "$1 needs a value"
            name=$1 value=$2 && shift 2 ;;
        *) usage "$1 is no option" ;;
    esac
    name=${name#--} name=${name//-/_}
    case " ${names//$'\n'/ } " in *" $name "*) printf -v "$name" %s "$value" ;; *) usage "--${name//_/-} is no option" ;; esac
done

for name in batch_size sample_size; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || usage "$name must be a positive whole number, not '${!name}'"
done
[[ $device_id =~ ^[0-9]+$ ]] || usage "device_id must be a whole number, not '$device_id'"
for name in stage stop_stage; do
    [[ ${!name} =~ ^[0-7]$ ]] || usage "$name must be one of 0 to 7, not '${!name}'"
done
[[ $chip_name =~ ^(Ascend)?[0-9]+[A-Za-z0-9]*$ ]] || usage "chip_name must be as in Ascend310 or 310P3, not '$chip_name'"
chip_name=Ascend${chip_name#Ascend}

# The user's data, all of it or none: a checkpoint scored on drawings would give a number that means nothing.
given=$(for name in checkpoint images image_list label_file; do [ -z "${!name}" ] || echo "$name"; done)
if [ -n "$given" ]; then
    for name in checkpoint images image_list label_file; do
        [ -n "${!name}" ] || usage "${given//$'\n'/, } set, but not $name: set all of checkpoint, images, image_list, label_file, or none"
    done
    for name in checkpoint images image_list label_file; do
        [ -e "${!name}" ] || fail "$name: ${!name}: no such file or folder"
        printf -v "$name" %s "$(realpath -- "${!name}")"
    done
fi

mkdir -p "$work_dir"
exec 8<"$work_dir"
flock -n 8 || fail "$work_dir: another run is at work in this folder; wait, or choose another --work-dir"
python=$(PYTHON=$python "$here/tools/python.sh" requirements.txt) || fail "no Python with the packages; see above"
cd "$work_dir"
work_dir=$PWD
if [ -z "$given" ]; then
    checkpoint=sample/checkpoint.pth.tar images=sample/images image_list=sample/image.txt label_file=sample/label.json
fi

export PATH
if ! command -v atc >/dev/null && [ -f "$set_env" ]; then
    set +eu # the toolkit's script is not written for them
    # shellcheck disable=SC1090
    source "$set_env"
    set -eu
    say "read $set_env"
fi
benchmark=$here/benchmark.$(uname -m)

# begin N TEXT: whether stage N is asked for; says so, and remembers it for the message of a failure
begin() {
    [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ] || return 1
    current=$1
    started=$SECONDS
    say "stage $1: $2"
}
finish() { say "stage $current done in $((SECONDS - started)) s"; }
current=
trap '[ $? = 0 ] || [ -z "$current" ] || printf "run_all.sh: error: stage %s failed\n" "$current" >&2' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# need FILE STAGE: stops where an earlier stage's output is missing
need() { [ -e "$1" ] || fail "$work_dir/$1 is missing; run stage $2 first"; }

onnx=deepmar_bs$batch_size.onnx
nopad=deepmar_bs${batch_size}_nopad.onnx
om=deepmar_bs$batch_size.om
result=result/dumpOutput_device$device_id

if [ -z "$given" ] && begin 0 "sample data (no checkpoint and images are set)"; then
    if [ -e sample/image.txt ] && [ "$(wc -l <sample/image.txt)" = "$sample_size" ]; then
        say "kept $work_dir/sample, which has $sample_size images already"
    else
        "$python" "$here/tools/sample.py" sample --images "$sample_size"
    fi
    finish
fi

if begin 1 "checkpoint -> $onnx"; then
    need "$checkpoint" 0
    "$python" "$here/export_onnx.py" "$checkpoint" "$onnx" "$batch_size"
    rm -f "$nopad" "$om" # made from an earlier one
    finish
fi

if begin 2 "Pad removed -> $nopad"; then
    need "$onnx" 1
    "$python" "$here/remove_pad.py" "$onnx" "$nopad"
    rm -f "$om"
    finish
fi

if begin 3 "atc -> $om"; then
    need "$nopad" 2
    if command -v atc >/dev/null; then
        atc --model="$nopad" --framework=5 --output="${om%.om}" --input_format=NCHW \
            --input_shape="actual_input_1:$batch_size,3,224,224" --log=error --soc_version="$chip_name"
        need "$om" 3
    else
        say "no atc on this machine: no OM is made, the ONNX model runs on ONNX Runtime instead"
    fi
    finish
fi

if begin 4 "images -> input_bin"; then
    need "$image_list" 0
    "$python" "$here/preprocess_deepmar_pytorch.py" "$images" input_bin "$image_list"
    finish
fi

if begin 5 "input_bin -> deepmar.info"; then
    need input_bin 4
    "$python" "$here/get_info.py" ./input_bin deepmar.info 224 224
    finish
fi

if begin 6 "inference -> $result"; then
    need deepmar.info 5
    mkdir -p result
    if [ -x "$benchmark" ] && [ -e "$om" ]; then
        # The binary writes into result/ of the folder it runs in, over what is there: it runs in one of its own.
        rm -rf result.partial
        mkdir result.partial
        ln -s ../input_bin ../deepmar.info "../$om" result.partial
        (cd result.partial && "$benchmark" -model_type=vision -batch_size="$batch_size" -device_id="$device_id" \
            -om_path="$om" -input_width=224 -input_height=224 -input_text_path=deepmar.info -useDvpp=false \
            -output_binary=true)
        made=$(find "result.partial/$result" -name '*_1.bin' 2>/dev/null | wc -l)
        wanted=$(wc -l <deepmar.info)
        [ "$made" = "$wanted" ] || fail "$(basename "$benchmark") left $made results for $wanted images in $work_dir/result.partial"
        rm -rf "$result"
        mv "result.partial/$result" result/
        mv result.partial/result/perf_vision_* result/
        rm -rf result.partial
    else
        need "$nopad" 2
        [ ! -e "$om" ] || say "no $(basename "$benchmark") beside the scripts: the ONNX model runs on ONNX Runtime instead"
        "$python" "$here/tools/benchmark.py" -model_type=vision -batch_size="$batch_size" -device_id="$device_id" \
            -om_path="$nopad" -input_width=224 -input_height=224 -input_text_path=deepmar.info -useDvpp=false \
            -output_binary=true
    fi
    finish
fi

if begin 7 "accuracy"; then
    need "$result" 6
    need "$image_list" 0
    # The results must be those of the list's images, no fewer and no others: a partial result is no result.
    stems() { sed -e 's#\r$##; s#^\xEF\xBB\xBF##; s#^[[:space:]]*##; s#[[:space:]]*$##; s#.*/##; s#\..*##; /^$/d' | LC_ALL=C sort; }
    different=$(LC_ALL=C comm -3 <(stems <"$image_list") \
        <(find "$result" -name '*_[01].bin' -printf '%f\n' | sed 's/_[01]\.bin$//' | LC_ALL=C sort) | tr -d '\t')
    [ -z "$different" ] || fail "$result is not of the images in $image_list: $(wc -l <<<"$different") names are in one of them" \
        "only, as $(head -n 1 <<<"$different"); run stages 4 to 6 again"
    if [ -z "$published_acc" ] && [ -z "$given" ]; then
        published_acc=$(cat sample/accuracy.txt)
        say "no card's or paper's accuracy applies to the sample: compared with PyTorch's own on the same images"
    fi
    "$python" "$here/postprocess_deepmar_pytorch.py" "$result" "$label_file" ${published_acc:+--published "$published_acc"}
    perf=result/perf_vision_batchsize_${batch_size}_device_$device_id.txt
    need "$perf" 6
    finish
    say "throughput at batch size $batch_size:" \
        "$(sed -n 's/^\[e2e\] throughputRate: \([^,]*\),.*/\1/p' "$perf") images/s end to end," \
        "$(sed -n 's/.*Interface throughputRate: \([^,]*\),.*/\1/p' "$perf") images/s in the model (Interface throughputRate)"
fi
current=
