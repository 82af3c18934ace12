# The machinery of run_all.sh, which sources this file: options, the work folder, stages, records of what files were made from.
# shellcheck shell=bash disable=SC2034,SC2046,SC2154

unset GREP_OPTIONS MPLBACKEND POSIXLY_CORRECT PYTHONINSPECT # grep, a notebook's children, bash and Python would behave otherwise
shopt -u patsub_replacement 2>/dev/null || : # with it, ${x/y/$work_dir} does not keep an & in the folder's name
say() { printf '[run_all] %s\n' "$*"; }
fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 1; }
usage() { printf 'run_all.sh: error: %s; --help lists the options\n' "$*" >&2; exit 2; }
runs() { [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ]; } # runs N: whether stage N is to run

# shellcheck source=tools/run/backend.sh
source "$here/tools/run/backend.sh"

# start_run ARGUMENT ...: does everything that comes before the first stage. It sets sample (yes: no data was given), height, width,
# num_att (attributes in the labels), devices (a list), user_python (as given, for ais_bench), and what stage 3 makes:
# make_om (an OM), amct (an INT8 one with amct_onnx), make_twin (an ONNX model in its place), calibrate (by calibration images).
# ONNX Runtime runs deepmar_bs1$twin.onnx, or with AIPP deepmar_bs1$aipp_twin.onnx
start_run() {
    options=$(sed -n 's/^\([a-z0-9_]*\)=\${.*}.* # .*/\1/p' "$here/run_all.sh") # the names of the variables
    read_options "$@"
    check_options
    check_given
    use_utf8
    command -v "$python" >/dev/null || fail "$python: no such Python; set the variable python, or give --python"
    read_set_env
    [ -z "$check" ] || check_machine
    choose_backend
    check_stage_3
    choose_chip
    [ -n "$make_om" ] || check_oms "$batch_size"
    check_ais_bench
    open_work_folder
    user_python=$python
    python=$(PYTHON=$python bash -p "$here/tools/run/python.sh" requirements.txt $(needed_packages)) ||
        fail "there is no Python with the packages; see above"
    cd "$work_dir"
    work_dir=$PWD
    check_data
    trap on_exit EXIT
    trap 'exit 130' INT && trap 'exit 143' TERM
}

help() { # prints the comments at the top of run_all.sh and those of its variables
    sed -n '3,/^case/{s/^# \{0,1\}//; /^case/!p}' "$here/run_all.sh"
    sed -n 's/^\([a-z0-9_]*\)=\${.*[-]\(.*[^}]\)}\{1,2\} *# *\(.*\)/\1 \3 [\2]/p; t; s/^\([a-z0-9_]*\)=\${.*} *# */\1 /p; s/^ \{30,\}# /. /p' \
        "$here/run_all.sh" |
        while read -r name text; do
            [ "$name" = . ] && name='' || name=--${name//_/-}
            printf '  %-18s %s\n' "$name" "$text"
        done
}

read_options() {
    local name value
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) help && exit ;;
            --check | --strict) name=$1 value=yes && shift ;;
            --*=*) name=${1%%=*} value=${1#*=} && shift ;;
            --*) [ $# -gt 1 ] || usage "$1 needs a value"
                name=$1 value=$2 && shift 2
                if [ "$name" = --size ] && [[ $value =~ ^[0-9]+$ && ${1-} =~ ^[0-9]+$ ]]; then # --size H W
                    value="$value $1" && shift
                fi ;;
            *) usage "$1 is not an option" ;;
        esac
        name=${name#--} name=${name//-/_}
        case " ${options//$'\n'/ } " in *" $name "*) printf -v "$name" %s "$value" ;; *) usage "--${name//_/-} is not an option" ;; esac
    done
}

# matches NAME PATTERN TEXT: checks a variable's value
matches() { [[ ${!1} =~ ^($2)$ ]] || usage "$1 must be $3, not '${!1}'"; }

