"""tools/run/doctor.py reads npu-smi's tables and both layouts of CANN, explains atc's failures and checks a whole machine."""
import json
import os
import shutil
import subprocess
import sys

import pytest

import ais_bench_files
import doctor
from helpers import MACHINE, ROOT, check_error, own_data, run_all, script, standin, write_model, write_om

TABLES = {  # a recorded table: what it says, (driver, chip, {card: number of its chips})
    "20.2.2_300i": ("20.2.2", "310", {"2048": 4, "2049": 4}), "21.0.3.1_200dk": ("21.0.3.1", "310", {"0": 1}),
    "21.0.4_910a": ("21.0.4", "910A", {"0": 1}), "22.0.2_300i_pro": ("22.0.2", "310P3", {"0": 1, "1": 1}),
    "23.0.0_200i_dk_a2": ("23.0.0", "310B4", {"0": 1}), "24.1.0.1_300i_duo": ("24.1.0.1", "310P3", {"1": 2, "2": 2}),
    "24.1.rc3.7_a3": ("24.1.rc3.7", "910", {"0": 2}), "25.0.rc1.1_910b4-1": ("25.0.rc1.1", "910B4-1", {"0": 1, "1": 1}),
    "25.2.0_300i_duo": ("25.2.0", "310P3", {"2": 2}), "25.3.rc1_300i_pro": ("25.3.rc1", "310P3", {"6": 1}),
    "26.0.rc1_910b4": ("26.0.rc1", "910B4", {"0": 1})}
ANOTHER_PLACE = " && ".join("bash ./Ascend-cann-%%s_8.5.0_linux-%s.run --install --install-path=$HOME/Ascend-{0}" % MACHINE % package
                            for package in ("toolkit", "{0}-ops")) + " && bash run_all.sh --set-env $HOME/Ascend-{0}/cann/set_env.sh"
RECORDED = os.path.join(ROOT, "tests", "npu_smi")


def table(name):
    with open(os.path.join(RECORDED, name + ".txt")) as f:
        return f.read()


@pytest.mark.parametrize("name", sorted(name[:-len(".txt")] for name in os.listdir(RECORDED)))
def test_recorded_tables_are_read(name):
    driver, chip, cards = TABLES[name]
    found, chips = doctor.read_table(table(name))
    assert (found, {row[1] for row in chips}) == (driver, {chip})
    assert {card: doctor.chips_of([row for row in chips if row[0] == card], chip, "0") for card in cards} == cards
    assert len(chips) == sum(cards.values())


def test_other_texts_are_refused_as_tables():
    text = table("25.2.0_300i_duo")
    without_chips, half_a_chip = ("\n".join(text.splitlines()[:count]) for count in (6, 7))
    for wrong in ("", "Illegal instruction", without_chips, half_a_chip, text[text.index("| NPU     Chip"):]):
        with pytest.raises(ValueError):
            doctor.read_table(wrong)


def test_names_for_atc_and_numbers_of_chips():
    chips = [("0", "310P3", "OK", "0"), ("1", "310P3", "OK", "1"), ("1", "310P3", "OK", "2")]
    assert doctor.name_of(chips) == "310P3"
    assert [doctor.chips_of(chips, "310P3", device) for device in "0129"] == [1, 2, 2, 1]  # the first card's, if there is no such device
    assert doctor.chips_of(chips, "310", "0") == 0
    for name, text in (("910", "set chip_name to 910_N"), ("NA", "set chip_name")):
        with pytest.raises(ValueError, match=text):
            doctor.name_of([("0", name, "OK", None)])


@pytest.mark.parametrize("names, family", [
    ("310", ["ascend310", None]), ("310P3", ["ascend310p", "310p"]), ("310B4", ["ascend310b", "310b"]),
    ("910A 910B 910ProB", ["ascend910", "910"]), ("910B3 910B4-1 910B2C", ["ascend910b", "910b"]),
    ("910_9362", ["ascend910_93", "A3"]), ("610", (None, None))])
def test_chips_belong_to_families(names, family):
    assert all(doctor.family(name) == family for name in names.split())


