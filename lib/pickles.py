"""Reads a pickle without trusting it: nothing that it names is imported, and nothing is called.

DeepMAR.py has the same classes, because it must work when it is copied alone. tests/test_deepmar.py checks that they are equal.
"""
import io
import pickle


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
