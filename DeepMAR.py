"""DeepMAR: a ResNet-50 that recognises pedestrian attributes, and the reader of its checkpoints.

Li, Chen, Huang: "Multi-attribute learning for pedestrian attribute recognition in surveillance scenarios" (ACPR 2015).
This file can replace baseline/model/DeepMAR.py of https://github.com/dangweili/pedestrian-attribute-recognition-pytorch.
It has the same classes, keyword arguments and state-dict keys, and builds on torchvision's ResNet-50.

load_model(path) returns the network that a checkpoint holds. It executes nothing in the file.
"""
import functools
import io
import os
import pickle
import re
import shlex
import struct
import tarfile
import zipfile
from collections import OrderedDict, namedtuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import Bottleneck, ResNet

BLOCKS = [3, 4, 6, 3]  # residual blocks of ResNet-50 in layer1 ... layer4 (He et al., table 1)
FEATURES = 2048        # channels of layer4's output


class ResNet50Base(ResNet):
    """torchvision's ResNet-50 up to layer4: float32 [N,3,H,W] -> [N,2048,H/32,W/32] (H/16 with last_conv_stride=1)."""

    def __init__(self, last_conv_stride=2, pretrained=False):
        super().__init__(Bottleneck, BLOCKS)
        del self.avgpool, self.fc
        self.layer4[0].conv2.stride = (last_conv_stride, last_conv_stride)
        self.layer4[0].downsample[0].stride = (last_conv_stride, last_conv_stride)
        if pretrained:
            # The original starts from these ImageNet weights. torchvision 0.13 renamed the argument.
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
        # The sizes must be plain integers: torch 1.6 cannot export a pooling window that is computed in the graph.
        x = F.avg_pool2d(x, [int(size) for size in x.shape[2:]])
        x = torch.flatten(x, 1)
        if self.drop_pool5:
            x = F.dropout(x, p=self.drop_pool5_rate, training=self.training)
        return self.classifier(x)


class DeepMAR_ResNet50_ExtractFeature(object):
    """Runs a model in eval mode: images [N,3,H,W] -> numpy logits [N,num_att]. Restores the model's mode afterwards."""

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
#
# A checkpoint is a pickle and the tensors' values. Python's unpickler, which torch.load uses, calls any function that the
# pickle names, even os.system. Here, each name and each call becomes a placeholder (class Named), so that nothing is imported
# or called. numpy builds the state dict's tensors from the placeholders that describe them. All other content is ignored.

MAGIC = 0x1950a86a20f9469cfc6c  # torch.save's files began with this number before the zip format
DEPTH = 5                       # search this many levels of dicts and lists for a state dict

# Functions that build a tensor. They take storage, offset, size and stride first. The last one is torch_npu's (Ascend).
TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_npu_tensor"}
# Functions that take a tensor first and return it as a parameter or on another device.
TENSOR_WRAPPERS = {"_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor"}
# Functions that build a tensor with Python attributes. They take (function to call, class, its arguments, attributes).
ATTRIBUTE_WRAPPERS = {"_rebuild_from_type", "_rebuild_from_type_v2"}

# torch's storage types -> numpy's types. numpy has no bfloat16, which is the upper half of a float32.
STORAGE_TYPES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4", "Short": "i2",
         "Char": "i1", "Byte": "u1", "Bool": "?", "Untyped": "u1", "ComplexFloat": "c8", "ComplexDouble": "c16",
         "QInt8": "i1", "QUInt8": "u1", "QInt32": "i4", "QUInt4x2": "u1", "QUInt2x4": "u1"}
SAFETENSORS_TYPES = {"F64": "Double", "F32": "Float", "F16": "Half", "BF16": "BFloat16", "I64": "Long", "I32": "Int",
                     "I16": "Short", "I8": "Char", "U8": "Byte", "BOOL": "Bool"}

# Training scripts store the model's state dict under these names. The first name that a file has is used.
MODEL_NAMES = ["state_dict", "state_dicts", "model_state_dict", "model", "module", "net", "network", "weights", "params"]
UNKNOWN = float("inf")  # the rank of all other names
# Prefixes that DataParallel, PyTorch Lightning and torch.compile add to the network's keys.
WRAPPERS = {"module", "model", "_orig_mod"}
# Splits a state dict's key into a prefix and the network's own key.
KEY = re.compile(r"((?:.*\.)?)((?:base|classifier)\..*)", re.DOTALL)