# --- CANN: folders as its packages install them. Files that are only looked for are empty ----------------------------

def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def install(root, version, *families):
    """Installs a CANN below root in the layout of its version. Returns its folder."""
    new = version >= "8.5"
    home = root / ("cann-" + version if new else "ascend-toolkit/" + version)
    linux = home / (MACHINE + "-linux")
    info = "package_name=Ascend-cann-%s\nversion=%s\narch=%s\nos=linux\n"
    write(linux / "ascend_toolkit_install.info", info % ("toolkit", version, MACHINE))
    write(linux / "bin" / "atc", "#!/bin/sh\n").chmod(0o755)
    write(linux / "lib64" / "libascendcl.so")
    for folder in ("bin", "lib64"):
        (home / folder).symlink_to(linux / folder)
    for family in families:
        write(home / "opp/built-in/op_impl/ai_core/tbe/config" / family / ("aic-%s-ops-info.json" % family), "{}")
        if new:
            write(linux / "ascend_ops_install.info", info % (family.replace("ascend", "") + "-ops", version, MACHINE))
    (home / "opp").mkdir(exist_ok=True)
    (root / "ascend-toolkit").mkdir(exist_ok=True)
    latest = root / "ascend-toolkit" / "latest"
    write(home / "set_env.sh" if new else root / "ascend-toolkit" / "set_env.sh",
          "export ASCEND_TOOLKIT_HOME=%s\nexport ASCEND_HOME_PATH=$ASCEND_TOOLKIT_HOME\n"
          "export ASCEND_OPP_PATH=$ASCEND_TOOLKIT_HOME/opp\nexport PATH=$ASCEND_TOOLKIT_HOME/bin:$PATH\n"
          "export LD_LIBRARY_PATH=$ASCEND_TOOLKIT_HOME/lib64:$LD_LIBRARY_PATH\n"
          "false || [ -n \"$UNSET_VARIABLE\" ]\n" % (root / "cann" if new else latest))  # set -e and set -u would stop at it
    if new:
        (root / "cann").symlink_to(home)
        latest.symlink_to(root / "cann")
        (root / "ascend-toolkit" / "set_env.sh").symlink_to(latest / "set_env.sh")
    else:
        latest.symlink_to(home)
    return home


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a card and its driver. It has npu-smi, a python3 that atc can run, and a home folder without CANN."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    bin = tmp_path / "bin"
    bin.mkdir()
    standin(bin / "npu-smi", "npu_smi.py")
    for module in doctor.PACKAGES:
        write(tmp_path / "packages" / (module.replace(".", "/") + ".py"),
              "__version__ = '%s'\n" % ("3.20.3" if "protobuf" in module else "1.24.0"))
    write(bin / "python3", '#!/bin/sh\nPYTHONPATH=%s exec "%s" "$@"\n' % (tmp_path / "packages", sys.executable)).chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (bin, os.environ["PATH"]))
    return tmp_path


def check(machine, *arguments, root=ROOT, **variables):
    """Runs run_all.sh --check. Returns the process and {what: row} of its JSON, and deletes that."""
    before, json_file = sorted(machine.rglob("*")), machine / "found.json"
    process = run_all("--check", "--json", json_file, "--work-dir", machine / "work", *arguments, root=root, cwd=machine,
                      **dict({"set_env": ""}, **variables))
    assert process.returncode in (0, 1) and not process.stderr, process.stdout + process.stderr
    found = json.loads(json_file.read_text())
    json_file.unlink()
    assert sorted(machine.rglob("*")) == before  # it leaves no other file
    assert found["ok"] == (process.returncode == 0) == all(row["state"] != "missing" for row in found["rows"])
    return process, {row["what"]: row for row in found["rows"]}


