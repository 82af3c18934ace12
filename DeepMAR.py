"""DeepMAR: pedestrian attributes from a ResNet-50, and how its checkpoints are read.

Li, Chen, Huang: "Multi-attribute learning for pedestrian attribute recognition in surveillance scenarios" (ACPR 2015).
A drop-in for baseline/model/DeepMAR.py of https://github.com/dangweili/pedestrian-attribute-recognition-pytorch: the
same classes, keyword arguments and state-dict keys, on torchvision's ResNet-50.

load_model(path) returns the network of a checkpoint; nothing in the file is executed.
"""
import inspect
import mmap
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import Bottleneck, ResNet

BLOCKS = [3, 4, 6, 3]  # residual blocks of ResNet-50 in layer1 ... layer4 (He et al., table 1)
FEATURES = 2048        # channels that layer4 gives


class ResNet50Base(ResNet):
    """torchvision's ResNet-50 up to layer4: float32 [N,3,H,W] -> [N,2048,H/32,W/32] (H/16 with last_conv_stride=1)."""

    def __init__(self, last_conv_stride=2, pretrained=False):
        super().__init__(Bottleneck, BLOCKS)
        del self.avgpool, self.fc
        self.layer4[0].conv2.stride = (last_conv_stride, last_conv_stride)
        self.layer4[0].downsample[0].stride = (last_conv_stride, last_conv_stride)
        if pretrained:
            # The ImageNet weights that the original starts from; torchvision 0.13 renamed the argument.
            v1 = ({"weights": torchvision.models.ResNet50_Weights.IMAGENET1K_V1}
                  if hasattr(torchvision.models, "ResNet50_Weights") else {"pretrained": True})
            imagenet = torchvision.models.resnet50(**v1).state_dict()
            self.load_state_dict({key: value for key, value in imagenet.items() if not key.startswith("fc.")})

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class DeepMAR_ResNet50(nn.Module):
    """The network: float32 images [N,3,H,W] (RGB, normalised; H = W = 224 in the pipeline) -> logits [N,num_att].

    A logit >= 0 means that the image has the attribute; its sigmoid is the probability.
    """

    def __init__(self, num_att=35, last_conv_stride=2, drop_pool5=True, drop_pool5_rate=0.5, pretrained=False):
        super().__init__()
        self.num_att = num_att
        self.drop_pool5 = drop_pool5
        self.drop_pool5_rate = drop_pool5_rate
        self.base = ResNet50Base(last_conv_stride, pretrained)
        self.classifier = nn.Linear(FEATURES, num_att)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.constant_(self.classifier.bias, 0)

    def forward(self, x):
        x = self.base(x)
        # Plain integers: torch 1.6 cannot export a pooling window that is computed in the graph.
        x = F.avg_pool2d(x, [int(size) for size in x.shape[2:]])
        x = torch.flatten(x, 1)
        if self.drop_pool5:
            x = F.dropout(x, p=self.drop_pool5_rate, training=self.training)
        return self.classifier(x)


class DeepMAR_ResNet50_ExtractFeature(object):
    """Calls a model in eval mode: images [N,3,H,W] -> numpy logits [N,num_att]; leaves the model in the mode it had."""

    def __init__(self, model, **kwargs):
        self.model = model

    def __call__(self, imgs):
        if not isinstance(imgs, torch.Tensor):
            raise ValueError("imgs must be a torch.Tensor, not %s" % type(imgs).__name__)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model(imgs).cpu().numpy()
        finally:
            self.model.train(training)


# --- checkpoints ---------------------------------------------------------------------------------------------------

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before the zip format: a pickled magic number

# All that the pickle of a checkpoint needs to name. Storage types are data, the functions build tensors from them.
ALLOWED = {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor"),
           ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}