class Refused(ValueError):
    """Says what is wrong with a file. load_checkpoint adds the file's name."""


# The next three classes are copied from lib/pickles.py, so that this file works alone.

class Named(object):
    """Stands for a name in a pickle or, with arguments, for a call. state: for __setstate__. entries: a dict's, with text keys."""
    __slots__ = "name", "arguments", "state", "entries"

    def __init__(self, name, arguments=None):
        self.name, self.arguments, self.state, self.entries = name, arguments, None, {}

    def __setitem__(self, key, value):
        self.entries[key] = value

    def append(self, item):
        """Drops an item of a list or deque, which no reader needs."""

    @property
    def function(self):
        """The name without its module."""
        return self.name.rpartition(".")[2]


class Pickle(io.BytesIO):
    """The bytes of a pickle. Lines must be short, as Python < 3.7.14 takes hours for a number of a million digits."""

    def readline(self):
        return super().readline(5000)


class Unpickler(pickle._Unpickler):
    """Reads the next pickle from a Pickle. Replaces each opcode that would import, call or change something.

    The base class is Python's unpickler in Python. The one in C takes 2 GB for ten bytes, and some files crash it.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file):
        super().__init__(file, encoding="latin1")  # it decodes all bytes, and Python 2's text may hold any

    def load_mark(self):
        if len(self.metastack) == 10 ** 4:  # Python's picklers give up earlier, and each mark takes 130 bytes here
            raise pickle.UnpicklingError("it is nested too deeply")
        super().load_mark()

    def find_class(self, module, name):
        return Named(module + "." + name)

    def call(self, function, arguments):
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls a value that is no function")
        return Named(function.name, arguments)

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj_ex(self):
        self.stack.pop()  # the keyword arguments
        self.load_reduce()

    def _instantiate(self, function, arguments):  # for OBJ and INST
        self.append(self.call(function, tuple(arguments)))

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Named):
            self.stack[-1].state = state

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        if isinstance(key, str):  # the hash of a deeply nested tuple can crash Python, or take for ever
            self.stack[-1][key] = value

    def load_setitems(self):
        items = iter(self.pop_mark())
        for pair in zip(items, items):
            self.stack += pair
            self.load_setitem()

    def load_dict(self):  # Python's picklers only write it without items
        self.pop_mark()
        self.append({})

    def refuse(self):
        raise pickle.UnpicklingError("it has an extension of copyreg, which nothing needs")

    dispatch.update({
        pickle.MARK[0]: load_mark, pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex, pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
        pickle.EXT1[0]: refuse, pickle.EXT2[0]: refuse, pickle.EXT4[0]: refuse,
        # A set is read as a list, which needs no hashes.
        pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list, pickle.ADDITEMS[0]: pickle._Unpickler.load_appends,
        pickle.FROZENSET[0]: pickle._Unpickler.load_list,
        # A bytearray (protocol 5) is read as bytes, because its memory would be taken before its bytes are there.
        0x96: pickle._Unpickler.load_binbytes8,
        # The protocol and the frames are skipped: Python 3.7 refuses protocol 5, and a frame's lines may be long.
        pickle.PROTO[0]: lambda self: self.read(1), pickle.FRAME[0]: lambda self: self.read(8)})


# Says where a tensor's values are: their type, the storage's name in the file and, in very old files, the part of it.
Storage = namedtuple("Storage", "kind key part")


class Checkpoint(Unpickler):
    """Reads torch.save's pickles. kinds: {a storage's name: its type}."""

    def __init__(self, file):
        super().__init__(file)
        self.kinds = {}

    def persistent_load(self, pid):
        """Returns what a persistent id stands for: a Storage, or a model's class (its source code follows)."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
                and isinstance(pid[1], Named) and isinstance(pid[2], str)):
            raise pickle.UnpicklingError("it has a persistent id that torch.save does not write")
        storage = Storage(pid[1].function.replace("Storage", ""), pid[2], pid[5] if len(pid) > 5 else None)
        self.kinds[storage.key] = storage.kind
        return storage