@pytest.mark.parametrize("version, folder", [("8.1.RC1", "ascend-toolkit"), ("8.5.0", "cann")])
def test_both_layouts_of_cann_are_found(machine, monkeypatch, version, folder):
    home = install(machine / "Ascend", version, "ascend310p")
    process, rows = check(machine, TABLE="25.2.0_300i_duo")
    assert "read %s" % (machine / "Ascend" / folder / "set_env.sh") in process.stdout
    assert rows["driver and card"]["found"] == "driver 25.2.0; card 2: 2 x 310P3"
    assert rows["chip"]["found"] == "Ascend310P3, 2 on a card"
    assert rows["CANN"]["found"].startswith("CANN %s in %s, layout %s, " % (version, home, folder)), rows["CANN"]
    assert rows["CANN"]["state"] == rows["CANN's library"]["state"] == "ok"
    assert "devlib:" in rows["driver's library"]["run"]
    assert rows["operators"]["state"] == "ok" and "310p" in rows["operators"]["found"]
    known = sys.version_info < (3, 12) or version >= "8.5"
    assert rows["atc's Python"]["state"] == ("ok" if known else "missing"), rows["atc's Python"]
    assert rows["ONNX Runtime"]["state"] == "ok" and "CPUExecutionProvider" in rows["ONNX Runtime"]["found"]
    process, rows = check(machine, "--stop-stage", 3, "--chip-name", "910B3")  # there are no operators for this chip
    assert rows["operators"]["state"] == "missing" and "operators" in process.stdout.splitlines()[-1]
    assert rows["operators"]["run"] == (ANOTHER_PLACE.format("910b") if version == "8.5.0" else
                                        "bash ./Ascend-cann-kernels-910b_8.1.RC1_linux-%s.run --install" % MACHINE)
    # In another place, the same CANN is found by a variable.
    os.rename(str(machine / "Ascend"), str(machine / "elsewhere"))
    latest = machine / "elsewhere" / ("cann-8.5.0" if version == "8.5.0" else "ascend-toolkit/latest")
    set_env = (latest if version == "8.5.0" else latest.parent) / "set_env.sh"
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(latest))
            assert script("tools/run/doctor.py", "set_env").stdout == "%s\n" % set_env


def test_cann_by_conda_and_pip_is_found(machine, monkeypatch):
    monkeypatch.setenv("CONDA_PREFIX", str(machine / "env"))
    monkeypatch.setenv("PYTHONPATH", str(machine / "site-packages"))
    homes = [install(machine / folder, "8.5.0") for folder in ("Ascend", "env/Ascend", "site-packages/ascend")]
    for home, command in zip(homes[::-1], ("python3 -m pip install ascend-cann-310p-ops==8.5.0",
                                           "conda install ascend::cann-310p-ops==8.5.0",
                                           "bash ./Ascend-cann-310p-ops_8.5.0_linux-%s.run --install" % MACHINE)):
        process, rows = check(machine, "--stop-stage", 3)
        assert "CANN 8.5.0 in %s, layout cann, " % home in rows["CANN"]["found"], process.stdout
        row = rows["operators"]
        assert (row["state"], row["found"], row["run"]) == ("missing", "none for Ascend310P3", command)
        (home / "set_env.sh").unlink()


def test_families_must_not_share_a_place(machine):
    install(machine / "Ascend", "8.5.0", "ascend310p", "ascend910b")
    row = check(machine, "--stop-stage", 3)[1]["operators"]
    assert row["state"] == "note" and "must not share a place: ascend310p ascend910b" in row["found"]
    assert row["run"] == ANOTHER_PLACE.format("310p")
    shutil.rmtree(str(machine / "Ascend"))
    install(machine / "Ascend", "8.1.RC1", "ascend310p", "ascend910b")
    assert check(machine, "--stop-stage", 3)[1]["operators"]["state"] == "ok"


def test_users_of_a_310_keep_their_cann(machine):
    home = install(machine / "Ascend", "8.5.0", "ascend310p")
    rows = check(machine, "--stop-stage", 3, TABLE="20.2.2_300i")[1]
    row = rows["operators"]
    assert row["state"] == "missing" and "keep your present CANN" in row["found"] and "--set-env" in row["run"]
    assert "driver for CANN" not in rows  # the present driver fits the present CANN
    shutil.rmtree(str(home))
    row = check(machine, "--stop-stage", 3, TABLE="20.2.2_300i")[1]["CANN"]
    assert "CANN 8.3 is the last one for a 310" in row["found"]


