"""What an OM says of itself: the chip it is for, the version that made it, and atc's command line.

An OM begins with a header and a table of partitions. One partition is the protobuf message ModelDef, and its attributes are read
here without protobuf, because the card's machine may only have numpy and Pillow. The layout is that of github.com/hicann/ge:
framework_types_internal.h, om_file_helper.cc and ge_ir.proto. An OM in any other layout is one that says nothing.
"""
import os
import re
import struct

TEXTS = ("soc_version", "atc_version", "opp_version", "atc_cmdline", "host_env_os", "host_env_cpu")  # the attributes read here
HEADER = 256          # bytes; the table follows
MODEL_DEF = 0         # the type of ModelDef's partition
MAX_PARTITIONS = 256  # of a plain model there are at most eight
ATTRIBUTE, KEY, VALUE, STRING = 11, 1, 2, 2  # the numbers of fields: ModelDef's attributes, an entry of them, AttrDef's text
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def varint(data, position):
    """Returns (the number at a position in a message, the position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than ten bytes")


def fields(data):
    """Yields (number, content) of a message's fields that hold bytes. Raises IndexError or ValueError for anything else."""
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        kind, start = key & 7, position
        if kind == VARINT:
            position = varint(data, position)[1]
        elif kind == BYTES:
            size, start = varint(data, position)
            position = start + size
        elif kind in (FIXED32, FIXED64):
            position += 4 if kind == FIXED32 else 8
        else:
            raise ValueError("wire type %d" % kind)
        if position > len(data):
            raise ValueError("a field ends after the message")
        if kind == BYTES:
            yield key >> 3, data[start:position]


def attributes(data):
    """Returns {name: text} of those attributes of a ModelDef that are in TEXTS and not empty."""
    found = {}
    for number, entry in fields(data):
        if number == ATTRIBUTE:
            entry = dict(fields(entry))
            name, text = bytes(entry.get(KEY, b"")).decode(), bytes(dict(fields(entry.get(VALUE, b""))).get(STRING, b""))
            if name in TEXTS and text and text.decode().isprintable():
                found[name] = text.decode()
    return {name: found[name] for name in TEXTS if name in found}


def model_defs(f, length, start, form):
    """Yields each ModelDef by a table of partitions at HEADER. form: a row's struct. start: the position of the first row."""
    f.seek(HEADER)
    count, = struct.unpack("<I", f.read(4))
    if not 0 < count <= MAX_PARTITIONS:
        return
    f.seek(start)
    rows = list(struct.iter_unpack(form, f.read(count * struct.calcsize(form))))
    base = start + count * struct.calcsize(form)
    if all(base + offset + size <= length for _, offset, size in rows):
        for kind, offset, size in rows:
            if kind == MODEL_DEF:
                f.seek(base + offset)
                yield memoryview(f.read(size))


def read(path):
    """Returns {name: text} of what an OM says of itself, names from TEXTS. It is {} if the file does not fit what is known.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as f:
        header, length = f.read(HEADER), os.fstat(f.fileno()).st_size
        # after the header's size: its version, a checksum of 64 bytes, a length, then whether the OM is encrypted
        if header[:8] != b"IMOD" + struct.pack("<I", HEADER) or len(header) < HEADER or header[80]:
            return {}
        for start, form in ((HEADER + 8, "<I4xQQ"), (HEADER + 4, "<III")):  # today's table, and the one of older versions
            try:
                for data in model_defs(f, length, start, form):
                    found = attributes(data)
                    if found:
                        return found
            except (IndexError, ValueError, struct.error):  # UnicodeDecodeError is a ValueError
                continue
    return {}


def option(facts, name):
    """Returns the value of an option in atc's command line, '' if it is not there or empty. name: a regular expression.

    atc takes --a-b for --a_b and -a for --a. The OM has the words of the command line joined by spaces, without quotes.
    """
    values = re.findall(r"(?:^|\s)--?%s(?:=|\s+)(\S*)" % name.replace("_", "[-_]"), facts.get("atc_cmdline", ""))
    return values[-1].strip("\"'") if values else ""


def has_aipp(facts):
    """Returns whether the OM has AIPP and so takes integers. It is None if atc's command line does not tell.

    A mere mention of AIPP does not tell: the model of tools/rehearse.py aipp takes integers, too.
    """
    if option(facts, r"ins[\w-]*"):  # insert_op_conf; atc also takes the beginning of an option's name
        return True
    return None if re.search("aipp|insert|^[^-]*$", facts.get("atc_cmdline", ""), re.IGNORECASE) else False


def input_shape(facts):
    """Returns the sizes [N,3,H,W] of the network's input. A dynamic one is None, and so is the whole for any other input."""
    name, _, sizes = option(facts, "input_shape").rstrip(";").rpartition(":")
    sizes = sizes.split(",")
    if ";" in name or len(sizes) != 4 or sizes[1] != "3":
        return None
    return [int(size) if re.match("0*[1-9][0-9]{0,5}$", size) else None for size in sizes]


def version_key(text):
    """Returns (whether a version is CANN's own, its numbers) of one of the forms in which versions are written, or None.

    CANN's own number is like 8.5.0, 8.0.RC3 or 8.2.RC1.alpha002. Its packages have others, like 7.6.0.1.220 or 6.4.T5.0.B121.
    """
    text = text.split(":")[-1].strip("[] ")  # version.cfg has [7.6.0.1.220:8.0.0]
    found = re.match(r"(?:CANN[- ]*)?(\d+)\.(\d+)\.(RC)?(\d+)(?:[.-](?:alpha|beta).*)?$", text, re.IGNORECASE)
    if found:
        major, minor, candidate, last = found.groups()
        return True, [int(major), int(minor), 0 if candidate else 1, int(last)]
    found = re.match(r"\d+(\.\d+)+", text)
    return (False, [int(number) for number in found.group().split(".")]) if found else None


def newer(made, installed):
    """Returns whether the version that made an OM is newer than all installed ones, as far as they can be compared.

    A package's number is compared with a package's, CANN's own with CANN's own. A package's first number is at most that of its
    CANN (CANN 8.0.0 has packages 7.6.0.1.220), so it only tells something if it is greater.
    """
    made, installed = version_key(made), [key for key in map(version_key, installed) if key]
    if not made or not installed:
        return False
    same = [numbers for own, numbers in installed if own == made[0]]
    if same:
        return all(made[1][:len(numbers)] > numbers[:len(made[1])] for numbers in same)
    return not made[0] and all(made[1][0] > numbers[0] for _, numbers in installed)
