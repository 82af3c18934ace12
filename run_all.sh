#!/usr/bin/env bash
# shellcheck disable=SC2086 # the variables without quotes hold numbers, or names without spaces
# DeepMAR offline inference: checkpoint -> ONNX -> Pad removed (-> INT8) -> OM -> bins -> info -> inference -> accuracy.
#
#   bash run_all.sh                              all stages on sample data; without a card, on ONNX Runtime
#   bash run_all.sh --batch-size 8 --stage 6     only inference and accuracy, at another batch size
#   bash run_all.sh --batch-size "1 4 8 16 32 64" --device-id "0 1 2 3"
#
# Edit the variables in this file, set them in the environment, or give them as options: batch_size is --batch-size.
case $- in *p*) ;; *x*) exec bash -px -- "$0" "$@" ;; *) exec bash -p -- "$0" "$@" ;; esac # -p: without the user's BASH_ENV, options ...
set -euo pipefail

# --- variables ------------------------------------------------------------------------------------------------------
checkpoint=${checkpoint-}          # the trained checkpoint (.pth.tar); empty: the sample's, which stage 0 makes
images=${images-}                  # the folder of the test images; empty: the sample's
image_list=${image_list-}          # image.txt, one file name per line; empty: the sample's
label_file=${label_file-}          # label.json; empty: the sample's
attributes=${attributes-}          # a file with the attributes' names, one per line; empty: PETA's if there are 35
thresholds=${thresholds-}          # a file of tools/thresholds.py with each attribute's threshold; empty: 0 for all
groups=${groups-}                  # a file with an image's name and its group (person) a line, for the 95 % intervals; empty: none
published_acc=${published_acc-}    # instance_acc to compare with, as 0.789 or 78.9; empty: the sample's in PyTorch, else none
size=${size-224 224}               # height and width of the network's input, as in training; a checkpoint does not record them
aipp=${aipp-no}                    # yes: the bins are uint8, a quarter of the bytes, and the card normalises them (AIPP)
                                   # nv12-601, nv12-709, nv12-jpeg: they are NV12, an eighth, and it also converts the colours
int8=${int8-no}                    # yes: the card computes in INT8, in ranges that training or validation images give
calibration_list=${calibration_list-} # the list of these images, of which 32 are taken; empty: the sample's
calibration_images=${calibration_images-} # their folder; empty: images, or the sample's
card_model=${card_model-}          # in place of them: NAME_deploy_model.onnx of amct_onnx, made elsewhere for the one batch size
last_conv_stride=${last_conv_stride-2} # the stride in layer4, 1 or 2, as in training; a checkpoint does not record it
state_dict=${state_dict-}          # the state dict to use if the checkpoint has several, such as state_dict_ema
chip_name=${chip_name-}            # the card's chip for atc, Ascend310 or 310P3; empty: npu-smi info names it
atc_options=${atc_options-}        # more options for atc, such as --precision_mode_v2=origin; paths in them must be absolute
backend=${backend-auto}            # what runs the model: benchmark (the binary), ais_bench, onnxruntime; auto: the first that works
provider=${provider-}              # onnxruntime: the execution provider; empty: CANN, CUDA or the CPU
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
stage=${stage-0}                   # the first stage to run
stop_stage=${stop_stage-8}         # the last stage to run
                                   # 0 sample data, 1 ONNX, 2 Pad, 3 INT8 and atc, 4 bins, 5 info, 6 inference, 7 accuracy, 8 report
check=${check-}                    # yes: only list what this machine has of what the run needs, and how to get the rest
json=${json-}                      # with --check: also write the list into this file

here=$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")
# tools/run/driver.sh defines the words of the stages. start_run there sets further variables, which its comment lists:
#   begin N TEXT, finish      returns whether stage N is to run; ends it
#   verify FILE=STAGE ...     stops unless each file is what its stage made, from this run's data and settings
#   made FILE from INPUT ...  records what a file was made from: variables of this run, and files of the work folder
#   scratch NAME              goes into an empty folder; keep, score and collect move what was made there, and go back
#   tool LOG COMMAND ...      prints and runs a command, and keeps its output in logs/; on_device: the same for one device
#   names_of BATCH_SIZE       sets model and the model_stage that makes it, result and results (stage 6's folders), described
# shellcheck source=tools/run/driver.sh
source "$here/tools/run/driver.sh"
start_run "$@"
case $aipp in nv12-*) nv12="--nv12 ${aipp#nv12-}" bin_kind=$nv12 ;; yes) nv12='' bin_kind=--uint8 ;; *) nv12='' bin_kind='' ;; esac