@pytest.mark.parametrize("version, drivers", [  # + listed, - excluded, ? not listed
    ("8.3.RC1", "+24.1.0 +26.2"), ("8.5.0", "?24.1.rc3.7 +25.0.rc1.1 +25.5.1 ?25.7 ?26.0.rc1 ?26.1"), ("8.5.1", "?25.7"),
    ("8.5.2", "?24.1.0 +25.0 +25.7 +26.2"), ("9.0.0-beta.2", "+25.0 +26.0.rc1"), ("9.1.0", "-24.1 -25.0.rc1.1 +25.2.0 +26.2"),
    ("9.2.0", "-25.0 -25.2.0 +25.3.rc1 +26.2"), ("9.2.0", "+unknown")])
def test_drivers_and_versions_of_cann(machine, monkeypatch, version, drivers):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(install(machine / "Ascend", version)))
    for state, driver in ((text[0], text[1:]) for text in drivers.split()):
        problem = doctor.Cann().driver_problem(driver)
        assert (problem and problem[0]) == {"+": None, "?": False, "-": True}[state], (driver, problem)


def test_driver_that_is_too_old_for_cann_is_missing_on_a_card(machine):
    install(machine / "Ascend", "9.1.0", "ascend910b")
    for arguments, state in ((["--backend", "ais_bench"], "missing"), (["--stop-stage", 3], "absent")):
        row = check(machine, *arguments, TABLE="25.0.rc1.1_910b4-1")[1]["driver for CANN"]
        assert row["state"] == state and row["found"] == "CANN 9.1.0 needs driver 25.2 or later, not 25.0.rc1.1"
        assert row["run"].endswith(".run --upgrade")


def test_host_without_atc_is_told_that_it_makes_no_om(machine):
    def last(*arguments):
        process = check(machine, *arguments, FAIL="npu-smi")[0]
        assert process.returncode == 0
        return process.stdout.splitlines()[-1]

    assert last().endswith("has all that it needs, but makes no OM; for that it lacks: chip, CANN")
    assert last("--stop-stage", 3, "--chip-name", "310P3") == "run_all.sh has all that it needs, but makes no OM; for that it lacks: CANN"
    assert last("--stop-stage", 3, "--backend", "onnxruntime") == "run_all.sh with backend onnxruntime has all that it needs"
    write(machine / "work" / "deepmar_bs1.om")
    assert last("--stop-stage", 3) == "run_all.sh has all that it needs"


def test_amct_onnx_is_listed_for_int8(machine):
    install(machine / "Ascend", "8.5.0", "ascend310p")
    command = ("tar -xzf Ascend-cann-amct_8.5.0_linux-%s.tar.gz && cd amct/amct_onnx && python3 -m pip install amct_onnx-*.whl && "
               "tar -xzf amct_onnx_op.tar.gz && cd amct_onnx_op && python3 setup.py build" % MACHINE)
    process, rows = check(machine, "--int8", "yes", "--stop-stage", 3)
    assert (rows["amct_onnx"]["state"], rows["amct_onnx"]["run"]) == ("missing", command)
    assert check(machine, "--int8", "yes", "--backend", "onnxruntime")[1]["amct_onnx"]["state"] == "absent"
    assert "amct_onnx" not in check(machine)[1]
    assert "amct_onnx" not in check(machine, "--int8", "yes", "--card-model", machine / "none")[1]
    standin(machine / "bin" / "amct_onnx", "amct_onnx.py")
    assert check(machine, "--int8", "yes")[1]["amct_onnx"]["state"] == "ok"


