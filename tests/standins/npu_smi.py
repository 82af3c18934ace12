"""Stands in for npu-smi: prints the table of `npu-smi info`, with CHIP's chips (310P3, or several with commas)."""
import os
import sys

from om import FAIL, die, devices

if sys.argv[1:] != ["info"]:
    die("Error parameter of %s" % " ".join(sys.argv[1:]))
if FAIL == "npu-smi":
    die("DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)", "dcmi model initialized failed, because the device is used.")
chips = os.environ.get("CHIP", "310P3").split(",")
line = "+-------------------------------+-----------------+------------------------------------------------------+"
print(line.replace("+---", "+---", 1))
print("| npu-smi 22.0.4                                   Version: 22.0.4                                       |")
print(line)
print("| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |")
print("| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |")
print(line.replace("-", "="))
for device in devices():
    print("| %-8d%-22s| OK              | 12.8         51                0    / 187            |"
          % (device, chips[device % len(chips)]))
    print("| 0       %-22d| NA              | 0            5745 / 7757                             |" % device)
    print(line.replace("-", "="))
print("| NPU     Chip                  | Process id      | Process name             | Process memory(MB)        |")
print("| 0       0                     | 31010           | Python3                  | 577                       |")
print(line.replace("-", "="))
