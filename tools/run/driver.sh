# Functions of run_all.sh: options and their checks, the work folder and its locks, the start and end of a stage, and the
# records of what each file was made from. run_all.sh sources this file, which uses its variables.
# shellcheck shell=bash disable=SC2034,SC2154
set -euo pipefail

names="checkpoint images image_list label_file attributes thresholds published_acc size aipp last_conv_stride state_dict
chip_name backend provider tolerance pure batch_size device_id work_dir sample_size python set_env chips strict stage stop_stage check json"

say() { printf '[run_all] %s\n' "$*"; }
fail() { printf 'run_all.sh: error: %s\n' "$*" >&2; exit 1; }
usage() { printf 'run_all.sh: error: %s; --help lists the options\n' "$*" >&2; exit 2; }
runs() { [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ]; } # runs N: whether stage N is to run

# shellcheck source=tools/run/backend.sh
source "$here/tools/run/backend.sh"

# start_run ARGUMENT ...: does everything that comes before the first stage
start_run() {
    read_options "$@"
    check_options
    check_given
    command -v "$python" >/dev/null || fail "$python: no such Python; set the variable python, or give --python"
    read_set_env
    [ -z "$check" ] || check_machine
    choose_backend
    choose_chip
    check_ais_bench
    open_work_folder
    choose_python
    cd "$work_dir"
    work_dir=$PWD
    sample_paths
    check_inputs
    mkdir -p logs
    trap ended EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# --- options --------------------------------------------------------------------------------------------------------

help() { # prints the comments at the top of run_all.sh and those of its variables
    sed -n '2,/^\[/{s/^# \{0,1\}//; /^\[/!p}' "$here/run_all.sh"
    sed -n 's/^\([a-z_]*\)=\${.*[-]\(.*\)}\{1,2\} *# *\(.*\)/\1 \3/p; s/^ \{30,\}# /. /p' "$here/run_all.sh" |
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
        case " ${names//$'\n'/ } " in *" $name "*) printf -v "$name" %s "$value" ;; *) usage "--${name//_/-} is not an option" ;; esac
    done
}

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
    [[ $size == *\ * && $size != *\ *\ * ]] || usage "size must be height and width in pixels, such as 224 224, not '$size'"
    height=${size% *} width=${size#* }
    for name in aipp pure; do [[ ${!name} =~ ^(yes|no)$ ]] || usage "$name must be yes or no, not '${!name}'"; done
    uint8=()
    [ "$aipp" = no ] || uint8=(--uint8)
    [[ $last_conv_stride =~ ^[12]$ ]] || usage "last_conv_stride must be 1 or 2, not '$last_conv_stride'"
    [[ $sample_size =~ ^[1-9][0-9]*$ ]] || usage "sample_size must be a positive whole number, not '$sample_size'"
    for name in stage stop_stage; do
        [[ ${!name} =~ ^[0-8]$ ]] || usage "$name must be one of 0 to 8, not '${!name}'"
    done
    [[ $chips =~ ^([1-9][0-9]?)?$ ]] || usage "chips must be a positive whole number, not '$chips'"
    for name in check strict; do [[ ${!name} =~ ^(yes)?$ ]] || usage "$name must be yes or empty, not '${!name}'"; done
    [ -z "$json" ] || [ -n "$check" ] || usage "json needs --check"
    [[ $chip_name =~ ^((Ascend)?[0-9]+[A-Za-z0-9_-]*)?$ ]] || usage "chip_name must be a name such as Ascend310 or 310P3, not '$chip_name'"
    [[ $published_acc =~ ^(100(\.0*)?|[0-9]{1,2}(\.[0-9]*)?|\.[0-9]+)?$ ]] ||
        usage "published_acc must be a number such as 0.789 or 78.9, not '$published_acc'"
    [[ $tolerance =~ ^(0?\.[0-9]+|[0-9]e-[0-9]+)?$ ]] || usage "tolerance must be a fraction such as 0.01, not '$tolerance'"
    case $backend in auto | benchmark | ais_bench | onnxruntime) ;; *)
        usage "backend must be auto, benchmark, ais_bench or onnxruntime, not '$backend'" ;;
    esac
    read -ra devices <<<"$device_id"
    model_settings=(size="$size" last_conv_stride="$last_conv_stride" state_dict="$state_dict")
}

