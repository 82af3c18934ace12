"""The execution providers of ONNX Runtime: which of them this machine has, and which options each one gets."""
import contextlib
import io
import json
import sys

from lib.script import importing, one_line

CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
PROVIDERS = ["CANNExecutionProvider", "CUDAExecutionProvider", CPU]  # the default order, the best first
REMEDIES = {"CANNExecutionProvider": "source CANN's set_env.sh, and see that npu-smi info lists the card",
            "CUDAExecutionProvider": "it needs a GPU with its driver, CUDA and cuDNN"}
HOST_PROVIDERS = (CPU, OPENVINO)  # these compute in the machine's own memory and can run several calls at a time; others run one
# These have numbered devices. The others do not have the option device_id.
DEVICE_PROVIDERS = PROVIDERS[:2] + ["TensorrtExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider"]


def import_onnxruntime():
    """Returns the module onnxruntime. Raises ImportError, with the remedy if it was built for NumPy 1 but finds NumPy 2."""
    messages = io.StringIO()
    try:
        with importing(ends=False), contextlib.redirect_stderr(messages):
            import onnxruntime
        return onnxruntime
    except ImportError:
        if "compiled using NumPy 1" in messages.getvalue():  # NumPy prints a page about it, with a traceback
            import numpy
            messages = io.StringIO()
            raise ImportError("the installed ONNX Runtime was built for NumPy 1 and cannot be imported with NumPy %s; run: "
                              "%s -m pip install 'numpy<2'" % (numpy.__version__, sys.executable))
        raise
    finally:
        sys.stderr.write(messages.getvalue())


def default(device_id=0):
    """Returns the providers that a session tries by default: those of PROVIDERS that this ONNX Runtime was built with."""
    built = import_onnxruntime().get_available_providers()
    return [(name, own_options(name, device_id)) for name in PROVIDERS if name in built]


def own_options(name, device_id):
    """Returns the options that a provider gets: the number of its device. CANN's also gets the one that stops it from writing OMs.

    CANN's provider writes an .om file for each model into the current folder, unless dump_om_model is 0. ONNX Runtime 1.18 was the
    first with this option; older ones refuse it.
    """
    options = {"device_id": str(device_id)} if name in DEVICE_PROVIDERS else {}
    if name == PROVIDERS[0] and [int(number) for number in import_onnxruntime().__version__.split(".")[:2]] >= [1, 18]:
        options["dump_om_model"] = "0"
    return options


def provider_note(session, available):
    """Returns, for example, "CANNExecutionProvider did not load" if the CPU runs the model instead of that provider, else ''."""
    better = [name for name in PROVIDERS[:-1] if name in available]
    return better[0] + " did not load" if better and session.get_providers()[0] == CPU else ""


def available():
    """Returns the names of this ONNX Runtime's providers, with the one of the plug-in package onnxruntime-ep-openvino.

    Leaves out Azure, which runs nothing here, and OpenVINO's extra names for its devices.
    """
    onnxruntime = import_onnxruntime()
    names = onnxruntime.get_available_providers()
    if OPENVINO not in names and hasattr(onnxruntime, "register_execution_provider_library"):
        with contextlib.suppress(ImportError):
            import onnxruntime_ep_openvino
            try:
                onnxruntime.register_execution_provider_library(OPENVINO, onnxruntime_ep_openvino.get_library_path())
            except Exception as error:  # ONNX Runtime's exceptions have no common class
                if "already registered" not in str(error):  # on some CPUs it offers no device, so that it is never listed
                    raise ValueError("onnxruntime-ep-openvino does not fit ONNX Runtime %s: %s"
                                     % (onnxruntime.__version__, one_line(error)))
            names = onnxruntime.get_available_providers()
    return [name for name in names if not name.startswith("Azure") and "." not in name]


def add(options, name, device_id, threads, calls, exact):
    """Sets a session's options for one provider. Returns the providers to open it with, or None if the options name it.

    threads: CPU threads for all calls together. calls: how many run at the same time. exact: compute everything in float32.
    Raises ValueError for a provider that this ONNX Runtime does not have.
    """
    if name not in available():
        raise ValueError("this ONNX Runtime has no provider %s, only %s" % (name, ", ".join(available())))
    if name == CPU:
        return [CPU]
    if name != OPENVINO:
        return [(name, own_options(name, device_id)), CPU]
    # The provider options for streams and threads (num_streams, num_of_threads) have no effect. This configuration works.
    configuration = {"NUM_STREAMS": str(calls), "INFERENCE_NUM_THREADS": str(threads)}
    if exact:  # otherwise it computes in bfloat16 if the CPU can
        configuration["INFERENCE_PRECISION_HINT"] = "f32"
    settings = {"load_config": json.dumps({"CPU": configuration})}
    onnxruntime = import_onnxruntime()
    devices = [device for device in getattr(onnxruntime, "get_ep_devices", list)()
               if device.ep_name == OPENVINO and device.ep_metadata.get("ov_device") == "CPU"]
    if not devices:  # OpenVINO is built into this ONNX Runtime, not a plug-in
        return [(OPENVINO, dict(settings, device_type="CPU")), CPU]
    options.add_provider_for_devices(devices, settings)
    return None