ALLOWED |= {("torch", kind + "Storage") for kind in
            "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()}
# What stands beside the state dict in some files, with all of numpy (Python 3 writes numpy's bytes as a call of encode).
IGNORED = {("argparse", "Namespace"), ("collections", "Counter"), ("_codecs", "encode")}


class Unused(object):
    """Stands for a value that inference does not need: a training run's numpy scores, its argparse.Namespace."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass


class Tuple(tuple):
    """A tuple of a pickle, which is no key of a dict: to hash deeply nested ones crashes Python, or takes for ever."""

    def __hash__(self):
        raise pickle.UnpicklingError("it has a tuple for a key, which no state dict has")


def load_as_tuple(load):
    """One of Unpickler's methods that make a tuple, making a Tuple."""
    def load_tuple(self):
        load(self)
        self.stack[-1] = Tuple(self.stack[-1])
    return load_tuple


class CheckpointPickle(object):
    """The pickle_module for torch.load: a pickle names only what is allowed above, so it cannot run code."""

    class Unpickler(pickle._Unpickler):  # the one in Python: the one in C does not let us replace BUILD
        archive = None  # torch's reader of the zip format; the earlier one has none

        def find_class(self, module, name):
            if (module, name) in ALLOWED:
                return super().find_class(module, name)
            if module.split(".")[0] == "numpy" or (module, name) in IGNORED:
                return Unused
            raise pickle.UnpicklingError("it refers to %r, which no state dict needs (a whole pickled model, or "
                                         "code); save model.state_dict()" % (module + "." + name))

        def load_build(self):
            # BUILD sets attributes, of functions too: one renamed that way makes torch.load write a file of any name.
            # All that a checkpoint sets is its state dict's _metadata, which nothing here needs.
            self.stack.pop()

        def load_binpersid(self):
            # torch 1.6 believes what the pickle claims of a storage's size, and would read beyond its record's end.
            if self.archive:
                _, kind, key, _, count = self.stack[-1]
                dtype = kind.dtype if isinstance(getattr(kind, "dtype", None), torch.dtype) else kind(0).dtype
                size = len(self.archive.get_record("data/%s" % key))
                if not 0 <= count * torch.empty(0, dtype=dtype).element_size() <= size:
                    raise pickle.UnpicklingError("it claims %d values in a record of %d bytes" % (count, size))
            super().load_binpersid()

        dispatch = dict(pickle._Unpickler.dispatch)
        dispatch[pickle.BUILD[0]] = load_build
        dispatch[pickle.BINPERSID[0]] = load_binpersid
        for opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
            dispatch[opcode[0]] = load_as_tuple(dispatch[opcode[0]])

    __name__ = "CheckpointPickle"  # torch.load asks every pickle_module for its name

    def __init__(self, archive):
        self.Unpickler = type("Unpickler", (self.Unpickler,), {"archive": archive})

    def load(self, file, **kwargs):
        return self.Unpickler(file, **kwargs).load()


def check_container(path):
    """Raises ValueError unless path is a file of torch.save; returns whether it is its zip format (torch >= 1.6)."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(len(MAGIC))
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except Exception as error:  # zipfile raises many kinds for a damaged file
            raise ValueError("%s: damaged or cut off (%s)" % (path, error))
        # torch.load runs a TorchScript archive, which is one with constants.pkl. The name is looked for in the bytes
        # because zipfile and torch may find different directories in a file that was made to fool one of them.
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"constants.pkl") >= 0:
                raise ValueError("%s: a TorchScript archive, not a checkpoint; save model.state_dict()" % path)
        if not any(member.filename.split("/", 1)[-1] == "data.pkl" for member in members):
            raise ValueError("%s: a zip file, but no PyTorch checkpoint (it has no data.pkl)" % path)
        # torch.save compresses nothing, so more content than file is a zip bomb.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("%s: its content is larger than the file; torch.save writes no such file" % path)
    elif start != MAGIC:
        raise ValueError("%s: no PyTorch checkpoint (it begins with %r)" % (path, start))
    elif tarfile.is_tarfile(path):  # torch.load tries the tar format of torch 0.1 first, and would unpack it
        raise ValueError("%s: a tar file, not a checkpoint" % path)
    return start != MAGIC


def load_checkpoint(path):
    """Returns the model's state dict of a checkpoint: OrderedDict, key -> CPU tensor.

    Reads a bare state dict, {'state_dict': ...} and {'state_dicts': [model, optimizer]}, with or without DataParallel's
    'module.' prefix, in every format of torch.save, Python 2.7's included. Runs no code of the file.
    Raises OSError if path cannot be read, ValueError if it is no such checkpoint.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; the first argument is the trained checkpoint" % path)
    zipped = check_container(path)
    arguments = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = CheckpointPickle(torch._C.PyTorchFileReader(path) if zipped else None)
            # latin1, because Python 2 wrote numpy's binary data as text.
            content = torch.load(path, map_location="cpu", pickle_module=module, encoding="latin1",
                                 **arguments)
    except pickle.UnpicklingError as error:
        raise ValueError("%s: cannot be read as a checkpoint: %s" % (path, error))
    except Exception as error:  # a damaged or hostile file can raise anything here
        raise ValueError("%s: damaged or cut off (%s: %s)"
                         % (path, type(error).__name__, str(error).split("\n")[0]))

    state = content
    if isinstance(content, dict) and "state_dict" in content:
        state = content["state_dict"]
    elif isinstance(content, dict) and "state_dicts" in content:
        states = content["state_dicts"]
        state = states[0] if isinstance(states, (list, tuple)) and states else None
    if not isinstance(state, dict) or not state:
        raise ValueError("%s: holds no state dict (looked for 'state_dict', 'state_dicts' and a bare one)" % path)
    size, total = os.path.getsize(path), 0
    result = OrderedDict()
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError("%s: holds no state dict: %s is %s, not a tensor" % (
                path, repr(key) if isinstance(key, str) else "a key", type(value).__name__))
        if not key.isprintable():  # the keys stand in messages
            raise ValueError("%s: holds no state dict: it has a key %r" % (path, key))
        total += value.numel()
        # The strides, because where they overflow torch 1.6 lets a tensor reach beyond its storage.
        if max([total] + list(value.shape + value.stride())) > size:
            raise ValueError("%s: its tensors up to %s have more values than the file has bytes" % (path, key))
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise ValueError("%s: %s holds NaN or infinite values" % (path, key))
        result[key[len("module."):] if key.startswith("module.") else key] = value
    return result


def some(items, most=4):
    """The first few items as text, with the number of the others."""
    items = list(items)
    return ", ".join(items[:most]) + (" and %d more" % (len(items) - most) if len(items) > most else "")


def build_model(state):
    """Returns the DeepMAR_ResNet50 of a state dict, in eval mode; the number of attributes is the classifier's.

    Raises ValueError that names what does not fit: missing and unexpected keys, wrong shapes, another backbone.
    """
    weight = state.get("classifier.weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != FEATURES:
        raise ValueError("not a DeepMAR ResNet-50 checkpoint: %s instead of classifier.weight [num_att,%d]; its keys are %s"
                         % ("none" if weight is None else list(weight.shape), FEATURES, some(state)))
    model = DeepMAR_ResNet50(num_att=weight.shape[0])
    expected = model.state_dict()
    # Checkpoints of torch < 0.4.1 have no num_batches_tracked, and inference does not use it.
    missing = [key for key in expected if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = ["%s %s instead of %s" % (key, list(state[key].shape), list(expected[key].shape))
              for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unexpected or shapes:
        blocks = [len({key.split(".")[2] for key in state if re.match(r"base\.layer%d\.\d+\." % layer, key)})
                  for layer in (1, 2, 3, 4)]
        problems = []
        if any(blocks) and (blocks != BLOCKS or "base.layer1.0.conv3.weight" not in state):
            problems.append("another backbone (%s residual blocks%s; ResNet-50 has %s)" % (
                blocks, "" if "base.layer1.0.conv3.weight" in state else " of two convolutions", BLOCKS))
        if missing:
            problems.append("missing: %s" % some(missing))
        if unexpected:
            problems.append("unexpected: %s" % some(unexpected))
        if shapes:
            problems.append("wrong shapes: %s" % some(shapes))
        raise ValueError("not a DeepMAR ResNet-50 checkpoint: %s" % "; ".join(problems))
    model.load_state_dict(state)
    return model.eval()


def load_model(path):
    """Returns the network of a checkpoint file, in eval mode; raises OSError or ValueError (see load_checkpoint)."""
    state = load_checkpoint(path)
    try:
        return build_model(state)
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error))