def read_zip(data):
    """Reads the zip format of torch >= 1.6. Returns (the content, a function that maps a storage's name to its bytes)."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    names = {member.filename.split("/")[-1]: member.filename for member in members}
    if "constants.pkl" in names:
        raise Refused("is a TorchScript archive, not a checkpoint; save model.state_dict()")
    if "data.pkl" not in names:
        raise Refused("is a zip file, but not a PyTorch checkpoint (it has no data.pkl)")
    # torch.save does not compress. A hostile zip file can claim to hold far more than its own size, to exhaust the memory.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(data):
        raise Refused("has compressed or oversized members, which torch.save does not write; if someone packed it, "
                      "unpack it and pack it without compression: zip -0 -r")
    for member in members:
        if member.CRC == 0:
            del member.CRC  # torch.save can leave the checksums out. Without this attribute, zipfile does not check them
    root = names["data.pkl"][:-len("data.pkl")]
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise Refused("it was saved on a big-endian machine, whose files are not supported")
    content = Checkpoint(Pickle(archive.read(names["data.pkl"]))).load()
    # Many tensors can share a storage. Each storage is read once.
    return content, functools.lru_cache(maxsize=None)(lambda key: archive.read(root + "data/" + key))


def read_old(data):
    """Reads torch.save's format from before the zip format, also Python 2.7's files. Returns the same as read_zip."""
    file = Pickle(data)
    if Checkpoint(file).load() != MAGIC:
        raise Refused("is a pickle, but not from torch.save; save the checkpoint with torch.save")
    Checkpoint(file).load()  # the version of the format
    system = Checkpoint(file).load()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Refused("it was saved on a big-endian machine, whose files are not supported")
    reader = Checkpoint(file)
    content, keys = reader.load(), Checkpoint(file).load()
    storages, position = {}, file.tell()
    for key in keys:  # the storages follow in this order, each after the number of its values
        if not isinstance(key, str):
            raise Refused("is damaged, or made to do harm (a storage's name is not text)")
        count, = struct.unpack_from("<q", data, position)
        begin, position = position + 8, position + 8 + count * np.dtype(STORAGE_TYPES[reader.kinds[key]]).itemsize
        if not begin <= position <= len(data):
            raise Refused("is damaged or cut off (it ends within the values of its tensors)")
        storages[key] = memoryview(data)[begin:position]
    return content, storages.__getitem__


def read_safetensors(data):
    """Reads a .safetensors file. Returns the same as read_zip."""
    try:
        from safetensors import deserialize
    except ImportError as error:
        raise Refused("is a safetensors file, and the package that reads it is missing (%s); install it: "
                      "python3 -m pip install --prefer-binary safetensors" % error)
    content, storages = {}, {}
    for key, tensor in deserialize(data):
        size, storages[key] = tuple(tensor["shape"]), tensor["data"]
        stride = tuple(int(np.prod(size[i + 1:])) for i in range(len(size)))
        kind = SAFETENSORS_TYPES.get(tensor["dtype"], tensor["dtype"])
        content[key] = Named("_rebuild_tensor", (Storage(kind, key, None), 0, size, stride))
    return content, storages.__getitem__


def read_file(path):
    """Reads a checkpoint file of any format. Returns (its content, a function that maps a storage's name to its bytes)."""
    if os.path.isdir(path):
        for folder in [path] + [os.path.join(path, name) for name in sorted(os.listdir(path))]:
            if os.path.isfile(os.path.join(folder, "data.pkl")):
                parent, name = os.path.split(os.path.abspath(folder))
                raise Refused("is an unpacked checkpoint; pack its folder again: (cd %s && zip -0 -r %s %s)"
                              % tuple(shlex.quote(text) for text in (parent, name + ".pth", name)))
        raise Refused("is a folder, not a checkpoint file")
    if not os.path.isfile(path):
        raise FileNotFoundError("%s: no such file; the first argument is the trained checkpoint" % path)
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        raise OSError("%s: cannot be read: %s" % (path, error.strerror))
    if path.endswith(".safetensors") or data[8:9] == b"{" and struct.unpack_from("<Q", data)[0] < len(data):
        return read_safetensors(data)
    if data.startswith(b"PK"):
        return read_zip(data)
    if data.startswith(b"\x80"):
        return read_old(data)
    if tarfile.is_tarfile(path):
        raise Refused("is a tar archive, not a checkpoint; unpack it with tar -xf and give the file in it")
    raise Refused("is not a PyTorch checkpoint (it begins with %r)" % data[:15])


def shown(text):
    """Returns a text from the file, shortened and escaped for an error message."""
    return text if text.isprintable() and len(text) <= 100 else ascii(text)[:100]


def some(items, most=4, text=str):
    """Returns a list's first items as text, and how many more there are."""
    return ", ".join(text(item) for item in items[:most]) + (" and %d more" % (len(items) - most) if len(items) > most else "")


def unwrap(value):
    """Returns the call that builds a tensor, without the calls around it. Returns any other value unchanged."""
    for _ in range(9):  # torch.save puts at most two calls around it
        if not isinstance(value, Named) or not isinstance(value.arguments, tuple) or not value.arguments:
            break
        if value.function in TENSOR_WRAPPERS:
            value = value.arguments[0]
        elif value.function in ATTRIBUTE_WRAPPERS and len(value.arguments) > 2 and isinstance(value.arguments[0], Named):
            value = Named(value.arguments[0].name, value.arguments[2])
    return value


def tensor_arguments(value):
    """Returns the arguments of the call that builds a tensor, or None if value is not a plain tensor."""
    value = unwrap(value)
    if not isinstance(value, Named) or not isinstance(value.arguments, tuple) or value.function not in TENSORS:
        return None
    # torch >= 1.12 can mark a tensor as negated or conjugated instead of changing its values.
    marks = value.arguments[6] if len(value.arguments) > 6 and isinstance(value.arguments[6], dict) else {}
    return None if "neg" in marks or "conj" in marks else value.arguments


def described(value):
    """Says what a value is: a tensor, another call or name, or its Python type."""
    if tensor_arguments(value):
        return "a tensor"
    value = unwrap(value)
    return shown(value.name) if isinstance(value, Named) else type(value).__name__


# A state dict in a file's content. name: where it is. rank: the state dict with the lowest rank is used. entries: the dict
# that holds it. keys: {the network's key: [its keys in entries]}. prefix: what those keys begin with. others: all other keys.
Network = namedtuple("Network", "name rank entries keys prefix others")


def networks(path, entries):
    """Returns the Networks in one dict of the content.

    One dict can hold several. Their keys have different prefixes: base.conv1.weight, ema.module.base.conv1.weight.
    """
    found, others = OrderedDict(), []
    for key in entries:
        match = KEY.fullmatch(key)
        if match:
            before, name = ([part for part in half.split(".") if part and part not in WRAPPERS] for half in match.groups())
            found.setdefault(tuple(before), OrderedDict()).setdefault(".".join(name), []).append(key)
        else:
            others.append(key)
    result = []
    for before, keys in found.items():
        first = keys.get("classifier.weight", [None])[0]
        if isinstance(entries.get(first), Named):
            place = path + before
            rank = [part if isinstance(part, int) else MODEL_NAMES.index(part) if part in MODEL_NAMES else UNKNOWN for part in place]
            result.append(Network(".".join(map(str, place)), rank, entries, keys, KEY.fullmatch(first).group(1), others))
    return result


def contents(value):
    """Returns the dict, list or tuple that a value is or stands for, and None for any other value."""
    if not isinstance(value, Named):
        return value if isinstance(value, (dict, list, tuple)) else None
    if value.name == "collections.OrderedDict" and value.arguments and isinstance(value.arguments[0], list):
        # Python 2 pickles an OrderedDict as a call with a list of pairs.
        return OrderedDict(pair for pair in value.arguments[0] if isinstance(pair, list) and isinstance(pair[0], str))
    return value.entries


def find_networks(content):
    """Returns the Networks in a checkpoint's content, the outer ones first."""
    found, seen, level = [], set(), [((), content)]
    for _ in range(DEPTH):
        below = []
        for path, value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            value = contents(value)
            if isinstance(value, dict):
                found += networks(path, value)
            for key, item in value.items() if isinstance(value, dict) else enumerate(value or ()):
                if (isinstance(key, int) or len(key) < 200) and isinstance(item, (dict, list, tuple, Named)):
                    below.append((path + (key,), item))
        level = below
    return found


def choose(content, name, say):
    """Returns the Network called name or, if name is None, the most likely one. Calls say with a text if that is a guess."""
    found = find_networks(content)
    if not found:
        entries = contents(content)
        if not isinstance(entries, dict) or not entries:
            raise Refused("holds an object of %s, not a state dict; save model.state_dict()" % described(content))
        raise Refused("holds no state dict with classifier.weight; save model.state_dict(). It has: %s" % some(
            list(entries.items()), 12, lambda item: "%s (%s)" % (shown(item[0]), described(item[1]))))
    names = [shown(network.name) or "(top level)" for network in found]
    if name is not None:
        matching = [network for network in found if network.name == name]
        matching = matching or [network for network in found if network.name.startswith(name + ".")]
        if len(matching) != 1:
            raise Refused("has %s state dict %s; it has: %s" % (
                "more than one" if matching else "no", shown(name), some(names, 12)))
        best = matching[0]
    else:
        best = min(found, key=lambda network: network.rank)
        if len(found) > 1 and UNKNOWN in best.rank:
            raise Refused("has several state dicts: %s; choose one with --state-dict NAME" % some(names, 12))
    taken, others = names[found.index(best)], [name for name, network in zip(names, found) if network is not best]
    if others:
        say("took the state dict %s; it also has: %s (--state-dict NAME takes another)" % (taken, some(others, 12)))
    elif UNKNOWN in best.rank:
        say("took its only state dict, %s" % taken)
    return best


def make_array(value, read, most):
    """Returns (a tensor's values, the name of their type in the file). Whole numbers become int64, all others float32.

    read: the function from read_zip. Raises Refused unless value is a plain tensor of at most `most` values, all finite.
    """
    arguments = tensor_arguments(value)
    if arguments is None:
        raise Refused("is %s, not a plain tensor; save model.state_dict() of the whole model, not sharded or quantised"
                      % described(value))
    storage, offset, size, stride = (tuple(arguments) + (None,) * 4)[:4]
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
            and len(size) == len(stride) <= 8
            and all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (offset,) + size + stride)):
        raise Refused("is not a tensor as torch.save writes it; the file is damaged, or made to do harm")
    if storage.kind not in STORAGE_TYPES or storage.kind.startswith("Complex"):
        raise Refused("has values of the type %s; save model.float().state_dict()" % shown(storage.kind))
    count = 1
    for number in size:
        count *= number
    if max((count,) + size) > most:
        raise Refused("and the tensors before it have more values than the file has bytes")
    dtype = np.dtype("<" + STORAGE_TYPES[storage.kind])
    if not count:
        return np.zeros(size, "f4"), dtype.name
    data = read(storage.key)
    data = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
    if storage.part is not None:  # (its name, where it begins, its length)
        data = data[storage.part[1]:storage.part[1] + storage.part[2]]
    # Python's integers do not overflow. The stride has no meaning in a dimension of size 1.
    stride = [step if number > 1 else 0 for number, step in zip(size, stride)]
    if offset + sum((number - 1) * step for number, step in zip(size, stride)) >= len(data):
        raise Refused("reaches beyond its %d values in the file" % len(data))
    array = np.lib.stride_tricks.as_strided(data[offset:], size, [step * dtype.itemsize for step in stride]).copy()
    name = dtype.name
    if storage.kind == "BFloat16":
        array, name = (array.reshape(-1).astype("u4") << 16).view("f4").reshape(size), "bfloat16"
    with np.errstate(all="ignore"):  # a value too large for float32 becomes infinite
        array = array.astype("f4" if array.dtype.kind == "f" else "i8", copy=False)
    if not np.isfinite(array).all():
        raise Refused("holds NaN or infinite values")
    return array, name


