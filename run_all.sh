#!/usr/bin/env bash
# DeepMAR offline inference, all stages: checkpoint -> ONNX -> Pad removed -> OM -> bins -> info -> inference -> accuracy.
#
#   bash run_all.sh                              all stages on sample data; without a card, on ONNX Runtime
#   bash run_all.sh --batch-size 8 --stage 6     only inference and accuracy, at another batch size
#   bash run_all.sh --batch-size "1 4 8 16 32 64" --device-id "0 1 2 3"
#
# Edit the variables below, set them in the environment, or give them as options: batch_size is --batch-size.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # if it was started with sh run_all.sh
set -euo pipefail

# --- variables ------------------------------------------------------------------------------------------------------
checkpoint=${checkpoint-}          # the trained checkpoint (.pth.tar); empty: the sample's, which stage 0 makes
images=${images-}                  # the folder of the test images; empty: the sample's
image_list=${image_list-}          # image.txt, one file name per line; empty: the sample's
label_file=${label_file-}          # label.json; empty: the sample's
attributes=${attributes-}          # a file with the attributes' names, one per line; empty: PETA's if there are 35
thresholds=${thresholds-}          # a file of tools/thresholds.py with each attribute's limit; empty: a logit of 0 for all
published_acc=${published_acc-}    # instance_acc to compare with, as 0.789 or 78.9; empty: the sample's in PyTorch, else none
size=${size-224 224}               # height and width of the network's input, as in training; a checkpoint does not record them
aipp=${aipp-no}                    # yes: the bins are uint8, a quarter of the bytes, and the card normalises them (AIPP)
last_conv_stride=${last_conv_stride-2} # the stride in layer4, 1 or 2, as in training; a checkpoint does not record it
state_dict=${state_dict-}          # the state dict to use if the checkpoint has several, such as state_dict_ema
chip_name=${chip_name-}            # the card's chip for atc, Ascend310 or 310P3; empty: npu-smi info names it
backend=${backend-auto}            # what runs the model: benchmark (the binary), ais_bench, onnxruntime; auto: the first that works
provider=${provider-}              # onnxruntime: the execution provider; measure: the fastest here; empty: CANN, CUDA or the CPU
tolerance=${tolerance-}            # onnxruntime: allowed difference from the CPU's logits, as a fraction of the largest logit
pure=${pure-no}                    # yes: stage 6 also measures pure inference, on the same batch again and again
batch_size=${batch_size-1}         # images per inference, one number or several: "1 4 8 16 32 64"
device_id=${device_id-0}           # the card's device, or several that share the images: "0 1 2 3"
work_dir=${work_dir-work}          # the folder for all files that the run writes
sample_size=${sample_size-200}     # the number of images in the sample
python=${python-${PYTHON-python3}} # the Python to use, or from which to make a virtual environment
set_env=${set_env-}                # CANN's set_env.sh; empty: if atc is not on the PATH, the run looks for one
chips=${chips-}                    # chips per card, for its rate; empty: npu-smi info counts them, else 4 for a 310, 1 for others
strict=${strict-}                  # yes: stop if ONNX Runtime has a card's provider that does not load; empty: only a note
stage=${stage-0}                   # the first stage to run:
stop_stage=${stop_stage-8}         # the last stage to run: 0 sample data, 1 ONNX, 2 Pad, 3 atc, 4 bins, 5 info,
                                   # 6 inference, 7 accuracy, 8 report
check=${check-}                    # yes: only list what this machine has of what the run needs, and how to get the rest
json=${json-}                      # with --check: also write the list into this file
# --------------------------------------------------------------------------------------------------------------------

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# It defines begin and finish of a stage, names_of a batch size's files, record and fresh for what files were made from.
# shellcheck source=tools/run/driver.sh
source "$here/tools/run/driver.sh"
start_run "$@"