# check_given: checks that each stage has the data that it needs. The sample is used as a whole or not at all, because the
# accuracy of the user's checkpoint on the sample's drawings would mean nothing.
check_given() {
    local name needed
    sample=yes
    for name in checkpoint images image_list label_file attributes thresholds; do
        [ -n "${!name}" ] || continue
        case $name in attributes | thresholds) ;; *) sample='' ;; esac
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

# --- the work folder ------------------------------------------------------------------------------------------------

# locked ARGUMENT ...: calls flock, whose status 1 means that another run has the lock. Without locks, it only prints a note.
locked() {
    local status=0
    flock "$@" 2>/dev/null || status=$?
    [ "$status" -le 1 ] || say "note: the file system of $work_dir has no locks; do not start a second run in this folder"
    [ "$status" != 1 ]
}

# A run that makes files locks the folder for itself. Runs that only infer and score (--stage 6) share it on different devices.
open_work_folder() {
    local device lock mode=-x
    mkdir -p "$work_dir"
    exec 8<"$work_dir"
    for device in "${devices[@]}"; do
        exec {lock}>>"$work_dir/.device$device.lock"
        locked -n "$lock" ||
            fail "$work_dir: another run is at work on device $device in this folder; wait, or choose another --work-dir"
    done
    [ "$stage" -lt 6 ] || mode=-s
    locked -n $mode 8 || {
        say "waiting for the run on another device in $work_dir"
        locked $mode 8
    }
}

# needed_packages: sets packages to those that the requested stages need
needed_packages() {
    packages=(numpy)
    if [ -n "$sample" ] && runs 0; then packages+=(torch torchvision Pillow tqdm); fi
    if runs 1; then packages+=(torch torchvision onnx onnxruntime); fi
    if runs 2 || [ -n "${make_twin-}" ]; then packages+=(onnx onnxruntime); fi
    if runs 4; then packages+=(Pillow tqdm); fi
    if runs 6 && [ "$backend" = onnxruntime ]; then packages+=(onnx onnxruntime tqdm); fi
    if runs 8; then packages+=(Pillow tqdm jinja2); fi
}

# choose_python: sets python to one that has these packages
choose_python() {
    requested=$python
    needed_packages
    python=$(PYTHON=$python "$here/tools/run/python.sh" requirements.txt "${packages[@]}") ||
        fail "there is no Python with the packages; see above"
}

sample_paths() {
    if [ -n "$sample" ]; then
        checkpoint=$work_dir/sample/checkpoint.pth.tar images=$work_dir/sample/images
        image_list=$work_dir/sample/image.txt label_file=$work_dir/sample/label.json
        if [ -z "$attributes" ] && { runs 0 || [ -e "$work_dir/sample/attributes.txt" ]; }; then
            attributes=$work_dir/sample/attributes.txt
        fi
    fi
    data=(image_list="$image_list" images="$images" size="$size" aipp="$aipp")
}

# check_inputs: checks the user's lists before any work
check_inputs() {
    local count=
    [ -n "$sample" ] || count=$(inputs check ${image_list:+--image-list "$image_list"} ${images:+--images "$images"} \
        ${label_file:+--label-file "$label_file"} ${attributes:+--attributes "$attributes"} \
        ${thresholds:+--thresholds "$thresholds"}) || exit 1
    export_options=(${state_dict:+--state-dict "$state_dict"} ${count:+--num-att "$count"} ${attributes:+--attributes "$attributes"})
    [ "$size" = "224 224" ] || export_options+=(--size "$height" "$width")
    [ "$last_conv_stride" = 2 ] || export_options+=(--last-conv-stride "$last_conv_stride")
}

# --- stages ---------------------------------------------------------------------------------------------------------

# begin N TEXT: returns whether stage N is to run. Prints its name and remembers it for an error message
current='' scratch='' table_inputs=()
begin() {
    runs "$1" || return 1
    current=$1 table_inputs=()
    started=$SECONDS
    say "stage $1: $2"
}
finish() {
    say "stage $current done in $((SECONDS - started)) s"
    current=
}
ended() {
    local status=$?
    trap - EXIT
    # shellcheck disable=SC2046 # one number each
    kill $(jobs -p) 2>/dev/null && wait
    [ -z "$scratch" ] || rm -rf "$scratch"
    [ "$status" = 0 ] || [ -z "$current" ] || printf 'run_all.sh: error: stage %s failed\n' "$current" >&2
    exit "$status"
}
end_run() {
    [ -z "${dropped-}" ] || fail "the accuracy at batch size $dropped is more than 1 % below the published one"
}