if [ -n "$sample" ] && begin 0 "sample data (no checkpoint and images are set)"; then
    "$python" "$here/tools/sample.py" sample --images "$sample_size" --size $size --last-conv-stride "$last_conv_stride" --keep
    finish
fi

if begin 1 "checkpoint -> ONNX"; then
    verify "$checkpoint=0"
    for batch in $batch_size; do
        "$python" "$here/export_onnx.py" "$checkpoint" deepmar_bs$batch.onnx $batch --size $size \
            --last-conv-stride "$last_conv_stride" ${state_dict:+--state-dict "$state_dict"} ${num_att:+--num-att "$num_att"} \
            ${attributes:+--attributes "$attributes"}
        made deepmar_bs$batch.onnx from checkpoint size last_conv_stride state_dict
    done
    finish
fi

if begin 2 "Pad removed from ONNX"; then
    for batch in $batch_size; do
        verify deepmar_bs$batch.onnx=1
        "$python" "$here/remove_pad.py" deepmar_bs$batch.onnx deepmar_bs${batch}_nopad.onnx
        "$python" "$here/tools/describe.py" deepmar_bs${batch}_nopad.onnx deepmar_bs$batch.json
        made deepmar_bs${batch}_nopad.onnx from deepmar_bs$batch.onnx
    done
    finish
fi

if begin 3 "ONNX -> OM with atc"; then
    [ "$aipp" = no ] || "$python" "$here/tools/rehearse.py" cfg aipp.cfg --size $size $nv12
    [ "$aipp" = no ] && aipp_options= || aipp_options="--insert_op_conf=../aipp.cfg --enable_small_channel=1"
    if [ -n "$calibrate" ]; then
        choose_images "$calibration_list" calibration_bin.txt
        "$python" "$here/preprocess_deepmar_pytorch.py" "$calibration_images" calibration_bin calibration_bin.txt --size $size
        made calibration_bin from calibration_list calibration_images size
    fi
    for batch in $batch_size; do
        onnx=deepmar_bs${batch}_nopad.onnx
        verify $onnx=2
        if [ -n "$calibrate" ]; then # ONNX Runtime runs this model in place of an INT8 OM; beside it is what amct_onnx needs
            "$python" "$here/tools/rehearse.py" int8 $onnx calibration_bin deepmar_bs${batch}_int8.onnx
            made deepmar_bs${batch}_int8.onnx from $onnx calibration_bin
        fi
        if [ -n "$amct" ]; then
            scratch amct_onnx # it also writes a folder amct_log
            tool amct_onnx_bs$batch amct_onnx calibration --model ../$onnx --save_path ./deepmar_bs$batch \
                --input_shape "actual_input_1:$batch,3,$height,$width" --data_dir ../deepmar_bs${batch}_int8_amct/calibration \
                --data_types float32 --calibration_config ../deepmar_bs${batch}_int8_amct/quant.cfg
            keep amct_onnx deepmar_bs${batch}_deploy_model.onnx
            onnx=deepmar_bs${batch}_deploy_model.onnx
        fi
        if [ -n "$make_om" ]; then
            scratch atc # atc also writes a fusion_result.json
            if [ -n "$card_model" ]; then cp "$card_model" card_model.onnx; model=card_model.onnx; else model=../$onnx; fi
            tool atc_bs$batch atc --model=$model --framework=5 --output=deepmar_bs$batch \
                --input_format=NCHW --input_shape="actual_input_1:$batch,3,$height,$width" --log=error \
                --soc_version="$chip_name" $aipp_options $atc_options
            keep atc deepmar_bs$batch.om
            made deepmar_bs$batch.om from deepmar_bs${batch}_nopad.onnx int8 ${amct:+calibration_bin} card_model aipp atc_options
        fi
        if [ -n "$make_twin" ] && [ "$aipp" != no ]; then # ONNX Runtime runs this model in place of an OM with AIPP
            "$python" "$here/tools/rehearse.py" aipp deepmar_bs$batch$twin.onnx deepmar_bs$batch$aipp_twin.onnx $nv12
            made deepmar_bs$batch$aipp_twin.onnx from deepmar_bs$batch$twin.onnx aipp
        fi
    done
    finish
