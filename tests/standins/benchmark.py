"""Stands in for the benchmark binary: the options it knows, the lines it reads, and what it writes, over what is there."""
import os
import sys
import time

from om import FAIL, Model, devices, die

OPTIONS = ("model_type batch_size device_id om_path input_width input_height input_text_path useDvpp output_binary round "
           "input_imgFolder_path").split()
values = {}
for argument in sys.argv[1:]:
    name, equals, value = argument.partition("=")
    if not name.startswith("-") or name.startswith("--") or name[1:] not in OPTIONS or not equals:
        die("[ERROR] unknown option %s" % argument)
    values[name[1:]] = value
pure = "round" in values
for name in ["batch_size", "device_id", "om_path"] + (["round"] if pure else [
        "model_type", "input_width", "input_height", "input_text_path", "useDvpp", "output_binary"]):
    if name not in values:
        die("[ERROR] -%s is missing" % name)
if not pure and (values["model_type"], values["useDvpp"], values["output_binary"]) != ("vision", "false", "true"):
    die("[ERROR] wrong mode")
if not values["om_path"].endswith(".om") or not os.path.isfile(values["om_path"]):
    die("[ERROR] Check the om path: %s" % values["om_path"])
batch_size, device = int(values["batch_size"]), int(values["device_id"])
if device not in devices():
    die("[ERROR] aclrtSetDevice failed, device %d, errorCode 107001" % device)
if FAIL == "another chip":
    die("[ERROR] rtModelCheckCompatibility failed, supported socVersion=Ascend310P3, but the model socVersion=Ascend910B")
model = Model(values["om_path"])
if model.batch_size != batch_size or not pure and model.shape[2:] != [int(values["input_height"]), int(values["input_width"])]:
    die("[ERROR] the model's input is %s" % model.shape)
if pure:
    started, rounds = time.time(), int(values["round"])
    for _ in range(rounds):
        model.run([])
    seconds = time.time() - started
    name = "./result/PureInfer_perf_of_%s_in_device_%d.txt" % (os.path.splitext(os.path.basename(values["om_path"]))[0], device)
    os.makedirs("result", exist_ok=True)
    with open(name, "w") as f:
        f.write("ave_throughputRate = %gsamples/s, ave_latency = %gms\n"
                % (rounds * batch_size / seconds, 1000 * seconds / rounds / batch_size))
    print("[INFO] PureInfer result saved in %s" % name)
    sys.exit()
paths = []
with open(values["input_text_path"]) as f:
    for index, line in enumerate(f):
        columns = line.split()
        if len(columns) != 4 or columns[0] != str(index) or not os.path.isfile(columns[1]):
            die("[ERROR] line %d of %s: %s" % (index, values["input_text_path"], line))
        paths.append(columns[1])

folder = "result/dumpOutput_device%d" % device
os.makedirs(folder, exist_ok=True)
started, inside = time.time(), 0.0
for i in range(0, len(paths), batch_size):
    if FAIL == "benchmark" and i:
        die("[ERROR] aclmdlExecute failed, modelId is 1, errorCode is 507011", "[ERROR] inference failed")
    before = time.time()
    outputs = model.run(paths[i:i + batch_size])
    inside += time.time() - before
    for path, logits in zip(paths[i:i + batch_size], outputs):
        logits.tofile("%s/%s_1.bin" % (folder, os.path.splitext(os.path.basename(path))[0]))
if FAIL == "benchmark leaves fewer":
    os.remove("%s/%s_1.bin" % (folder, os.path.splitext(os.path.basename(paths[-1]))[0]))
seconds = time.time() - started
rate = len(paths) / seconds
if FAIL != "benchmark leaves no rate":
    with open("result/perf_vision_batchsize_%d_device_%d.txt" % (batch_size, device), "w") as f:
        f.write("[e2e] throughputRate: %g, latency: %g\n[infer] throughputRate: %g, Interface throughputRate: %g, moduleLatency: %g\n"
                % (rate, 1000 * seconds, rate, len(paths) / inside, 1000 / rate))
print("[INFO] Dataset number: %d finished" % len(paths))
