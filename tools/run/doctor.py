"""Finds out what run_all.sh needs and what this machine has: driver, card, CANN, tools that run an OM, packages, disk, inputs.

    bash run_all.sh --check [--json FILE]
        prints all of it as a table before any work, and writes only FILE
    tools/run/doctor.py chip NAME COUNT DEVICE NEEDED
        prints "Ascend310P3 2 NOTE": the chip, how many of them the card with this device has, and a note. An empty NAME or COUNT
        comes from npu-smi info. If NEEDED is empty, an unknown chip is no error
    tools/run/doctor.py set_env
        prints the path of set_env.sh of this machine's CANN, if there is one
    tools/run/doctor.py amct
        prints the command that installs amct_onnx
    tools/run/doctor.py explain LOG CHIP
        prints what to do about the failure in the LOG of atc or of a tool that runs OMs, if it is a known one
    tools/run/doctor.py om WORK_DIR BATCH_SIZES SIZE BINS DEVICES
        stops if an OM in the work folder says that it is for another chip than the devices', or for other input than the run's.
        BINS is the folder of the bins, or yes or no, the value of aipp, if the run will make them

The script needs no packages. No other file reads npu-smi's table and CANN's folders.
"""
import contextlib
import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
from lib import om
from lib.files import write_text
from lib.names import read_list
from lib.script import command, has_module, note

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
MACHINE = os.uname().machine
INPUT_STAGES = {"checkpoint": [1], "images": [4, 8], "image_list": [4, 7], "label_file": [7]}  # the stages that need an input
PIXEL_BYTES = {"no": 12, "yes": 3, "nv12-601": 1.5, "nv12-709": 1.5, "nv12-jpeg": 1.5}  # of a bin, by the value of aipp
TOOLKIT = "bash ./Ascend-cann-toolkit_%%s_linux-%s.run --install" % MACHINE
DRIVER = "bash ./Ascend-hdk-CHIP-npu-driver_VERSION_linux-%s.run" % MACHINE
# AMCT is a package of its own beside CANN; the page "Software Package Upload" of its guide lists what is in it. It needs no card.
AMCT = "tar -xzf Ascend-cann-amct_%%s_linux-%s.tar.gz && cd amct/amct_onnx && python3 -m pip install amct_onnx-*.whl && " \
       "tar -xzf amct_onnx_op.tar.gz && cd amct_onnx_op && python3 setup.py build" % MACHINE
KEEP_CANN = ("; CANN 8.5 and later have none for a 310: keep your present CANN, or install 8.3 or older",
             "bash run_all.sh --set-env /FOLDER/OF/THAT/CANN/set_env.sh")
DETAILS = "export ASCEND_SLOG_PRINT_TO_STDOUT=1 ASCEND_GLOBAL_LOG_LEVEL=1, and repeat the stage: its log then names the cause"
PYTHON_REMEDY = "export PATH=/FOLDER/OF/SUCH/A/PYTHON/bin:$PATH"

# The beginning of a chip's name, the folder of its operators in CANN, and the word for it in the name of their package. The first
# match counts: 910B is an old name of the 910, but 910B3 is a chip of the later 910b.
FAMILIES = [("310P", "ascend310p", "310p"), ("310B", "ascend310b", "310b"), ("310", "ascend310", None),
            ("910_93", "ascend910_93", "A3"), ("910B[1-4]", "ascend910b", "910b"), ("910", "ascend910", "910")]
# The first CANN version of a range, the last Python 3 that its guide allows, and the NumPy that it must be below (before Python 3.13)
PYTHONS = [((9, 1), 14, None), ((9, 0), 13, None), ((8, 5), 13, "2"), ((8, 0), 11, "1.25"), ((7, 0), 10, "2"), ((0,), 9, "2")]
PROTOBUF = "3.20"  # of all guides
# The first CANN version of a range, and the first and the last driver in the tables of its release notes. The last is None if even
# the newest is there. The tables begin with driver 25.0.
DRIVERS = [((9, 2), (25, 3), None), ((9, 1), (25, 2), None), ((8, 5, 2), (25, 0), None), ((8, 5), (25, 0), (25, 5))]
# CANN's guide installs these packages in that Python. atc stops if one of the first five is missing.
PACKAGES = {"attr": "attrs", "decorator": "decorator", "numpy": "numpy", "psutil": "psutil", "scipy": "scipy", "absl": "absl-py",
            "cffi": "cffi", "google.protobuf": "protobuf", "pathlib2": "pathlib2", "requests": "requests", "sympy": "sympy",
            "yaml": "pyyaml"}

# These programs run in other Pythons and print JSON.
MODULES_PROGRAM = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from lib.script import has_module
missing = [name for name in sys.argv[2:] if not has_module(name)]
versions = [name not in missing and getattr(importlib.import_module(name), "__version__", "unknown")
            for name in ("numpy", "google.protobuf")]