# numbers NAME PATTERN TEXT [twice]: checks that the variable holds one or several numbers, all different unless twice is given
numbers() {
    local list=${!1//,/ } number
    read -ra list <<<"${list//$'\n'/ }"
    [ ${#list[@]} -gt 0 ] || usage "$1 must be $3, not '${!1}'"
    for number in "${list[@]}"; do [[ $number =~ ^$2$ ]] || usage "$1 must be $3, not '$number'"; done
    number=$(printf '%s\n' "${list[@]}" | sort | uniq -d | head -n 1)
    [ -z "$number" ] || [ $# = 4 ] || usage "$1 names $number twice"
    printf -v "$1" %s "${list[*]}"
}

check_options() {
    local name
    numbers batch_size '[1-9][0-9]{0,5}' "a positive whole number, or several"
    numbers device_id '(0|[1-9][0-9]{0,5})' "a whole number, or several"
    numbers size '[1-9][0-9]{0,4}' "height and width in pixels, such as 224 224" twice
    matches size '[0-9]+ [0-9]+' "height and width in pixels, such as 224 224"
    matches pure 'yes|no' "yes or no"
    matches int8 'yes|no' "yes or no"
    matches aipp 'yes|no|nv12-(601|709|jpeg)' "yes, no, nv12-601, nv12-709 or nv12-jpeg"
    [ -z "$card_model" ] || [ "$int8" = yes ] || usage "card_model is an INT8 model: give --int8 yes, too"
    [ -z "$card_model" ] || [[ $batch_size != *" "* ]] || usage "card_model has one batch size, but batch_size is $batch_size"
    [[ $aipp != nv12-* || $size =~ ^[0-9]*[02468]' '[0-9]*[02468]$ ]] || usage "aipp $aipp needs an even height and width, not $size"
    for name in check strict; do matches $name '(yes)?' "yes or empty"; done
    for name in stage stop_stage; do matches $name '[0-8]' "one of 0 to 8"; done
    [ "$stage" -le "$stop_stage" ] || usage "stage is $stage and stop_stage $stop_stage, so no stage would run"
    matches last_conv_stride '[12]' "1 or 2"
    matches sample_size '[1-9][0-9]*' "a positive whole number"
    matches chips '([1-9][0-9]?)?' "a positive whole number"
    matches chip_name '((Ascend)?[0-9]+[A-Za-z0-9_-]*)?' "a name such as Ascend310 or 310P3"
    matches published_acc '(100(\.0*)?|[0-9]{1,2}(\.[0-9]*)?|\.[0-9]+)?' "a number such as 0.789 or 78.9"
    matches atc_options '(--[a-z].*)?' "options of atc, such as --precision_mode_v2=origin"
    matches tolerance '(0?\.[0-9]+|[0-9]e-[0-9]+)?' "a fraction such as 0.01"
    matches backend 'auto|benchmark|ais_bench|onnxruntime' "auto, benchmark, ais_bench or onnxruntime"
    [ -z "$json" ] || [ -n "$check" ] || usage "json needs --check"
    for name in work_dir set_env; do [[ ${!name} != -* ]] || printf -v "$name" %s "./${!name}"; done # commands would take -x for an option
    height=${size% *} width=${size#* } twin=_nopad aipp_twin=_aipp int8_option=''
    [ "$int8" = no ] || twin=_int8 aipp_twin=_int8_aipp int8_option=--int8
    read -ra devices <<<"$device_id"
}

# check_given: checks that each stage has the data that it needs. The sample is used as a whole or not at all, because the
# accuracy of the user's checkpoint on the sample's drawings would mean nothing.
check_given() {
    local name needed
    sample=yes
    for name in checkpoint images image_list label_file calibration_list calibration_images attributes thresholds groups card_model; do
        [ -n "${!name}" ] || continue
        case $name in attributes | thresholds | groups | card_model) ;; *) sample='' ;; esac
        [ -e "${!name}" ] || [ -n "$check" ] || fail "$name: ${!name}: no such file or folder"
        printf -v "$name" %s "$(realpath -m -- "${!name}")"
    done
    if [ -n "$sample$check" ]; then return; fi
    for needed in "1 checkpoint" "4 images" "4 image_list" "7 image_list" "7 label_file" "8 images"; do
        name=${needed#* }
        ! runs "${needed% *}" || [ -n "${!name}" ] ||
            usage "$name is not set, and stage ${needed% *} needs it: set it, or leave the stage out (--stage, --stop-stage)"
    done
}

# use_utf8: in a locale such as zh_CN.GBK, makes Python take file names to be UTF-8, like the lists, and print in the terminal's
# encoding. In the locale C, Python does so itself.
use_utf8() {
    case $(locale charmap 2>/dev/null) in '' | UTF-8 | ANSI*) return ;; esac
    export PYTHONIOENCODING=${PYTHONIOENCODING-$(locale charmap):backslashreplace} PYTHONUTF8=1
}

# --- the work folder ------------------------------------------------------------------------------------------------

# locked ARGUMENT ...: calls flock, whose status 1 means that another run has the lock. Without locks, it only prints a note.
locked() {
    flock "$@" 2>/dev/null && return
    [ $? != 1 ] || return 1
    say "note: the file system of $work_dir has no locks; do not start a second run in this folder"
}

# A run that makes files locks the folder for itself. Runs that only infer and score (--stage 6) share it on different devices.
open_work_folder() {
    local device lock mode=-x
    mkdir -p "$work_dir/logs"
    exec 8<"$work_dir"
    for device in "${devices[@]}"; do
        exec {lock}>>"$work_dir/.device$device.lock"
        locked -n "$lock" ||
            fail "$work_dir: another run is at work on device $device in this folder; wait, or choose another --work-dir"
    done
    [ "$stage" -lt 6 ] || mode=-s
    locked -n $mode 8 || { say "waiting for the run on another device in $work_dir" && locked $mode 8; }
}

# needed_packages: prints those that the requested stages need
needed_packages() {
    local packages=(numpy)
    if [ -n "$sample" ] && runs 0; then packages+=(torch torchvision Pillow tqdm); fi
    if runs 1; then packages+=(torch torchvision onnx onnxruntime); fi
    if runs 2 || [ -n "$make_twin$calibrate" ] || { [ -n "$card_model" ] && runs 3; }; then packages+=(onnx onnxruntime); fi
    if runs 4 || [ -n "$calibrate" ]; then packages+=(Pillow tqdm); fi
    if runs 6 && [ "$backend" = onnxruntime ]; then packages+=(onnx onnxruntime tqdm); fi
    if runs 8; then packages+=(Pillow tqdm jinja2); fi
    echo "${packages[@]}"
}

# check_data: checks the user's lists before any work, and sets num_att to the number of attributes in the labels. Without data of
# the user, it sets the paths to the sample's
check_data() {
    if [ -n "$card_model" ] && runs 3; then
        "$python" "$here/tools/run/inputs.py" card_model "$card_model" "$batch_size" 3 "$height" "$width" || exit 1
    fi
    num_att=
    if [ -z "$sample" ]; then
        num_att=$("$python" "$here/tools/run/inputs.py" lists ${image_list:+--image-list "$image_list"} \
            ${images:+--images "$images"} ${label_file:+--label-file "$label_file"} ${attributes:+--attributes "$attributes"} \
            ${thresholds:+--thresholds "$thresholds"} ${groups:+--groups "$groups"} \
            ${calibrate:+--calibration-list "$calibration_list" --calibration-images "$calibration_images"}) || exit 1
        return
    fi
    checkpoint=$work_dir/sample/checkpoint.pth.tar images=$work_dir/sample/images
    image_list=$work_dir/sample/image.txt label_file=$work_dir/sample/label.json
    calibration_list=$work_dir/sample/calibration.txt calibration_images=$work_dir/sample/calibration_images
    if [ -z "$attributes" ] && { runs 0 || [ -e sample/attributes.txt ]; }; then attributes=$work_dir/sample/attributes.txt; fi
}

# --- stages ---------------------------------------------------------------------------------------------------------

current='' scratch_folder='' dropped='' scoring=''
begin() {
    runs "$1" || return 1
    current=$1 started=$SECONDS
    say "stage $1: $2"
}
finish() { say "stage $current done in $((SECONDS - started)) s" && current=; }
on_exit() {
    local status=$?
    trap - EXIT
    kill $(jobs -p) 2>/dev/null && wait
    [ -z "$scratch_folder" ] || rm -rf "$scratch_folder"
    [ "$status" = 0 ] || [ -z "$current" ] || printf 'run_all.sh: error: stage %s failed\n' "$current" >&2
    exit "$status"
}

inputs() { # keeps and checks the records of what each file was made from
    "$python" "$here/tools/run/inputs.py" "$@" -- checkpoint="$checkpoint" image_list="$image_list" images="$images" size="$size" \
        aipp="$aipp" last_conv_stride="$last_conv_stride" state_dict="$state_dict" batch_size="$batch_size" device_id="$device_id" \
        atc_options="$atc_options" int8="$int8" card_model="$card_model" calibration_list="$calibration_list" \
        calibration_images="$calibration_images"
}
made() { inputs made "$current" "$1" "${@:3}"; } # the second word is "from"
verify() { inputs verify "$@" || exit 1; }

# names_of BATCH_SIZE: sets model to the file that stage 6 runs, model_stage to the stage that makes it, result to stage 6's folder,
# results to the folders in it, one for each device, and described to the model's description, if there is one
names_of() {
    model=deepmar_bs$1.om model_stage=3
    case $backend$int8$aipp in
        onnxruntimenono) model=deepmar_bs$1$twin.onnx model_stage=2 ;;
        onnxruntimeyesno) model=deepmar_bs$1$twin.onnx ;;
        onnxruntime*) model=deepmar_bs$1$aipp_twin.onnx ;;
    esac
    [ "$batch_size" = "$1" ] && result=result || result=result_bs$1
    results=("${devices[@]/#/$result/dumpOutput_device}")
    described=$work_dir/deepmar_bs$1.json
    [ -e "$described" ] || described=''
}