if [ -n "$sample" ] && begin 0 "sample data (no checkpoint and images are set)"; then
    "$python" "$here/tools/sample.py" sample --images "$sample_size" --size "$height" "$width" \
        --last-conv-stride "$last_conv_stride" --keep
    finish
fi

if begin 1 "checkpoint -> ONNX"; then
    need "$checkpoint" 0
    for batch in $batch_size; do
        names_of "$batch"
        "$python" "$here/export_onnx.py" "$checkpoint" "$onnx" "$batch" "${export_options[@]}"
        record "$onnx" checkpoint="$checkpoint" "${model_settings[@]}"
    done
    finish
fi

if begin 2 "Pad removed from ONNX"; then
    for batch in $batch_size; do
        names_of "$batch"
        fresh "$onnx" 1 checkpoint="$checkpoint" "${model_settings[@]}"
        "$python" "$here/remove_pad.py" "$onnx" "$nopad"
        "$python" "$here/tools/describe.py" "$nopad" "${om%.om}.json"
        record "$nopad" onnx="$onnx"
    done
    finish
fi

if begin 3 "ONNX -> OM with atc"; then
    [ "$aipp" = no ] || "$python" "$here/tools/rehearse.py" cfg aipp.cfg --size "$height" "$width"
    for batch in $batch_size; do
        names_of "$batch"
        fresh "$nopad" 2 onnx="$onnx"
        if [ -n "$make_om" ]; then
            run_atc # tools/run/backend.sh
            record "$om" model="$nopad" aipp="$aipp"
        fi
        if [ -n "$make_twin" ]; then # ONNX Runtime runs this model in place of an OM with AIPP
            "$python" "$here/tools/rehearse.py" aipp "$nopad" "$twin"
            record "$twin" model="$nopad" aipp="$aipp"
        fi
    done
    [ -n "$make_om" ] || say "no OM is made: $no_om"
    finish
fi

if begin 4 "images -> input_bin"; then
    need "$image_list" 0
    "$python" "$here/preprocess_deepmar_pytorch.py" "$images" input_bin "$image_list" --size "$height" "$width" "${uint8[@]}"
    record input_bin "${data[@]}"
    finish
fi

if begin 5 "input_bin -> deepmar.info"; then
    fresh input_bin 4 "${data[@]}"
    "$python" "$here/get_info.py" ./input_bin deepmar.info "$width" "$height"
    record deepmar.info bins=input_bin
    finish
fi

if begin 6 "inference on backend $backend, device $device_id"; then
    for batch in $batch_size; do
        names_of "$batch"
        need input_bin 4
        need deepmar.info 5
        need "$model" "$model_stage"
        belongs
        say "batch size $batch: $model, $(wc -l <deepmar.info) images -> $result"
        infer   # tools/run/backend.sh: runs the tool in its own folder and checks its output
        collect # replaces the results of an earlier run
    done
    finish
fi

if begin 7 "accuracy and throughput"; then
    rows=()
    for batch in $batch_size; do
        names_of "$batch"
        results_belong
        [ "$batch_size" = "$batch" ] || say "batch size $batch"
        score
        rows+=(--run "$batch" "$result" "$model" "$ran")
    done
    # shellcheck disable=SC2086 # one word each
    "$python" "$here/tools/run/table.py" throughput "${rows[@]}" --devices $device_id --chips "$chips"
    record throughput.csv "${table_inputs[@]}"
    finish
fi

if begin 8 "report -> report.html"; then
    for batch in $batch_size; do # the page shows the results of the last one
        names_of "$batch"
        results_belong
        need "$result/fusion_result.json" 7
    done
    fresh throughput.csv 7 "${table_inputs[@]}"
    "$python" "$here/tools/report.py" --images "$images" --list "$image_list" --labels "$label_file" \
        --results "${folders[@]}" --fusion "$result/fusion_result.json" --throughput throughput.csv --output report.html \
        "${described[@]}"
    finish
    say "open $work_dir/report.html in a browser"
fi
end_run