fi

if begin 4 "images -> input_bin"; then
    verify "$image_list=0"
    "$python" "$here/preprocess_deepmar_pytorch.py" "$images" input_bin "$image_list" --size $size $bin_kind
    made input_bin from image_list images size aipp
    finish
fi

if begin 5 "input_bin -> deepmar.info"; then
    verify input_bin=4
    "$python" "$here/get_info.py" ./input_bin deepmar.info "$width" "$height"
    made deepmar.info from input_bin
    finish
fi

if begin 6 "inference on backend $backend, device $device_id"; then
    for batch in $batch_size; do
        names_of $batch
        verify input_bin=4 deepmar.info=5 $model=$model_stage
        announce
        scratch "$result"
        if [ "$backend" = ais_bench ]; then # it shares the images among the devices itself
            ais_bench_files give ../input_bin ../$model
            tool ais_bench_bs$batch "$user_python" -m ais_bench --model $model --input input_bin --output result \
                --output_dirname $ais_bench_folder --outfmt BIN --batchsize $batch --device ${device_id// /,} $divide_input
            ais_bench_files collect ../input_bin ../$model $batch "$work_dir/logs/ais_bench_bs$batch.log" $device_id
        else
            ln -s ../input_bin ../deepmar.info ../$model .
            program=("$python" "$here/tools/benchmark.py" "${runtime_options[@]}")
            [ "$backend" = onnxruntime ] || program=("$benchmark")
            for device in $device_id; do # several devices share the images and run at the same time
                on_device ${backend}_bs${batch}_device$device "${program[@]}" -model_type=vision -batch_size=$batch -device_id=$device \
                    -om_path=$model -input_width=$width -input_height=$height -input_text_path="$(info_of $device)" \
                    -useDvpp=false -output_binary=true
            done
            all_devices
        fi
        [ "$pure" = no ] || pure_inference
        collect "$result" # checks the results, and replaces those of an earlier run
    done
    finish
fi

if begin 7 "accuracy and throughput"; then
    choose_published
    rows=() all_results=()
    for batch in $batch_size; do
        names_of $batch
        verify "${results[@]/%/=6}"
        scratch "$result"
        score "$python" "$here/postprocess_deepmar_pytorch.py" "${results[@]/#/$work_dir/}" "$label_file" \
            --image_list "$image_list" ${published:+--published "$published"} ${attributes:+--attributes "$attributes"} \
            ${described:+--model "$described"} ${thresholds:+--thresholds "$thresholds"} --intervals ${groups:+--groups "$groups"}
        read -r model runner <<<"$(inputs get "${results[0]}" model backend)" # as stage 6 recorded them
        rows+=(--run "$batch" "$result" "$model" "$runner")
        all_results+=("${results[@]}")
    done
    "$python" "$here/tools/run/table.py" throughput "${rows[@]}" --devices $device_id --chips $chips $int8_option
    made throughput.csv from batch_size device_id "${all_results[@]}"
    finish
fi

if begin 8 "report -> report.html"; then
    names_of ${batch_size##* } # the page shows the results of the last batch size
    verify "${results[@]/%/=6}" throughput.csv=7 "$result/fusion_result.json=7"
    "$python" "$here/tools/report.py" --images "$images" --list "$image_list" --labels "$label_file" \
        --results "${results[@]}" --fusion "$result/fusion_result.json" --throughput throughput.csv --output report.html \
        ${described:+--model "$described"} ${groups:+--groups "$groups"}
    finish
    say "open $work_dir/report.html in a browser"
fi
[ -z "$dropped" ] || fail "the accuracy at batch size $dropped is more than 1 % below the published one"