# need FILE STAGE: stops if an earlier stage's output is missing
need() { [ -e "$1" ] || fail "$work_dir/${1#"$work_dir"/} is missing; run stage $2 first"; }

# These keep and check the records of what each file was made from: see tools/run/inputs.py.
inputs() { "$python" "$here/tools/run/inputs.py" "$@"; }
record() { inputs record "$@"; }
fresh() { inputs fresh "$@" || exit 1; }

# names_of BATCH: sets the names of a batch size's files. If there are several batch sizes, each has its own folder of results.
names_of() {
    onnx=deepmar_bs$1.onnx nopad=deepmar_bs${1}_nopad.onnx twin=deepmar_bs${1}_aipp.onnx om=deepmar_bs$1.om result=result
    [ "$batch_size" = "$1" ] || result=result_bs$1
    model=$om model_stage=3
    [ "$backend" != onnxruntime ] || model=$nopad model_stage=2
    [ "$backend$aipp" != onnxruntimeyes ] || model=$twin model_stage=3
    described=()
    [ ! -e "deepmar_bs$1.json" ] || described=(--model "$work_dir/deepmar_bs$1.json") # the model's description
    folders=("${devices[@]/#/$result/dumpOutput_device}")
}

# belongs [CHECK ...]: stops unless all existing input of stages 6 to 8 was made from the data and settings of this run
belongs() {
    local checks=()
    [ ! -e input_bin ] || checks+=(-- input_bin 4 "${data[@]}")
    [ ! -e deepmar.info ] || checks+=(-- deepmar.info 5 bins=input_bin)
    [ ! -e "$onnx" ] || checks+=(-- "$onnx" 1 checkpoint="$checkpoint" "${model_settings[@]}")
    [ ! -e "$nopad" ] || checks+=(-- "$nopad" 2 onnx="$onnx")
    [ "$model" = "$nopad" ] || [ ! -e "$model" ] || checks+=(-- "$model" 3 model="$nopad" aipp="$aipp")
    checks+=("$@") # last, so that the message names the earliest stage that is wrong
    [ ${#checks[@]} = 0 ] || fresh "${checks[@]}"
}

# results_belong: does the same for stages 7 and 8. Sets model and ran to the model and the backend that made the results.
results_belong() {
    local folder recorded results=()
    for folder in "${folders[@]}"; do need "$folder" 6; done
    recorded=$(inputs get "${folders[0]}" model_name backend)
    mapfile -t recorded <<<"$recorded"
    model=${recorded[0]:-$model} ran=${recorded[1]:-unknown}
    for folder in "${folders[@]}"; do
        results+=(-- "$folder" 6 info=deepmar.info model="$model")
        table_inputs+=("$folder=$folder")
    done
    belongs "${results[@]}"
}

# score: computes the accuracy of one batch size's results. A drop only fails the run at the end, after the table and the report
score() {
    local published=$published_acc
    if [ -z "$published" ] && [ -n "$sample" ]; then
        published=$(cat sample/accuracy.txt)
        say "the sample has no published accuracy, so the results are compared with PyTorch's on the same images"
    fi
    if [ -z "${scoring-}" ]; then # only one run at a time may write the files of stages 7 and 8, so that they match each other
        exec {scoring}>>.scoring.lock
        locked "$scoring"
    fi
    new_scratch "$result"
    if ! (cd "$scratch" && "$python" "$here/postprocess_deepmar_pytorch.py" "${folders[@]/#/$work_dir/}" "$label_file" \
        --image_list "$image_list" ${published:+--published "$published"} ${attributes:+--attributes "$attributes"} \
        "${described[@]}" ${thresholds:+--thresholds "$thresholds"} --intervals); then
        [ -e "$scratch/fusion_result.json" ] || exit 1
        dropped=${dropped-}${dropped:+, }$batch
    fi
    cp "$scratch/fusion_result.json" "$scratch/copy"
    mv "$scratch/fusion_result.json" "$result/"
    mv "$scratch/copy" fusion_result.json
}