def make_state(network, read, most, say):
    """Returns the state dict of a Network: OrderedDict, key -> tensor. most: how many values its tensors may have in total."""
    # If the dict has model.classifier.weight, a key without model. belongs to something else, such as a loss.
    own = [key for key in network.others if key.startswith(network.prefix) and tensor_arguments(network.entries[key])]
    state, types = OrderedDict(), set()
    for name, originals in list(network.keys.items()) + [(key, [key]) for key in own]:
        for key in originals:
            try:
                array, kind = make_array(network.entries[key], read, most)
            except Refused as error:
                raise Refused("%s %s" % (shown(key), error))
            if not np.array_equal(state.setdefault(name, array), array):
                raise Refused("%s and %s are the same key of the network, but their values differ; delete the wrong one"
                              % (shown(originals[0]), shown(key)))
            most -= array.size
            if array.dtype.kind == "f" and kind != "float32":
                types.add(kind)
    if types:
        say("converted the weights from %s to float32" % some(sorted(types)))
    left = [key for key in network.others if key not in state]
    if left:
        say("left out what does not belong to the network: %s" % some(left, text=shown))
    return OrderedDict((name, torch.from_numpy(array)) for name, array in state.items())


def load_checkpoint(path, state_dict=None, say=lambda text: None):
    """Returns the model's state dict of a checkpoint: OrderedDict, key -> CPU tensor of float32 (int64 for counts).

    Reads the files of every torch.save, also those from Python 2.7 and from Ascend's torch_npu, and .safetensors files.
    The state dict may be anywhere in the content. state_dict names one of several ('state_dict_ema', 'ema.module').
    Removes prefixes such as 'module.' from the keys. Calls say with a text for each choice that the user should know about.
    Runs no code of the file. Raises OSError if path cannot be read, ValueError if it is not such a checkpoint.
    """
    path = os.fspath(path)
    try:
        content, read = read_file(path)
        return make_state(choose(content, state_dict, say), read, os.path.getsize(path), say)
    except Refused as error:
        raise ValueError("%s: %s" % (path, error))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything here
        raise ValueError("%s: is damaged or cut off (%s: %s)"
                         % (path, type(error).__name__, shown(str(error).split("\n")[0])))