print(json.dumps([list(sys.version_info[:3]), missing] + versions))
"""
PROVIDER_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lib.providers import default, import_onnxruntime, provider_note
try:
    onnxruntime = import_onnxruntime()
except ImportError as error:
    print(json.dumps(str(error)))
else:
    # a model with one Relu
    model = bytes.fromhex("08063a330a0c0a0178120179220452656c751201675a0f0a0178120a0a08080112040a0208"
                          "01620f0a0179120a0a08080112040a0208014202100b")
    session = onnxruntime.InferenceSession(model, providers=default())
    note = provider_note(session, onnxruntime.get_available_providers())
    print(json.dumps([onnxruntime.__version__, session.get_providers()[0], note]))
"""


def run(command):
    """Returns a command's (status, output). Raises OSError if it cannot be run or takes longer than a minute."""
    try:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    except subprocess.TimeoutExpired:
        raise OSError("%s does not answer" % command[0])
    return process.returncode, process.stdout.decode("utf-8", "replace")


def ask(python, program, *arguments):
    """Runs a program in another Python and returns the JSON in its last line. Raises OSError with that line if it is not JSON."""
    status, output = run([python, "-B", "-c", program] + list(arguments))
    last = output.strip().split("\n")[-1]
    try:
        return json.loads(last)
    except ValueError:
        raise OSError("%s: %s" % (python, last or "ended with status %d" % status))


def short(name):
    """Returns a chip's name as npu-smi prints it: 310P3 for Ascend310P3."""
    return name[6:] if name.startswith("Ascend") else name


def family(name):
    """Returns (the folder of a chip's operators, the word in their package's name). What is unknown is None."""
    return next((rest for beginning, *rest in FAMILIES if re.match(beginning, name)), (None, None))


def numbers(version):
    """Returns the numbers in a version, (25, 0, 1) for 25.0.rc1."""
    return tuple(map(int, re.findall(r"\d+", version)))


def read(path):
    """Returns a file's text, or '' if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def library(name):
    """Returns the path where the loader finds a shared library, or None."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    try:
        found = re.search(r"^\s*%s .*=> (.*)" % re.escape(name), run(["/sbin/ldconfig", "-p"])[1], re.MULTILINE)
        return found.group(1) if found else None
    except OSError:
        return None


# --- the card -------------------------------------------------------------------------------------------------------

def read_table(text):
    """Returns the driver's version and the chips [(card, name, health, device)] from the table of npu-smi info.

    A chip has two rows, "| CARD NAME | HEALTH | ..." and "| CHIP DEVICE | BUS | ...". A card has one chip for each row that
    begins with its number. The device is None if the table has no such column. Raises ValueError for any other text.
    """
    version, chips, above, has_device = re.search(r"\bVersion: *([\w.]+)", text), [], None, False
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        if cells[0][:2] == ["NPU", "Chip"]:  # here the table of processes begins
            break
        if cells[0][:1] == ["Chip"]:
            has_device = cells[0][1:] == ["Device"]
        elif cells[0] and cells[0][0].isdigit() and len(cells) > 2:
            if above is None:
                above = cells
                continue
            chips.append((above[0][0], short("".join(above[0][1:])), " ".join(above[1]),
                          cells[0][1] if has_device and len(cells[0]) > 1 else None))
            above = None
    if not chips or above:
        raise ValueError("npu-smi info prints no table of chips")
    return version.group(1) if version else "unknown", chips


def npu_smi():
    """Returns read_table() for this machine. Raises OSError or ValueError."""
    status, output = run(["npu-smi", "info"])
    if status:
        raise OSError("npu-smi info failed: %s" % output.strip().split("\n")[-1])
    return read_table(output)


def name_of(chips):
    """Returns the name of these chips. Raises ValueError unless atc accepts it."""
    names = sorted({chip[1] for chip in chips})
    if len(names) > 1:
        raise ValueError("npu-smi info names several chips, %s; set chip_name to one of them" % " and ".join(names))
    if names == ["910"]:  # a chip of the 910_93 family: 910_9362, 910_9392 ...
        raise ValueError("npu-smi info says Ascend910 only; set chip_name to 910_N, where N is the NPU Name in the output of: "
                         "npu-smi info -t board -i %s -c 0" % chips[0][0])
    if not re.match(r"[0-9]{3}[A-Za-z0-9_-]*$", names[0]):
        raise ValueError("npu-smi info names an unknown chip, %r; set chip_name" % names[0])
    return names[0]


def chips_of(chips, name, device):
    """Returns how many chips the card with this device has, else the first card with such a chip. 0 means that there is none."""
    cards = [card for card, chip, _, _ in chips if chip == name]
    own_card = [card for card, chip, _, number in chips if (chip, number) == (name, device)]
    return cards.count((own_card or cards)[0]) if cards else 0