def test_packages_of_operators_depend_on_chip_and_version(machine, monkeypatch):
    for version, name, package in (("8.1.RC1", "310P3", "Ascend-cann-kernels-310p_8.1.RC1"),
                                   ("8.5.0", "310P3", "Ascend-cann-310p-ops_8.5.0"),
                                   ("9.0.0", "910_9362", "Ascend-cann-A3-ops_9.0.0"),
                                   ("9.0.0-beta.2", "910B4-1", "Ascend-cann-910b-ops_9.0.0-beta.2"), ("8.5.0", "310", None)):
        command = package and "bash ./%s_linux-%s.run --install" % (package, MACHINE)
        home = install(machine / version / name, version)
        monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
        cann = doctor.Cann()
        assert cann.version == version and cann.operators == [] and cann.operator_package(name) == command
    # CANN 5 and 6 have their version in another file.
    write(machine / "six" / "version.cfg", "toolkit_running_version=[1.84.15.1.310:6.0.1]\n")
    write(machine / "six/opp/op_impl/built-in/ai_core/tbe/config/ascend310/aic-ascend310-ops-info.json")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(machine / "six"))
    assert (doctor.Cann().version, doctor.Cann().operators) == ("6.0.1", ["ascend310"])


@pytest.mark.parametrize("version, python, missing, numpy, problem, note", [
    ("8.1.RC1", [3, 9, 2], [], "1.24.0", None, None),
    ("8.1.RC1", [3, 9, 2], [], "1.26.4", None, "NumPy 1.26.4, but CANN 8.1.RC1 needs NumPy below 1.25"),
    ("8.1.RC1", [3, 9, 2], [], "2.0.1", "NumPy 2.0.1, but CANN 8.1.RC1 needs NumPy below 1.25", None),
    ("8.1.RC1", [3, 12, 0], [], "1.26.4", "CANN 8.1.RC1 needs Python 3.7 to 3.11", None), ("8.5.0", [3, 13, 1], [], "2.2.0", None, None),
    ("8.5.0", [3, 12, 1], [], "2.2.0", "NumPy 2.2.0, but CANN 8.5.0 needs NumPy below 2", None),
    ("5.1.RC1", [3, 7, 5], ["decorator", "attr"], "1.18.5", "no attrs, no decorator", None),
    ("8.5.0", [3, 6, 8], [], "1.19.5", "CANN 8.5.0 needs Python 3.7 to 3.13", None),
    ("9.1.0", [3, 14, 0], ["absl"], "2.3.0", None, "no absl-py")])
def test_cann_limits_the_python_and_packages_of_atc(machine, monkeypatch, version, python, missing, numpy, problem, note):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(install(machine / "Ascend", version)))
    assert doctor.Cann().python_problem(python, missing, numpy, "3.20.1")[:2] == (problem, note)
    assert "protobuf 4.25.3, but CANN's guide says 3.20; " in doctor.Cann().python_problem([3, 7, 5], [], numpy, "4.25.3")[1]


@pytest.mark.parametrize("chip, log, texts", [
    ("310P3", "No supported Ops kernel and engine are found for [Conv_0], optype [Conv2D].",
     ("has no operators for Ascend310P3, only for ascend910b; run: ", ANOTHER_PLACE.format("310p"))),
    ("310", "No supported Ops kernel and engine are found for [Conv_0], optype [Conv2D].", ("keep your present CANN", "--set-env")),
    ("910B3", "No supported Ops kernel and engine are found for [Abs_1], optype [Odd].", ("but none for the model's Odd",)),
    ("310P3", "EC0010: Failed to import Python module [ModuleNotFoundError: No module named 'decorator'.].",
     ("bin/python3, has no decorator; run: python3 -m pip install decorator",)),
    ("310P3", "E40000: ModuleNotFoundError: No module named 'attr'", ("pip install attrs",)),
    ("310P3", "E40000: ModuleNotFoundError: No module named 'te'", ("has no te; source CANN's set_env.sh",)),
    ("310P3", "error while loading shared libraries: libascend_hal.so: cannot open shared object file", ("devlib:$LD_LIBRARY_PATH",)),
    ("310P3", "E10001: Value [linux] for parameter [--host_env_os] is invalid. Reason: The OS linux is not within the support list of "
     "{}, and the OS type must be consistent with that of the opp.", ("has no operators for Ascend310P3",)),
    ("310P3", "TypeError: cannot pickle 'FrameLocalsProxy' object", ("is too new: CANN 8.5.0 needs Python 3.7 to 3.12", "export PATH=")),
    ("310P3", "AttributeError: `np.float_` was removed in the NumPy 2.0 release.", ("has NumPy 2, but", "pip install 'numpy<2'")),
    ("310P3", "AttributeError: module 'numpy' has no attribute 'float_'", ("has NumPy 2, but",)),
    ("310P3", "E10016: Opname [input] specified in [--input_shape] is not found in the model.", ("has no node input, which --input",)),
    ("310P3", "E10016: Op name input specified in --input_shape is not found in the model. Confirm", ("has no node input, which ",)),
    ("310P3", "E20001: [PID: 4711] Failed to compile Op [Conv_0]. (optype: [Conv2D])", ("E20001: [PID: 4711] Failed to compile Op",)),
    ("310P3", "E19999: Inner Error!\nE19999: [PID: 62] [Call][PreRun] Failed[FILE: manager.cc]", ("E19999: [PID: 62] [Call][PreRun]",)),
    ("310P3", "E19999: Inner Error!\n        Unknown error occurred. Please check the log.", ("E19999: Unknown error", "export ASC")),
    ("310P3", "E10001: Value [x] for parameter [--model] is invalid.", ("None",))])
