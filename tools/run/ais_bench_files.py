"""Prepares the files for ais_bench and collects its results. run_all.sh calls this script around stage 6:

    PYTHON tools/run/ais_bench_files.py check WORK_DIR [PATH ...]
        runs before any work, in the Python that will run ais_bench. It fails if this Python has no ais_bench.infer or
        aclruntime, or no pkg_resources for a version that cannot do without, or if ais_bench would refuse the work folder's path
        or the owner of an existing file or folder
    PYTHON tools/run/ais_bench_files.py options
        prints the option that makes ais_bench divide the images among several devices. It fails if ais_bench does not start
    python3 tools/run/ais_bench_files.py give BINS MODEL
        puts input_bin/, the model and result/ into the current folder, in a form that ais_bench accepts
    python3 tools/run/ais_bench_files.py collect BINS MODEL BATCH_SIZE LOG DEVICE [DEVICE ...]
        checks ais_bench's log, moves its output to result/dumpOutput_device<D> and ..._summary.json, and names the results
        after the images

Versions since 2024 refuse symbolic links, names with characters other than A-Z a-z 0-9 _ - and the dot, files that the group
or others may write, and files of another user and another group.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from lib.names import natural
from lib.script import command, has_module, note  # both work without packages, because ais_bench's Python may have few

SAFE_NAME = re.compile("[A-Za-z0-9_./-]+")
LAST_WHEEL = (3, 12)  # there are wheels of aclruntime from Python 3.7 to this one
# Without pkg_resources, the version of 2024 fails here: it reads a variable that it has not set.
VERSION_CHECK = "import argparse; from ais_bench.infer.miscellaneous import version_check; version_check(argparse.Namespace())"


def check(work, *paths):
    """Raises ValueError with the remedy if ais_bench cannot run on these paths."""
    pip = sys.executable + " -m pip"
    install = "%s install aclruntime-VERSION-linux_%s.whl ais_bench-VERSION-py3-none-any.whl" % (pip, os.uname().machine)
    if has_module("ais_bench") and not has_module("ais_bench.infer"):
        raise ValueError("backend ais_bench: the package of %s has no ais_bench.infer: it is not the inference tool, but probably "
                         "PyPI's ais_bench_benchmark for language models; run: %s uninstall ais_bench_benchmark && %s"
                         % (sys.executable, pip, install))
    missing = [module for module in ("ais_bench", "aclruntime") if not has_module(module)]
    if "aclruntime" in missing and sys.version_info[:2] > LAST_WHEEL:
        install = ("there are wheels of aclruntime up to Python %d.%d: name such a Python with --python, or build it from a source of "
                   "late 2025 or newer, in ais-bench_workload/tool/ais_bench; run: CANN_PATH=/FOLDER/OF/CANN %s install ./backend ."
                   % (LAST_WHEEL + (pip,)))
    else:
        install = "run: " + install
    if missing:
        raise ValueError("backend ais_bench: %s has no %s; %s" % (sys.executable, " and no ".join(missing), install))
    if not has_module("pkg_resources"):
        text = "%s has no pkg_resources, with which ais_bench finds aclruntime's version" % sys.executable
        remedy = "%s install 'setuptools<81'" % pip
        process = subprocess.run([sys.executable, "-c", VERSION_CHECK], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if b"UnboundLocalError" in process.stderr:
            raise ValueError("backend ais_bench: %s; this version of ais_bench fails without it; run: %s" % (text, remedy))
        note("%s. Without it, ais_bench runs in an older mode; run: %s" % (text, remedy))
    if not SAFE_NAME.fullmatch(os.path.realpath(work)):
        raise ValueError("%s: ais_bench takes only paths of A-Z a-z 0-9 _ - / and the dot; choose another --work-dir"
                         % os.path.realpath(work))
    for path in paths:
        for file in [path] + ([os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []):
            owner = os.stat(file) if os.path.exists(file) else None  # later checks report missing files
            if owner and owner.st_uid != os.geteuid() and owner.st_gid not in os.getgroups():
                raise ValueError("%s: belongs to user %d and group %d; ais_bench takes only files of the user that runs it or "
                                 "of one of that user's groups; run: chown -R %d %s"
                                 % (file, owner.st_uid, owner.st_gid, os.geteuid(), path))


def options():
    """Prints --divide_input 1 if ais_bench has this option. Without it, versions since 2024 give each device all images."""
    process = subprocess.run([sys.executable, "-m", "ais_bench", "--help"], cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             universal_newlines=True)
    if process.returncode:
        raise ValueError("backend ais_bench: %s -m ais_bench --help ends with: %s; install what is missing; if that is a library, "
                         "source CANN's set_env.sh" % (sys.executable, process.stdout.strip().split("\n")[-1]))
    if "--divide_input" in process.stdout:
        print("--divide_input 1")


def check_log(model, batch_size, log):
    """Raises ValueError if ais_bench's log reports an error, or a batch size that differs from --batchsize.

    ais_bench accepts such a batch size, but computes its throughput from --batchsize.
    """
    with open(log, encoding="utf-8", errors="replace") as f:
        text = f.read()
    errors = re.findall(r"\[ERROR\].*", text)
    if errors:
        raise ValueError("ais_bench reports an error: %s; see %s" % (errors[0], log))
    others = set(re.findall(r"filesperbatch:(\d+) ", text)) - {batch_size}
    if others:
        raise ValueError("%s takes %s images at a time, not %s; put the right OM there, or run stage 3; see %s"
                         % (os.path.basename(model), others.pop(), batch_size, log))


def staged_names(bins):
    """Returns {name for ais_bench: name} of a folder's bins. If one of the names is not safe, all names for ais_bench are numbers."""
    names = sorted((name for name in os.listdir(bins) if name.endswith(".bin")), key=natural)
    safe = all(map(SAFE_NAME.fullmatch, names))
    return {name if safe else "%08d.bin" % number: name for number, name in enumerate(names)}