# choose_images LIST FILE: writes a list of as many images of LIST as calibration needs
choose_images() {
    verify "$1=0"
    inputs spread "$@"
}

# choose_published: sets published to the accuracy to compare with
choose_published() {
    published=$published_acc
    if [ -z "$published" ] && [ -n "$sample" ]; then
        published=$(verify sample/accuracy.txt=0 && cat sample/accuracy.txt)
        say "the sample has no published accuracy, so the results are compared with PyTorch's on the same images"
    fi
}

# scratch NAME: makes an empty folder in the work folder and goes there. The folder's name holds the devices, so a run deletes only
# what killed runs on its own devices left.
scratch() {
    local device
    cd "$work_dir"
    for device in "${devices[@]}"; do rm -rf ./*.partial*"-$device-"*; done
    scratch_folder=$work_dir/$1.partial-${device_id// /-}-
    mkdir "$scratch_folder"
    cd "$scratch_folder"
}

# score COMMAND ...: runs stage 7's script in the scratch folder and moves its file into the folder of results and the work folder.
# A drop of the accuracy only fails the run at its end, after the table and the report.
score() {
    if [ -z "$scoring" ]; then # only one run at a time may write the files of stages 7 and 8, so that they match each other
        exec {scoring}>>"$work_dir/.scoring.lock"
        locked "$scoring"
    fi
    [ "$batch_size" = "$batch" ] || say "batch size $batch"
    if ! "$@"; then
        [ -e fusion_result.json ] || exit 1
        dropped=$dropped${dropped:+, }$batch
    fi
    cp fusion_result.json copy
    mv fusion_result.json "../$result/"
    mv copy ../fusion_result.json
    cd "$work_dir"
}