def test_atcs_failures_are_explained(machine, monkeypatch, chip, log, texts):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(install(machine / "Ascend", "8.5.0", "ascend910b")))
    explanation = str(doctor.explain("ATC run failed\n%s\n  TraceBack\n" % log, "Ascend" + chip))
    assert all(text in explanation for text in texts), explanation


@pytest.mark.parametrize("chip, log, text", [
    ("310P3", "[ERROR] EE1001: rtModelCheckCompatibility failed, supported socVersion=Ascend310P3, but the model socVersion=Ascend910B",
     "the OM is for Ascend910B, but the card's chip is Ascend310P3; run: bash run_all.sh --stage 3 --chip-name 310P3"),
    ("310P3", "E10001: Value Ascend910B4 for parameter soc_version is invalid. Reason: Model soc version is not support in this device.",
     "the OM is for Ascend910B4, but the card's chip is Ascend310P3; "),
    ("310P3", "E10001: Value [Ascend310P3] for parameter [soc_version] is invalid. Reason: aclrtCheckArchCompatibility ret: 0x1",
     "the OM is for Ascend310P3, but the card's chip is another one; "),
    ("310", "E19999: Inner Error!\nE19999 index:0 > stream_list.size(): 0, check invalid[FUNC:SetStream]", "is probably for another chip"),
    ("310", "E19999 The opp version of the model does not match the current opp run package, Model is [6.4]", "was made with another CANN"),
    ("310P3", "ModuleNotFoundError: No module named 'attr'", "None")])  # of whichever Python ran this tool
def test_failures_of_tools_that_run_oms_are_explained(chip, log, text):
    assert text in str(doctor.explain("[INFO] acl init success\n%s\n[ERROR] load model from file failed\n" % log, "Ascend" + chip))


def test_given_set_env_wins(machine):
    none = machine / "none.sh"
    check_error(run_all("--work-dir", machine / "work", "--set-env", none), "set_env: %s: no such file" % none)
    install(machine / "Ascend", "8.5.0", "ascend310p")
    other = install(machine / "other", "8.1.RC1", "ascend310p")
    assert "CANN 8.1.RC1" in check(machine, "--stop-stage", 3, set_env=str(other.parent / "set_env.sh"))[1]["CANN"]["found"]
    assert check(machine, "--stop-stage", 3, set_env="/dev/null")[1]["CANN"]["state"] == "absent"