def give_file(source, target):
    """Makes target a hard link to a file, or else a copy. Only the user may write it."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
        os.chmod(target, os.stat(target).st_mode & ~0o022)  # this also changes the file: a hard link shares its mode
    except OSError:  # target is on another file system, there are no hard links, or it is another user's file
        if os.path.exists(target):
            os.remove(target)
        shutil.copyfile(source, target)
        os.chmod(target, 0o600)


def give(bins, model):
    for folder in ("input_bin", "result", "result/devices"):  # ais_bench's processes may collide when they make devices/
        os.mkdir(folder, 0o750)
    for staged, name in staged_names(bins).items():
        give_file(os.path.join(bins, name), os.path.join("input_bin", staged))
    give_file(model, os.path.basename(model))


def collect(bins, model, batch_size, log, *devices):
    check_log(model, batch_size, log)
    stems = {staged[:8]: name.split(".")[0] for staged, name in staged_names(bins).items() if staged != name}

    def renamed(path):
        """Returns the path of a numbered file, with the image's name in place of the number."""
        folder, name = os.path.split(path)
        return os.path.join(folder, stems.get(name[:8], name[:8]) + name[8:])

    for device in devices:
        folder = "result/dumpOutput_device" + device
        if len(devices) > 1:
            found = [name for name in os.listdir("result/devices") if re.fullmatch("device%s(_[0-9]+)?" % device, name)]
            if len(found) != 1:
                raise ValueError("ais_bench wrote no results for device %s" % device)
            for ending in ("", "_summary.json"):
                os.rename("result/devices/" + found[0] + ending, folder + ending)
        if not stems:
            continue
        os.rename(folder, "numbered")
        os.mkdir(folder)
        for name in os.listdir("numbered"):
            os.rename(os.path.join("numbered", name), renamed(os.path.join(folder, name)))
        os.rmdir("numbered")
        with open(folder + "_summary.json") as f:
            summary = json.load(f)
        for files in summary.get("filesinfo", {}).values():
            for kind, paths in files.items():
                files[kind] = [renamed(path) for path in paths]
        with open(folder + "_summary.json", "w") as f:
            json.dump(summary, f)
    shutil.rmtree("result/devices")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("action", choices=["check", "options", "give", "collect"])
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT")
    args = parser.parse_args(argv)
    {"check": check, "options": options, "give": give, "collect": collect}[args.action](*args.arguments)


if __name__ == "__main__":
    command(main)