def build_model(state, last_conv_stride=2):
    """Returns the DeepMAR_ResNet50 of a state dict, in eval mode. The classifier's shape gives the number of attributes.

    A state dict fits last_conv_stride 1 and 2 alike and does not record which one was used in training.
    Raises ValueError with a list of what does not fit: missing and unexpected keys, wrong shapes, another backbone.
    """
    weight = state.get("classifier.weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != FEATURES:
        raise ValueError("not a DeepMAR ResNet-50 checkpoint: %s instead of classifier.weight [num_att,%d]; its keys are %s"
                         % ("none" if weight is None else list(weight.shape), FEATURES, some(list(state), text=shown)))
    model = DeepMAR_ResNet50(num_att=weight.shape[0], last_conv_stride=last_conv_stride)
    expected = model.state_dict()
    # Checkpoints of torch < 0.4.1 have no num_batches_tracked, and inference does not use it.
    missing = [key for key in expected if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [shown(key) for key in state if key not in expected]
    shapes = ["%s %s instead of %s" % (key, list(state[key].shape), list(expected[key].shape))
              for key in expected if key in state and state[key].shape != expected[key].shape]
    whole = [key for key in expected if key in state
             and expected[key].is_floating_point() and not state[key].is_floating_point()]
    problems = ["%s: %s" % (what, some(keys)) for what, keys in (
        ("missing", missing), ("unexpected", unexpected), ("wrong shapes", shapes),
        ("whole numbers instead of weights, as in a quantised model", whole)) if keys]
    if problems:
        blocks = [len({key.split(".")[2] for key in state if re.match(r"base\.layer%d\.\d+\." % layer, key)})
                  for layer in (1, 2, 3, 4)]
        convolutions = "" if "base.layer1.0.conv3.weight" in state else " of two convolutions"
        if any(blocks) and (blocks != BLOCKS or convolutions):
            problems.insert(0, "another backbone (%s residual blocks%s; ResNet-50 has %s)" % (blocks, convolutions, BLOCKS))
        raise ValueError("not a DeepMAR ResNet-50 checkpoint: %s" % "; ".join(problems))
    model.load_state_dict(state)
    return model.eval()


def load_model(path, last_conv_stride=2, state_dict=None, say=lambda text: None):
    """Returns the network of a checkpoint file, in eval mode. For arguments and errors see load_checkpoint and build_model."""
    state = load_checkpoint(path, state_dict, say)
    try:
        return build_model(state, last_conv_stride)
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error))