def chip(name, count, device, needed):
    """Returns the output of the command chip. Raises OSError or ValueError."""
    note = ""
    try:
        if not shutil.which("npu-smi"):
            raise OSError("cannot find out the chip (no npu-smi on the PATH); give --chip-name, such as 310P3, or --backend "
                          "onnxruntime to skip the OM")
        _, chips = npu_smi()
        if not name:
            name = name_of(chips)
            note = "npu-smi info names the chip Ascend%s" % name
        count = count or chips_of(chips, short(name), device)
    except (OSError, ValueError) as error:
        if needed and not name:
            raise ValueError(str(error) if re.search("chip[_-]name", str(error)) else "%s; run it by hand, or set chip_name" % error)
        if not name and shutil.which("npu-smi"):
            note = str(error)
    name = short(name)
    if name and not int(count or 0):
        count = 4 if name == "310" else 1
        note = "chips per card: %d (Ascend%s), assumed, because npu-smi did not count them; --chips sets another number" % (count, name)
    return "%s %d %s" % ("Ascend" + name if name else "unknown", int(count or 0), note)


# --- CANN -----------------------------------------------------------------------------------------------------------

def find_set_env():
    """Returns the path of set_env.sh of this machine's CANN, or None."""
    folders = []
    for home in filter(None, map(os.environ.get, ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"))):
        folders += [home, os.path.dirname(home.rstrip("/"))]  # up to CANN 8.3, set_env.sh is beside the folder latest
    package = importlib.util.find_spec("ascend")  # pip installs CANN in site-packages/ascend/cann-VERSION
    for folder in package.submodule_search_locations or [] if package else []:
        folders += sorted(glob.glob(os.path.join(glob.escape(folder), "cann-*")), reverse=True)
    roots = [os.path.expanduser("~/Ascend"), "/usr/local/Ascend"]
    if os.environ.get("CONDA_PREFIX"):
        roots.insert(0, os.path.join(os.environ["CONDA_PREFIX"], "Ascend"))
    folders += [os.path.join(root, name) for root in roots for name in ("cann", "ascend-toolkit")]
    folders += [os.path.join(root, "nnrt") for root in roots]  # it has no atc, but is enough on the card's machine
    return next((path for path in (os.path.join(folder, "set_env.sh") for folder in folders) if os.path.isfile(path)), None)


class Cann(object):
    """The CANN that this process's environment points to: home (None if there is none), version, atc, packages, operators."""

    def __init__(self):
        self.atc = shutil.which("atc")
        homes = [os.environ.get("ASCEND_HOME_PATH"), os.environ.get("ASCEND_TOOLKIT_HOME")]
        folder = os.path.realpath(self.atc) if self.atc else "/"
        while folder != "/":
            folder = os.path.dirname(folder)
            homes.append(folder)
        self.home = next((os.path.realpath(home) for home in homes if home and os.path.isdir(os.path.join(home, "opp"))), None)
        self.packages = {}  # name -> version
        for path in sorted(glob.glob(os.path.join(glob.escape(self.home or "/dev/null"), "*-linux", "ascend_*_install.info"))):
            text = read(path)
            found = [re.search(r"^%s[=:] *(\S+)" % key, text, re.MULTILINE) for key in ("package_name", "version")]
            if all(found):
                self.packages[found[0].group(1)] = found[1].group(1)
        versions = [version for name, version in self.packages.items() if not name.endswith("-ops")]
        older = re.search(r"toolkit_running_version=\[[^]:]*:([^]]+)\]", read(os.path.join(self.home or "", "version.cfg")))
        self.version = versions[0] if versions else older.group(1) if older else "unknown"
        self.number = numbers(self.version)[:3]
        opp = os.environ.get("ASCEND_OPP_PATH") or os.path.join(self.home or "", "opp")
        # Each folder that describes operators is named after a family of chips. CANN before 6.0 has the second of these places.
        self.operators = sorted({os.path.basename(os.path.dirname(path)) for place in ("built-in/op_impl", "op_impl/built-in")
                                 for path in glob.glob(os.path.join(glob.escape(opp), place, "ai_core/tbe/config/*/*.json"))})

    def __str__(self):
        return "CANN %s in %s" % (self.version, self.home) if self.home else "the CANN on the PATH"

    def versions(self):
        """Returns CANN's version and those of the packages that an OM names, as far as they are known."""
        places = "compiler", "opp", "share/info/ge-compiler"  # the last one: from CANN 8.5 on
        texts = [read(os.path.join(self.home or "/dev/null", place, "version.info")) for place in places]
        return [self.version] + re.findall(r"^Version=(\S+)", "\n".join(texts), re.MULTILINE)

    def amct(self):
        """Returns the command that installs AMCT for ONNX in the version of this CANN."""
        return AMCT % (self.version if self.number else "VERSION")

    def operator_package(self, name):
        """Returns the command that installs the operators of a chip, or None if no package is known.

        From CANN 8.5 on, operators of two families must not share a place, so a second family needs another toolkit, too.
        """
        word, old = family(name)[1], self.number and self.number < (8, 5)
        if not word or (old and word == "A3"):
            return None
        version = self.version if self.number else "VERSION"
        alone = not set(self.operators) - {family(name)[0]}
        if alone and "/site-packages/ascend/" in str(self.home):
            return "python3 -m pip install ascend-cann-%s-ops==%s" % (word.lower(), version)
        if alone and os.environ.get("CONDA_PREFIX") and str(self.home).startswith(os.path.realpath(os.environ["CONDA_PREFIX"])):
            return "conda install ascend::cann-%s-ops==%s" % (word.lower(), version)
        form = "bash ./Ascend-cann-kernels-%s_%s_linux-%s.run --install" if old else "bash ./Ascend-cann-%s-ops_%s_linux-%s.run --install"
        package = form % (word, version, MACHINE)
        if old or alone:
            return package
        place = "$HOME/Ascend-" + word
        return "%s --install-path=%s && %s --install-path=%s && bash run_all.sh --set-env %s/cann/set_env.sh" % (
            TOOLKIT % version, place, package, place, place)

    def operator_remedy(self, name):
        """Returns (advice or '', the command or None) for a chip without operators here."""
        if family(name)[0] == "ascend310" and self.number >= (8, 5):
            return KEEP_CANN
        return "", self.operator_package(name)

    def driver_problem(self, driver):
        """Returns (whether the release notes exclude a version of the driver, a text, a command), or None if they list it."""
        found = numbers(driver)[:2]
        first, last = next((rule[1:] for rule in DRIVERS if self.number >= rule[0]), (None, None))
        if not found or not first or first <= found <= (last or found):
            return None
        if found < first and first > (25, 0):
            return True, "CANN %s needs driver %d.%d or later, not %s" % ((self.version,) + first + (driver,)), DRIVER + " --upgrade"
        text = "driver %s is not in the release notes of CANN %s" % (driver, self.version)
        if found < first:
            return False, text, DRIVER + " --upgrade"
        return False, text + ", but in those of later ones", TOOLKIT.replace("--install", "--upgrade") % "VERSION"

    def driver_library(self):
        """Returns the setting with which atc finds the driver's library, from the driver or from the toolkit, which has a copy."""
        found = glob.glob("/usr/local/Ascend/driver/lib64/**/libascend_hal.so", recursive=True) + glob.glob(
            os.path.join(glob.escape(self.home or "/dev/null"), "*-linux", "devlib", "libascend_hal.so"))
        folder = os.path.dirname(found[0]) if found else "/FOLDER/OF/CANN/%s-linux/devlib" % MACHINE
        return "LD_LIBRARY_PATH=%s:$LD_LIBRARY_PATH" % folder

    def python_limits(self, minor):
        """Returns (the last Python 3 that CANN's guide allows, the NumPy that Python 3.minor's must be below or None)."""
        last, numpy = next(rule[1:] for rule in PYTHONS if (self.number or (99,)) >= rule[0])
        return last, numpy if minor < 13 else None

    def python_problem(self, version, missing, numpy, protobuf):
        """Returns (what is wrong with the Python that atc runs, what else differs from CANN's guide, the command that helps).

        numpy, protobuf: their versions, or False without them. What there is nothing of is None.
        """
        last, limit = self.python_limits(version[1])
        if not (3, 7) <= tuple(version[:2]) <= (3, last):
            return "CANN %s needs Python 3.7 to 3.%d" % (self.version, last), None, PYTHON_REMEDY
        problems = ["no " + PACKAGES[name] for name in list(PACKAGES)[:5] if name in missing]
        notes = ["no " + PACKAGES[name] for name in list(PACKAGES)[5:] if name in missing]
        if numpy and limit and numbers(numpy) >= numbers(limit):
            text = "NumPy %s, but CANN %s needs NumPy below %s" % (numpy, self.version, limit)
            (problems if numbers(numpy) >= (2,) else notes).append(text)
        if protobuf and numbers(protobuf)[:2] != numbers(PROTOBUF):
            notes.append("protobuf %s, but CANN's guide says %s; if another package needs this one, give atc a Python of its own"
                         % (protobuf, PROTOBUF))
        names = [{"numpy": "'numpy<%s'" % limit if limit else "numpy", "protobuf": "'protobuf==%s.*'" % PROTOBUF}.get(name, name)
                 for name in PACKAGES.values()]
        return ", ".join(problems) or None, ", ".join(notes) or None, "python3 -m pip install " + " ".join(names)


def explain(log, name):
    """Returns what to do about the failure in the log of atc or of a tool that runs an OM, or None if it is not a known one."""
    cann, name = Cann(), short(name)
    python = "the Python that atc runs, %s," % shutil.which("python3")

    found = re.search(r"No supported Ops kernel and engine are found for .*optype \[(\w+)\]", log)
    if found and family(name)[0] in cann.operators:
        return "%s has operators for Ascend%s, but none for the model's %s" % (cann, name, found.group(1))
    if found or re.search(r"not within the support list of \{\s*\}", log):
        others = ", only for " + ", ".join(cann.operators) if cann.operators else ""
        advice, command = cann.operator_remedy(name)
        return "%s has no operators for Ascend%s%s%s; %s" % (
            cann, name, others, advice, "run: " + command if command else "install a CANN that has them")
    found = re.search(r"supported socVersion ?= ?(\w+),\s*but the model socVersion ?= ?(\w+)", log) or re.search(
        r"Value ()\[?(\w+)\]? for parameter \[?soc_version\]? is invalid\. Reason: (Model soc|aclrtCheckArch)", log)
    if found:
        model, card = short(found.group(2)), short(found.group(1)) or name
        return "the OM is for Ascend%s, but the card's chip is %s; run: bash run_all.sh --stage 3 --chip-name %s" % (
            (model, "Ascend" + card, card) if card != model else (model, "another one", "CHIP, with the chip that npu-smi info names"))
    if "ModelCheckCompatibility failed" in log or "stream_list.size()" in log:  # the second is of the loader of CANN 6
        return "the OM is probably for another chip than the card's; run: bash run_all.sh --stage 3"
    if "opp version of the model does not match" in log:
        return "the OM was made with another CANN; run: bash run_all.sh --stage 3"
    found = re.search(r"No module named '([\w.]+)'", log)
    if found and "ATC" in log:
        package, remedy = PACKAGES.get(found.group(1)), "source CANN's set_env.sh, or put another python3 first on the PATH"
        if package:
            remedy = "run: python3 -m pip install " + package
        return "%s has no %s; %s" % (python, package or found.group(1), remedy)
    if "libascend_hal.so: cannot open" in log:
        return "atc does not find libascend_hal.so, a library of the driver; run: export " + cann.driver_library()
    if "FrameLocalsProxy" in log:
        return "%s is too new: CANN %s needs Python 3.7 to 3.%d; run: %s" % (
            python, cann.version, min(cann.python_limits(0)[0], 12), PYTHON_REMEDY)
    if re.search(r"np\.float_\b.* was removed|no attribute 'float_'", log):
        return "%s has NumPy 2, but CANN %s needs NumPy 1; run: python3 -m pip install 'numpy<%s'" % (
            python, cann.version, cann.python_limits(0)[1] or "2")
    found = re.search(r"Op ?name \[?([^\s\]]+)\]? specified in \[?--(\w+)\]? is not found in the model", log)
    if found:
        return ("the ONNX model has no node %s, which --%s names; give atc the model of stage 2, whose input is actual_input_1; run: "
                "bash run_all.sh --stage 1" % found.groups())
    found = re.search(r"^\s*(E19999|E20001):? *(?:In(?:ner|ternal) Error!?\s*(?:E19999:? *)?)?(.+)", log, re.MULTILINE)
    if found:
        return "CANN reports %s: %s; run: %s" % (found.group(1), found.group(2).strip()[:300], DETAILS)
    return None


# --- an OM ------------------------------------------------------------------------------------------------------------

def other_family(name, other):
    """Returns whether two chips are surely of different families. A mere 910 or 910B may be any chip whose name begins with 910."""
    first, second = family(name)[0], family(other)[0]
    clear = all(re.match(r"310([PB]\w*)?$|910(A|Pro[AB]|PremiumA|_93\w*|B[1-4][\w-]*)$", chip) for chip in (name, other))
    return bool(first and second) and first != second and (clear or name[:3] != other[:3])


def om_faults(facts, batch_size, size, uint8, chips, cann):
    """Returns what is wrong for a run with an OM that says these facts of itself: [(state, found, command)], notes last.

    The states are those of Check. size: [height, width]. uint8: whether the run's bins are uint8, None if that is not certain.
    chips: the names of the devices' chips. What the OM does not say, and what is not known of the run, is no fault.
    """
    faults, shape, aipp = [], om.input_shape(facts) or [None] * 4, om.has_aipp(facts)
    chip = short(facts.get("soc_version", ""))
    convert = "bash run_all.sh --stage 3 --stop-stage 3 --batch-size %d --size %d %d%s" % (
        batch_size, size[0], size[1], " --aipp yes" if aipp else "")
    if chips and all(other_family(chip, own) for own in chips):
        faults.append(("missing", "the OM is for Ascend%s, but npu-smi info names Ascend%s" % (chip, " and ".join(chips)),
                       "%s --chip-name %s" % (convert, chips[0])))
    if shape[0] not in (None, batch_size):
        faults.append(("missing", "the OM takes batches of %d, not %d" % (shape[0], batch_size), convert))
    if not aipp and None not in shape[2:] and shape[2:] != size:  # AIPP may crop or resize larger images
        faults.append(("missing", "the OM takes images of height and width %d %d, not %d %d" % tuple(shape[2:] + size),
                       "bash run_all.sh --stage 4 --size %d %d" % tuple(shape[2:])))
    if aipp and uint8 is False:
        faults.append(("missing", "the OM has AIPP (--insert_op_conf) and takes uint8 bins, but the run's are float32",
                       "bash run_all.sh --stage 4 --aipp yes"))
    elif aipp is False and shape[1] and uint8:
        faults.append(("missing", "the OM has no AIPP (no --insert_op_conf) and takes float32 bins, but the run's are uint8",
                       "bash run_all.sh --stage 4 --aipp no"))
    made = facts.get("atc_version") or facts.get("opp_version", "")
    if om.newer(made, cann.versions()):
        faults.append(("note", "the OM was made by version %s, newer than %s, and may not load" % (made, cann), convert))
    return faults


def check_oms(work, batch_sizes, size, bins, devices):
    """Yields (path, om_faults()) of each OM that is there. The arguments are those of the command om."""
    size, cann, chips, uint8 = [int(text) for text in size.split()], Cann(), [], PIXEL_BYTES[bins] < 12 if bins in PIXEL_BYTES else None
    with contextlib.suppress(OSError, ValueError):
        chips = sorted({row[1] for row in npu_smi()[1] if row[3] is None or row[3] in devices.split()})
    with contextlib.suppress(OSError):
        if uint8 is None and has_module("numpy"):
            from lib.bins import holds
            names = sorted(name for name in os.listdir(bins) if name.endswith(".bin"))
            kind = holds(os.path.join(bins, names[0]), *size) if names else None
            uint8 = kind and kind != "float32"
    for batch_size in batch_sizes.split():
        path = os.path.join(work, "deepmar_bs%s.om" % batch_size)
        with contextlib.suppress(OSError):
            yield path, om_faults(om.read(path), int(batch_size), size, uint8, chips, cann)


# --- the whole machine ----------------------------------------------------------------------------------------------

class Check(object):
    """Lists what run_all.sh needs with these values of its variables, as rows of {stage, what, state, found, run}.

    The states are ok, note (the user should know something), missing (the run needs it) and absent (the run does not need it).
    run is the command that provides it.
    """

    def __init__(self, values):
        self.values, self.rows, self.cann = values, [], Cann()
        self.work = os.path.abspath(values["work_dir"])
        self.oms = [os.path.join(self.work, "deepmar_bs%s.om" % size) for size in values["batch_size"].split()]
        self.on_card = self.uses("benchmark") or self.uses("ais_bench")
        self.converts = self.runs(3) and values["asked_backend"] != "onnxruntime" and bool(self.cann.atc) or \
            self.on_card and not all(map(os.path.exists, self.oms))
        self.packages()
        self.inputs()
        self.card()
        self.toolkit()
        self.disk()
        self.tools()
        self.models()

    def row(self, stage, what, state, found, command=None):
        self.rows.append({"stage": stage, "what": what, "state": state, "found": found, "run": command})

    @staticmethod
    def lack(needed):
        """Returns the state of a thing that this machine does not have."""
        return "missing" if needed else "absent"

    def runs(self, stage):
        return int(self.values["stage"]) <= stage <= int(self.values["stop_stage"])

    def no_om(self):
        """Returns a text about what stage 3 lacks if a run that could make OMs makes none and has none, else ''."""
        if not self.runs(3) or self.converts or self.values["asked_backend"] == "onnxruntime" or all(map(os.path.exists, self.oms)):
            return ""
        lacking = [row["what"] for row in self.rows if row["state"] == "absent" and row["stage"] in ("3", "3 7")]
        return ", but makes no OM; for that it lacks: " + ", ".join(lacking)

    def uses(self, backend):
        return self.runs(6) and self.values["backend"] == backend

    def packages(self):
        """Checks the Python that tools/run/python.sh would choose. Sets self.python to it, or to None if it must still be made."""
        names = self.values["packages"].split()
        modules = {{"Pillow": "PIL"}.get(name, name) for name in names} | {"google" for name in names if "onnx" in name}
        self.python, found = sys.executable, "%d.%d.%d, %s" % (sys.version_info[:3] + (sys.executable,))
        missing = sorted(module for module in modules if not has_module(module))
        if missing:
            found += ", without " + ", ".join(missing)
            folder = os.path.join(ROOT, ".venv-%d.%d" % sys.version_info[:2])
            self.python = os.path.join(folder, "bin", "python")
            try:
                missing = ask(self.python, MODULES_PROGRAM, ROOT, *modules)[1]
                found += "; the run uses " + folder
            except OSError:
                self.python = None
        if missing:
            found += "; the run installs %s into %s" % (", ".join(missing), folder)
        self.row("all", "Python", "note" if missing else "ok", found)

    def inputs(self):
        values, stages = self.values, dict(INPUT_STAGES)
        if values["int8"] == "yes" and not values["card_model"]:
            stages.update(calibration_list=[3], calibration_images=[])
        given = [name for name in stages if values[name]]
        self.images = int(values["sample_size"])
        if not given:
            return self.row("1 4 7", "inputs", "note", "none given; the run uses the sample: %d images, a checkpoint" % self.images)
        problems = ["no " + values[name] for name in given + ["card_model"] if values[name] and not os.path.exists(values[name])]
        problems += ["%s is not set" % name for name, needed in stages.items()
                     if name not in given and any(map(self.runs, needed))]
        names = []
        try:
            if os.path.isfile(values["image_list"]):
                names = read_list(values["image_list"])
        except (OSError, ValueError) as error:
            problems.append(str(error))
        self.images = len(names)
        if self.runs(4) and not problems:
            absent = [name for name in names if not os.path.exists(os.path.join(values["images"], name))]
            if absent:
                problems.append("%d of the %d images in %s are not in %s, such as %s"
                                % (len(absent), self.images, values["image_list"], values["images"], absent[0]))
        self.row("1 4 7", "inputs", "missing" if problems else "ok",
                 ", ".join(problems or [values[name] for name in given] + ["%d images" % self.images]))

    def card(self):
        devices, chips, driver, problem = self.values["device_id"].split(), [], "", "nothing names it"
        try:
            if not shutil.which("npu-smi"):
                raise OSError("no npu-smi on the PATH")
            driver, chips = npu_smi()
            cards = sorted({chip[0] for chip in chips}, key=int)
            names = [[chip[1] for chip in chips if chip[0] == card] for card in cards]
            found = "driver %s; %s" % (driver, ", ".join("card %s: %d x %s" % (card, len(own), own[0]) for card, own in zip(cards, names)))
            alarms = ["; card %s: %s" % (chip[0], chip[2]) for chip in chips if chip[2] != "OK"]
            found += "".join(alarms)
            there = [chip[3] for chip in chips if chip[3]]
            wrong = [device for device in devices if there and device not in there]
            if wrong:
                self.row("3 6", "driver and card", self.lack(self.on_card), "%s; no device %s among %s"
                         % (found, wrong[0], " ".join(there)), "bash run_all.sh --device-id %s" % there[0])
            else:
                self.row("3 6", "driver and card", "note" if alarms else "ok", found)
        except (OSError, ValueError) as error:
            self.row("3 6", "driver and card", self.lack(self.on_card), str(error), None if shutil.which("npu-smi") else
                     DRIVER + " --full")
        self.chip = short(self.values["chip_name"])
        try:
            self.chip = self.chip or (name_of(chips) if chips else "")
        except ValueError as error:
            problem = str(error)
        if self.chip:
            count = self.values["chips"] or chips_of(chips, self.chip, devices[0])
            self.row("3 7", "chip", "ok", "Ascend%s, %s" % (self.chip, "%s on a card" % count if count else
                                                            "--chips sets how many a card has"))
        else:
            self.row("3 7", "chip", self.lack(self.converts), problem, "bash run_all.sh --chip-name 310P3")
        wrong_driver = self.cann.driver_problem(driver)
        if wrong_driver and family(self.chip)[0] != "ascend310":  # its users keep an older CANN
            excluded, found, command = wrong_driver
            self.row("6", "driver for CANN", self.lack(self.on_card) if excluded else "note", found, command)

    def toolkit(self):
        cann = self.cann
        if self.values["int8"] == "yes" and not self.values["card_model"]:
            found = shutil.which("amct_onnx")
            self.row("3", "amct_onnx", "ok" if found else self.lack(self.converts and self.runs(3)), found or "no amct_onnx on the PATH",
                     None if found else cann.amct())
        if not cann.atc:
            found = "no atc on the PATH" if find_set_env() else "no atc on the PATH, and no set_env.sh was found"
            if family(self.chip)[0] == "ascend310":
                found += "; CANN 8.3 is the last one for a 310"
            return self.row("3", "CANN", self.lack(self.converts), found, TOOLKIT % "VERSION")
        layout = "cann" if os.path.basename(cann.home or "").startswith("cann") else "ascend-toolkit"
        self.row("3", "CANN", "ok", "%s, layout %s, %s" % (cann, layout, cann.atc))
        self.operators()
        self.atc_python()
        if not library("libascend_hal.so"):
            self.row("3", "driver's library", "note", "no libascend_hal.so, which atc loads", "export " + cann.driver_library())

    def operators(self):
        cann = self.cann
        packages = {name: version for name, version in cann.packages.items() if name.endswith("-ops")}
        found = ", ".join("%s %s" % item for item in packages.items()) or " ".join(cann.operators) or "none"
        if not cann.home or not self.chip:
            self.row("3", "operators", "note", "%s; the chip is not known" % found if cann.home else "the CANN is unknown")
        elif family(self.chip)[0] not in cann.operators:
            advice, command = cann.operator_remedy(self.chip)
            others = ", only: " + found if found != "none" else ""
            self.row("3", "operators", self.lack(self.converts), "none for Ascend%s%s%s" % (self.chip, others, advice), command)
        else:
            notes, command = [], None
            if set(packages.values()) - {cann.version}:
                notes.append("CANN itself is %s" % cann.version)
            if len(cann.operators) > 1 and cann.number >= (8, 5):
                notes.append("operators of several families must not share a place: %s" % " ".join(cann.operators))
                command = cann.operator_package(self.chip)
            self.row("3", "operators", "note" if notes else "ok", "; ".join([found] + notes), command)

    def atc_python(self):
        python = shutil.which("python3") or "python3"
        try:
            version, missing, numpy, protobuf = ask(python, MODULES_PROGRAM, ROOT, *PACKAGES)
        except OSError as error:
            return self.row("3", "atc's Python", self.lack(self.converts), str(error), PYTHON_REMEDY)
        found = "%s, %s" % (".".join(map(str, version)), python)
        problem, note, command = self.cann.python_problem(version, missing, numpy, protobuf)
        if problem or note:
            self.row("3", "atc's Python", self.lack(self.converts) if problem else "note",
                     "%s: %s" % (found, ", ".join(filter(None, (problem, note)))), command)
        else:
            self.row("3", "atc's Python", "ok", "%s, NumPy %s" % (found, numpy))

    def disk(self):
        place = self.work
        while not os.path.exists(place):
            place = os.path.dirname(place)
        height, width = map(int, self.values["size"].split())
        bins = int(self.images * height * width * PIXEL_BYTES[self.values["aipp"]])
        free = shutil.disk_usage(place).free
        found = "%.1f GB free in %s, %.1f GB for %d bins" % (free / 1e9, place, bins / 1e9, self.images)
        if not os.access(place, os.W_OK):
            self.row("all", "disk", "missing", "%s cannot be written" % place, "bash run_all.sh --work-dir /A/FOLDER/OF/YOURS")
        elif free < bins:
            self.row("4", "disk", self.lack(self.runs(4)), found, "bash run_all.sh --work-dir /A/LARGER/DISK")
        else:
            self.row("4", "disk", "ok", found)

    def tools(self):
        name = "benchmark." + MACHINE
        binary = os.path.join(ROOT, name)
        if os.access(binary, os.X_OK):
            self.row("6", name, "ok", binary)
        elif os.path.exists(binary):
            self.row("6", name, self.lack(self.uses("benchmark")), binary + " is not executable", "chmod u+x %s" % binary)
        else:
            self.row("6", name, self.lack(self.uses("benchmark")), binary + " does not exist", "cp %s %s/" % (name, ROOT))
        found = library("libascendcl.so")
        self.row("6", "CANN's library", "ok" if found else self.lack(self.on_card), found or "no libascendcl.so, to run an OM",
                 None if found else "source " + find_set_env() if find_set_env() else TOOLKIT % "VERSION")
        paths = [path for path in self.oms + [os.path.join(self.work, "input_bin")] if os.path.exists(path)]
        status, output = run([sys.executable, "-B", os.path.join(ROOT, "tools", "run", "ais_bench_files.py"), "check", self.work] + paths)
        found = re.sub("^ais_bench_files.py: error: (backend ais_bench: )?", "", output.strip().split("\n")[-1])
        found, _, command = found.partition("; run: ")
        self.row("6", "ais_bench", self.lack(self.uses("ais_bench")) if status else "note" if found else "ok",
                 found or sys.executable, command or None)
        if not self.python or not self.runs(6):
            return self.row("6", "ONNX Runtime", "note", "not tried" if self.python else "comes with the packages")
        needed = self.uses("onnxruntime")
        try:
            answer = ask(self.python, PROVIDER_PROGRAM, ROOT)
            if isinstance(answer, str):
                raise OSError(answer)
            version, provider, note = answer
            if note:
                self.row("6", "ONNX Runtime", "missing" if needed and self.values["strict"] else "note",
                         "%s, %s; %s" % (version, provider, note))
            else:
                self.row("6", "ONNX Runtime", "ok", "%s, %s" % (version, provider))
        except OSError as error:
            found, _, command = str(error).partition("; run: ")
            self.row("6", "ONNX Runtime", self.lack(needed), found, command or None)

    def models(self):
        """Checks the OMs that are there and will be run."""
        if not self.on_card or self.runs(3) and self.cann.atc:  # stage 3 will make others
            return
        bins = self.values["aipp"] if self.runs(4) else os.path.join(self.work, "input_bin")
        for path, faults in check_oms(self.work, self.values["batch_size"], self.values["size"], bins, self.values["device_id"]):
            if faults:
                self.row("6", os.path.basename(path), faults[0][0], "; ".join(fault[1] for fault in faults), faults[0][2])


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ["chip"] and len(arguments) == 5:
        print(chip(*arguments[1:]))
    elif arguments == ["set_env"]:
        print(find_set_env() or "")
    elif arguments == ["amct"]:
        print(Cann().amct())
    elif arguments[:1] == ["explain"] and len(arguments) == 3:
        print(explain(read(arguments[1]), arguments[2]) or "")
    elif arguments[:1] == ["om"] and len(arguments) == 6:
        for path, faults in check_oms(*arguments[1:]):
            for state, found, run in faults:
                text = "%s: %s; run: %s" % (path, found, run)
                if state == "missing":
                    raise ValueError(text)
                note(text)
    elif arguments[:1] == ["check"]:
        values = dict(argument.split("=", 1) for argument in arguments[1:])
        check = Check(values)
        rows = check.rows
        lacking = [row["what"] for row in rows if row["state"] == "missing"]
        form = "%-6s %-16s %-8s %s"
        print(form % ("stage", "what", "state", "found"))
        for row in rows:
            print(form % (row["stage"], row["what"], row["state"], row["found"]))
            if row["run"]:
                print(form % ("", "", "", "run: " + row["run"]))
        backend = " with backend %s" % values["backend"] if values["backend"] != "auto" else ""
        print("run_all.sh%s %s" % (backend, "lacks: " + ", ".join(lacking) if lacking else "has all that it needs" + check.no_om()))
        if values["json"]:
            write_text(values["json"], json.dumps({"backend": values["backend"], "ok": not lacking, "rows": rows}, indent=1) + "\n")
        sys.exit(1 if lacking else 0)
    else:
        print("usage: doctor.py check|chip|set_env|amct|explain|om ARGUMENT ...\n\n" + __doc__, end="")
        sys.exit(0 if arguments in ([], ["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    command(main)
