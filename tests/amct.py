"""Runs the genuine AMCT on a DeepMAR checkpoint, on the CPU. tests/test_amct.py starts this program, because AMCT changes its process.

    python3 tests/amct.py FOLDER CHECKPOINT MODEL CALIBRATION QUANT_CFG

FOLDER holds the source of github.com/hicann/amct. MODEL is the checkpoint's ONNX model, without BatchNormalization. CALIBRATION is a
folder of bins, QUANT_CFG is AMCT's settings. Writes into the current folder record.txt (all scales and offsets) and
twin_fake_quant_model.onnx.
"""
import glob
import os
import shutil
import sys
import types

import numpy as np


def import_amct(folder):
    """Returns AMCT's package for PyTorch. Its source is copied here first, because its protobuf modules are generated beside it."""
    from grpc_tools import protoc
    shutil.copytree(os.path.join(folder, "amct_pytorch"), "amct_pytorch", symlinks=True)
    protos = sorted(glob.glob("amct_pytorch/classic/graph_based/amct_pytorch/proto/*.proto"))
    assert protoc.main(["protoc", "-I.", "--python_out=."] + protos) == 0
    sys.path.insert(0, os.getcwd())
    for name in ("amct_pytorch", "amct_pytorch.classic"):  # the packages themselves import libraries for language models
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [os.path.join(os.getcwd(), *name.split("."))]
    from amct_pytorch.classic.graph_based import amct_pytorch
    return amct_pytorch


def take_weights(network, path):
    """Gives a network the folded weights of an ONNX model. A last bit's difference could move a weight to another integer."""
    import onnx
    import torch
    graph = onnx.load(path).graph
    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    for module, node in zip(convolutions, nodes):  # both are in the order of the computation
        assert len(nodes) == len(convolutions) and module.weight.shape == tensors[node.input[1]].shape
        module.weight, module.bias = (torch.nn.Parameter(tensors[name]) for name in node.input[1:])
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, torch.nn.BatchNorm2d):
                setattr(parent, name, torch.nn.Identity())


def main():
    import torch
    folder, checkpoint, model, calibration, settings = map(os.path.abspath, sys.argv[1:])
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from DeepMAR import load_model

    class Network(torch.nn.Module):
        """DeepMAR with its pooling as a layer, which AMCT for PyTorch quantizes as AMCT for ONNX does."""

        def __init__(self, model):
            super().__init__()
            self.base, self.pool, self.classifier = model.base, torch.nn.AvgPool2d(7), model.classifier

        def forward(self, x):
            return self.classifier(torch.flatten(self.pool(self.base(x)), 1))

    export = torch.onnx.export
    torch.onnx.export = lambda *arguments, **options: export(*arguments, dynamo=False, **options)
    amct, network, image = import_amct(folder), Network(load_model(checkpoint)).eval(), torch.zeros(1, 3, 224, 224)
    take_weights(network, model)
    amct.create_quant_config("config.json", network, image, config_defination=settings)
    network = amct.quantize_model("config.json", "folded.onnx", "record.txt", network, image, ["actual_input_1"], ["output1"])
    with torch.no_grad():
        for path in sorted(glob.glob(os.path.join(calibration, "*.bin"))):
            network(torch.from_numpy(np.fromfile(path, "<f4").reshape(image.shape)))
    amct.save_model("folded.onnx", "record.txt", "twin")


if __name__ == "__main__":
    main()
