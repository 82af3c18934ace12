"""The files that ais_bench takes and leaves. run_all.sh calls this around stage 6:

    PYTHON tools/ais_bench_files.py check WORK_DIR [PATH ...]
        before any work, in the Python that will run ais_bench: fails where it has no ais_bench.infer and aclruntime, or
        where ais_bench would refuse the work folder's path, or the owner of a file or folder that is there already
    python3 tools/ais_bench_files.py give BINS MODEL
        puts input_bin/, the model and result/ into the current folder, as ais_bench takes them
    python3 tools/ais_bench_files.py collect BINS DEVICE [DEVICE ...]
        moves what it left to result/dumpOutput_device<D> and ..._summary.json, and gives results the images' names back

Versions since 2024 refuse symbolic links, names of other characters than A-Z a-z 0-9 _ - and the dot, what the group or
others may write, and what belongs to another user and group.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
from common import command, note  # neither needs a package, as the Python of ais_bench may have few
from get_info import natural

SAFE = re.compile("[A-Za-z0-9_./-]+").fullmatch


def has(module):
    """Whether this Python has a module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its package is a plain file
        return False


def check(work, *paths):
    """Raises ValueError, with the remedy, where ais_bench cannot run on these paths."""
    pip = sys.executable + " -m pip"
    install = "%s install aclruntime-VERSION-linux_%s.whl ais_bench-VERSION-py3-none-any.whl" % (pip, os.uname().machine)
    if has("ais_bench") and not has("ais_bench.infer"):
        raise ValueError("backend ais_bench: the package of %s has no ais_bench.infer: it is not the inference tool but, as it "
                         "seems, PyPI's ais_bench_benchmark, for language models; run: %s uninstall ais_bench_benchmark && %s"
                         % (sys.executable, pip, install))
    missing = [module for module in ("ais_bench", "aclruntime") if not has(module)]
    if missing:
        raise ValueError("backend ais_bench: %s has no %s; run: %s" % (sys.executable, " and no ".join(missing), install))
    if not has("pkg_resources"):
        note("%s has no pkg_resources, by which ais_bench finds aclruntime's version: the tool of 2024 fails without it, others "
             "run in an older mode; run: %s install 'setuptools<81'" % (sys.executable, pip))
    if not SAFE(os.path.realpath(work)):
        raise ValueError("%s: ais_bench takes only paths of A-Z a-z 0-9 _ - / and the dot; choose another --work-dir"
                         % os.path.realpath(work))
    for path in paths:
        for file in [path] + ([os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []):
            owner = os.stat(file) if os.path.exists(file) else None  # what is missing is told where it is needed
            if owner and owner.st_uid != os.geteuid() and owner.st_gid not in os.getgroups():
                raise ValueError("%s: belongs to user %d and group %d; ais_bench takes only files of the user that runs it or "
                                 "of one of that user's groups; run: chown -R %d %s"
                                 % (file, owner.st_uid, owner.st_gid, os.geteuid(), path))


def staged_names(bins):
    """Returns {name for ais_bench: name} of a folder's bins: numbers instead of the names where one of these is not safe."""
    names = sorted((name for name in os.listdir(bins) if name.endswith(".bin")), key=natural)
    safe = all(map(SAFE, names))
    return {name if safe else "%08d.bin" % number: name for number, name in enumerate(names)}


def give_file(source, target):
    """Makes target a hard link to a file, or else a copy, which only the user may write."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
        os.chmod(target, os.stat(target).st_mode & ~0o022)  # the file's own mode: a hard link has no other
    except OSError:  # another file system, or one without hard links, or another user's file
        if os.path.exists(target):
            os.remove(target)
        shutil.copyfile(source, target)
        os.chmod(target, 0o600)


def give(bins, model):
    for folder in ("input_bin", "result", "result/devices"):  # the last, as its processes may collide in making it
        os.mkdir(folder, 0o750)
    for name, own in staged_names(bins).items():
        give_file(os.path.join(bins, own), os.path.join("input_bin", name))
    give_file(model, os.path.basename(model))


def collect(bins, *devices):
    numbers = {name[:8]: own.split(".")[0] for name, own in staged_names(bins).items() if name != own}

    def own(path):
        """A numbered file's path with the image's name."""
        folder, name = os.path.split(path)
        return os.path.join(folder, numbers.get(name[:8], name[:8]) + name[8:])

    for device in devices:
        folder = "result/dumpOutput_device" + device
        if len(devices) > 1:
            left = [name for name in os.listdir("result/devices") if re.fullmatch("device%s(_[0-9]+)?" % device, name)]
            if len(left) != 1:
                raise ValueError("ais_bench left no results of device %s" % device)
            for ending in ("", "_summary.json"):
                os.rename("result/devices/" + left[0] + ending, folder + ending)
        if not numbers:
            continue
        os.rename(folder, "numbered")
        os.mkdir(folder)
        for name in os.listdir("numbered"):
            os.rename(os.path.join("numbered", name), own(os.path.join(folder, name)))
        os.rmdir("numbered")
        with open(folder + "_summary.json") as f:
            summary = json.load(f)
        for files in summary.get("filesinfo", {}).values():
            for kind, paths in files.items():
                files[kind] = [own(path) for path in paths]
        with open(folder + "_summary.json", "w") as f:
            json.dump(summary, f)
    shutil.rmtree("result/devices")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("action", choices=["check", "give", "collect"])
    parser.add_argument("arguments", nargs="+", metavar="ARGUMENT")
    args = parser.parse_args(argv)
    {"check": check, "give": give, "collect": collect}[args.action](*args.arguments)


if __name__ == "__main__":
    command(main)
