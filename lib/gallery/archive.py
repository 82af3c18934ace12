"""Reads tars header by header to the end of the file, so that each member is either read or missed with a word.

The iteration of Python's tarfile does not do: it takes a damaged header for the end, or it skips the header with ignore_zeros.
In its stream mode, it ignores all but the first of several joined gzip files.
"""
import gzip
import re
import tarfile
import zlib

from lib.gallery.source import Damaged
from lib.script import one_line

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2 ** 24  # bytes; a longer name or other header is damaged
MAX_ZEROS = 2 ** 20  # bytes; no program writes so many behind an end-of-archive, but an unfinished download may have them
NO_FILES = (b"V", b"D")  # GNU tar's types for the name of a volume and for the listing of a folder
LATER_VOLUME = b"M"  # GNU tar's type for the rest of a file that begins in another tar
PAX_RECORD = re.compile(br"(\d{1,8}) [^=]+=")


class Header(tarfile.TarInfo):
    """A member's header. Unlike tarfile, it refuses pax records that are damaged."""

    def _proc_pax(self, tar):
        records = tar.read(self._block(self.size))
        tar.put_back(records)
        start = 0
        while start < self.size:
            record = PAX_RECORD.match(records, start)
            end = start + int(record.group(1)) if record else 0
            if not record or not record.end() < end <= self.size or records[end - 1:end] != b"\n":
                raise tarfile.InvalidHeaderError("damaged pax records")
            start = end
        return super()._proc_pax(tar)


class Tar(object):
    """An open tar, plain or compressed with gzip. Iteration yields the header of each member that is no folder.

    Several tars that were joined are read as one. The iteration ends only behind an end-of-archive, which may be followed by
    some zeros and by further tars. Anything else raises Damaged with the byte and the last good member. Errors of the storage
    are OSErrors.
    """
    encoding, errors = "utf-8", "surrogateescape"  # of the members' names, for tarfile

    def __init__(self, source):
        """source: of lib.gallery.source.Source."""
        self.source, self.zipped = source, source.peek(2) == b"\x1f\x8b"
        self.stream = gzip.GzipFile(fileobj=source, mode="rb") if self.zipped else source
        self.fileobj, self.pax_headers = self, {}  # for tarfile
        self.place = self.offset = 0  # the next byte of the tar; the byte of the next header, which tarfile sets
        self.ahead = b""
        self.reading, self.last = "a header", None

    def damaged(self, why):
        return Damaged("%s%s; %s" % (
            "in its unpacked content, " if self.zipped else "", why,
            "no member is before it" if self.last is None else "the last good member is %s" % self.last))

    def take(self, size):
        """Returns the next bytes, fewer at the end of the file."""
        content, self.ahead = self.ahead[:size], self.ahead[size:]
        try:
            if len(content) < size:
                content += self.stream.read(size - len(content))
        except (OSError, EOFError, zlib.error) as error:
            if self.source.error:
                raise self.source.error
            raise self.damaged("gzip cannot unpack what follows byte %d, in %s: %s" % (self.place, self.reading, one_line(error)))
        self.place += len(content)
        return content

    def put_back(self, content):
        self.ahead = content + self.ahead
        self.place -= len(content)

    def read(self, size):
        """Returns the next bytes. Raises Damaged if the file ends before."""
        if self.reading == "a header" and not 0 <= size <= MAX_HEADER:
            raise self.damaged("the header before byte %d has %d bytes" % (self.place, size))
        content = self.take(size)
        if len(content) < size:
            raise self.damaged("the file ends at byte %d, in %s" % (self.place, self.reading))
        return content

    def tell(self):
        return self.place

    def __iter__(self):
        ended = 0  # bytes of zeros that were read
        while True:
            start, block = self.place, self.take(BLOCK)
            if not block.strip(b"\0"):
                if ended >= MAX_ZEROS:
                    raise self.damaged("from byte %d on, it holds nothing but zeros, as an unfinished copy does" % (start - ended))
                if len(block) == BLOCK:
                    ended, self.pax_headers = ended + BLOCK, {}
                elif ended:
                    return
                else:
                    raise self.damaged("the file ends at byte %d without an end-of-archive" % self.place)
                continue
            self.put_back(block)
            try:
                member = Header.fromtarfile(self)
            except (Damaged, OSError, MemoryError):
                raise
            except Exception as error:  # tarfile has its own kinds, and raises many others
                raise self.damaged("byte %d has no tar header (%s)" % (start, one_line(error)))
            if member.size < 0 or self.offset < self.place:
                raise self.damaged("byte %d has no tar header (negative size)" % start)
            if member.type == LATER_VOLUME:
                raise self.damaged("byte %d has the rest of %s, which begins in another volume" % (start, member.name))
            ended, self.reading = 0, "the member %s" % member.name
            if not member.isdir() and member.type not in NO_FILES:
                yield member
            while self.place < self.offset:
                self.read(min(self.offset - self.place, 2 ** 20))
            self.reading, self.last = "a header", member.name

    def content(self, member):
        """Returns the bytes of the member that the iteration is at, a regular file."""
        data = self.read(self.offset - self.place)
        if member.sparse is None:
            return data[:member.size]
        content, place = bytearray(member.size), 0
        for start, size in member.sparse:
            content[start:start + size] = data[place:place + size]
            place += size
        if len(content) != member.size or member._block(place) != len(data):
            raise self.damaged("the map of the sparse file %s is damaged" % member.name)
        return bytes(content)