def test_missing_pieces_of_a_card_are_named_with_their_commands(machine):
    process, rows = check(machine, "--backend", "ais_bench", TABLE="22.0.2_300i_pro", device_id="1 7")
    assert rows["driver and card"]["state"] == "missing" and "no device 7 among 0 1" in rows["driver and card"]["found"]
    assert rows["CANN"]["state"] == "missing" and "Ascend-cann-toolkit_" in rows["CANN"]["run"]
    assert rows["ais_bench"]["state"] == "missing" and "pip install aclruntime" in rows["ais_bench"]["run"]
    assert rows["benchmark." + MACHINE]["state"] == "absent"
    last = process.stdout.splitlines()[-1]
    assert last == "run_all.sh with backend ais_bench lacks: driver and card, CANN, CANN's library, ais_bench"
    # An alarm stops nothing. A broken driver stops a run on the card.
    process, rows = check(machine, "--stop-stage", 5, TABLE="23.0.0_200i_dk_a2")
    assert process.returncode == 0 and rows["driver and card"]["state"] == "note"
    assert rows["driver and card"]["found"].endswith("card 0: Alarm")
    process, rows = check(machine, "--backend", "benchmark", FAIL="npu-smi")
    assert rows["driver and card"]["state"] == "missing" and "ret is -8005" in rows["driver and card"]["found"]
    assert check(machine, FAIL="npu-smi")[0].returncode == 0  # ONNX Runtime needs no driver
    process, rows = check(machine, "--stop-stage", 5, TABLE="24.1.rc3.7_a3")
    assert "910_N" in rows["chip"]["found"] and rows["chip"]["state"] == "absent"


def test_oms_of_the_run_are_checked(machine):
    work, arguments = machine / "work", ["--backend", "benchmark", "--stage", 4]
    write_om(write(work / "deepmar_bs1.om"), write_model(machine / "m.onnx"), soc_version="Ascend910B3",
             atc_cmdline="atc --input_shape=x:8,3,224,224 --insert_op_conf=a")
    row = check(machine, *arguments)[1]["deepmar_bs1.om"]
    assert row["state"] == "missing" and row["run"].endswith("--chip-name 310P3")
    for text in ("for Ascend910B3, but npu-smi info names Ascend310P3", "takes batches of 8, not 1", "takes uint8 bins"):
        assert text in row["found"]
    assert "deepmar_bs1.om" not in check(machine, "--stage", 4)[1]  # ONNX Runtime does not run it


def test_oms_made_by_a_newer_cann_are_noted(machine, monkeypatch):
    """An OM has the number of a package, which differs from CANN's own."""
    home = install(machine / "Ascend", "8.1.RC1", "ascend310p")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    model, path = write_model(machine / "m.onnx"), write(machine / "deepmar_bs1.om")
    for made, package, noted in (("7.7.0.1.238", "", False), ("7.8.0.1.1", "7.7.0.1.238", True), ("8.2.RC1", "", True)):
        write(home / "compiler" / "version.info", "Version=%s\nversion_dir=8.1\n" % package if package else "")
        write_om(path, model, atc_version=made)
        process = script("tools/run/doctor.py", "om", machine, "1", "224 224", "no", "0")
        assert process.returncode == 0 and process.stdout == ""
        assert process.stderr.startswith("note: %s: the OM was made by version %s, newer than CANN 8.1.RC1 in " % (path, made)) == noted


def test_disk_must_hold_the_bins(machine):
    rows = check(machine, "--stop-stage", 4, sample_size="9" * 12)[1]
    quarter = check(machine, "--stop-stage", 4, "--aipp", "yes", sample_size="9" * 12)[1]
    eighth = check(machine, "--stop-stage", 4, "--aipp", "nv12-601", sample_size="9" * 12)[1]
    assert rows["disk"]["state"] == quarter["disk"]["state"] == "missing"
    assert [float(row["disk"]["found"].split()[-5]) for row in (rows, quarter, eighth)] == [602112000.0, 150528000.0, 75264000.0]


def test_ais_bench_is_checked_by_ais_bench_files(machine):
    site, arguments = machine / "site", ["--backend", "ais_bench"]
    write(site / "ais_bench" / "__init__.py")
    row = check(machine, *arguments, PYTHONPATH=str(site))[1]["ais_bench"]
    assert row["state"] == "missing" and "language models" in row["found"] and "uninstall ais_bench_benchmark" in row["run"]
    write(site / "ais_bench" / "infer" / "__init__.py")
    write(site / "aclruntime.py")
    row = check(machine, *arguments, PYTHONPATH=str(site))[1]["ais_bench"]
    assert row["state"] in ("ok", "note"), row  # a note if there is no pkg_resources


