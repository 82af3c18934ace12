"""Stands in for npu-smi: prints a recorded table of `npu-smi info` (tests/npu_smi), that of TABLE, or several of them."""
import os
import sys

from om import FAIL, die

if sys.argv[1:] != ["info"]:
    die("Error parameter of %s" % " ".join(sys.argv[1:]))
if FAIL == "npu-smi":
    die("DrvMngGetConsoleLogLevel failed. (ret=4)", "dcmi module initialize failed. ret is -8005")
for name in os.environ.get("TABLE", "25.3.rc1_300i_pro").split(","):
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "npu_smi", name + ".txt")) as f:
        print(f.read())