@pytest.mark.parametrize("version, year", [("except ImportError: pass", 2024), ("except ImportError: version = None", 2023)])
def test_ais_bench_that_fails_without_pkg_resources_is_refused(tmp_path, monkeypatch, capsys, version, year):
    write(tmp_path / "ais_bench" / "__init__.py")
    write(tmp_path / "ais_bench" / "infer" / "__init__.py")
    write(tmp_path / "ais_bench" / "infer" / "miscellaneous.py",
          "def version_check(args):\n    try: import no_such_module as version\n    %s\n    return version\n" % version)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ais_bench_files, "has_module", lambda name: name != "pkg_resources")
    if year == 2024:
        with pytest.raises(ValueError, match="no pkg_resources, .* fails without it; run: .* -m pip install 'setuptools<81'"):
            ais_bench_files.check("/work")
    else:
        ais_bench_files.check("/work")
        assert "runs in an older mode" in capsys.readouterr().err


def test_python_without_wheels_of_ais_bench_is_told_how_to_build_them(monkeypatch):
    monkeypatch.setattr(ais_bench_files, "has_module", lambda name: False)
    for version, text in (((3, 12, 1), "no aclruntime; run: .* -m pip install aclruntime-"), ((3, 13, 0), "up to Python 3.12.* run: CANN")):
        monkeypatch.setattr(ais_bench_files.sys, "version_info", version)
        with pytest.raises(ValueError, match=text):
            ais_bench_files.check("/work")


def test_inputs_of_the_user_are_checked(machine):
    sample, data = machine / "sample", own_data(str(machine)) + ["--stop-stage", 5]

    def inputs(*arguments):
        row = check(machine, *arguments)[1]["inputs"]
        return row["state"], row["found"]

    for name in ("checkpoint.pth.tar", "label.json", "images/1.png", "images/x y.png"):
        write(sample / name)
    write(sample / "image.txt", "\ufeff1.png\nx y.png")
    state, found = inputs(*data)
    assert state == "ok" and found.endswith("label.json, 2 images")
    write(sample / "image.txt", "1.png\n2.png\n")
    state, found = inputs(*data)
    assert state == "missing" and "1 of the 2 images" in found and "as 2.png" in found
    (sample / "checkpoint.pth.tar").unlink()
    assert inputs(*data) == ("missing", "no %s" % (sample / "checkpoint.pth.tar"))
    assert inputs("--stage", 5, "--stop-stage", 6, "--checkpoint", sample)[0] == "ok"
    assert inputs("--stage", 4, "--stop-stage", 4, "--images", sample) == ("missing", "image_list is not set")
    assert inputs(*data, "--int8", "yes")[1].endswith("calibration_list is not set")


def test_missing_packages_are_left_to_the_run(machine):
    bare, checkout = machine / "bare", machine / "checkout"
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", str(bare)])
    for name in ("run_all.sh", "requirements.txt", "get_info.py", "tools/run/backend.sh", "tools/run/driver.sh", "tools/run/doctor.py",
                 "lib/__init__.py", "lib/script.py", "lib/files.py", "lib/names.py", "lib/om.py", "tools/run/ais_bench_files.py"):
        with open(os.path.join(ROOT, name)) as f:
            write(checkout / name, f.read())
    process, rows = check(machine, root=checkout, PYTHON=str(bare / "bin" / "python"))
    assert process.returncode == 0 and rows["Python"]["state"] == rows["ONNX Runtime"]["state"] == "note"
    assert "numpy" in rows["Python"]["found"] and " into %s/.venv-" % checkout in rows["Python"]["found"]
    assert "has no ais_bench and no aclruntime" in rows["ais_bench"]["found"]
    row = check(machine, "--stage", 5, "--stop-stage", 5, root=checkout, PYTHON=str(bare / "bin" / "python"))[1]["Python"]
    assert "the run installs numpy into" in row["found"]
    check_error(run_all("--check", PYTHON=str(machine / "none")), "%s: no such Python" % (machine / "none"))
    check_error(run_all("--check", "--json", machine / "none" / "x"), "%s: cannot be written: No such" % (machine / "none" / "x"))
