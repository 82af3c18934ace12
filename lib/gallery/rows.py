"""Reads a row group of a Parquet file, so that a damaged page costs only the rows of this page.

pyarrow stops at a damaged page. It then gets the pages one by one. The header of a page says how long it is and how many rows it
has (PageHeader in parquet.thrift of https://github.com/apache/parquet-format).
"""
import inspect
import itertools

from lib.gallery.source import Damaged
from lib.script import one_line

PARQUET_ROWS = 64     # this many rows are read at a time
BUFFER = 2 ** 20      # bytes that pyarrow reads at a time
MAX_HEADER = 2 ** 16  # bytes of a page's header; it may hold the smallest and the largest value, but Arrow leaves out large ones
DICTIONARY_PAGE = 2   # in a page's header, field 1 is its type and field 3 its length
ROWS = {0: 5, 3: 8}   # {DATA_PAGE or DATA_PAGE_V2: the field that has the number of rows in its own field 1}


def read_rows(source, group, count, columns):
    """Yields a tuple for each of the count rows in a row group: its value in each column, or an exception if a page is damaged.

    source: of lib.gallery.source.Source. columns: their paths, such as image.bytes. Raises OSError, or Damaged if the rows cannot
    be told apart.
    """
    try:
        file = parquet_file(source)
        found = file.metadata.row_group(group).num_rows if group < file.metadata.num_row_groups else 0
    except Exception as error:  # pyarrow has many kinds
        raise judged(source, error)
    if found != count:
        raise Damaged("its row group %d has %d rows, not %d as at the start of the run" % (group, found, count))
    yield from zip(*(read_column(source, file, group, name) for name in columns))


def judged(source, error):
    """Returns what an error of pyarrow means: the storage's own OSError, too little memory, or Damaged."""
    return source.error or (error if isinstance(error, MemoryError) else Damaged(one_line(error)))


def parquet_file(source, metadata=None):
    """Returns the pyarrow.parquet.ParquetFile of an open file. It compares the pages' checksums, if they have any."""
    import pyarrow.parquet
    checked = "page_checksum_verification"
    options = {checked: True} if checked in inspect.signature(pyarrow.parquet.ParquetFile).parameters else {}  # since pyarrow 13
    return pyarrow.parquet.ParquetFile(source, metadata=metadata, buffer_size=BUFFER, pre_buffer=False, **options)


def values(file, group, name, rows):
    """Yields the values of a column, of which this many rows are read at a time."""
    import pyarrow
    for batch in file.iter_batches(rows, [group], [name], use_threads=False):
        array = batch.column(0)
        while pyarrow.types.is_struct(array.type):  # image.bytes is a field of image
            array, = array.flatten()
        yield from (value.as_py() for value in array)


def read_column(source, file, group, name):
    """Yields the values of a column, or an exception for each row of a damaged page."""
    count, done = file.metadata.row_group(group).num_rows, 0
    try:
        for value in values(file, group, name, PARQUET_ROWS):
            yield value
            done += 1
    except Exception as error:
        error = judged(source, error)
        if not isinstance(error, Damaged):
            raise error
        yield from itertools.islice(by_page(source, file, group, name), done, None)
        return
    if done != count:
        raise Damaged("its column %s has %d rows in row group %d, not %d" % (name, done, group, count))


def by_page(source, file, group, name):
    """Does the work of read_column() page by page."""
    row_group = file.metadata.row_group(group)
    chunk = next(column for column in map(row_group.column, range(row_group.num_columns)) if column.path_in_schema == name)
    start, dictionary, pages, whole = find_pages(source, chunk)
    left = row_group.num_rows - sum(rows for _, _, rows in pages)
    if left < 0 or whole and left:
        raise Damaged("the pages of its column %s in row group %d have %d rows, not %d"
                      % (name, group, row_group.num_rows - left, row_group.num_rows))
    for first, end, rows in pages:
        source.seek(first)
        page, reasons = source.read(end - first), []
        for before in dict.fromkeys((dictionary, b"")):  # a page without references to a damaged dictionary can be read
            try:
                piece = parquet_file(Piece(source.size, start, before + page), file.metadata)
                found = list(itertools.islice(values(piece, group, name, rows), rows))
                if len(found) == rows:
                    break
                reasons.append("it has %d rows, not %d" % (len(found), rows))
            except MemoryError:
                raise
            except Exception as error:
                reasons.append(one_line(error))
        else:
            found = [ValueError("a page of the column %s is damaged: %s" % (name, reasons[0]))] * rows
        yield from found
    yield from [ValueError("the header of a page of the column %s is damaged" % name)] * left


class Piece(object):
    """Looks to pyarrow like a Parquet file of which only the bytes from start on are of interest. All others are 0."""
    mode, closed = "rb", False

    def __init__(self, size, start, content):
        self.size, self.start, self.content, self.place = size, start, content, 0

    def read(self, size):
        first = self.place - self.start
        content = self.content[first:first + size] if first >= 0 else b""
        self.place += size
        return content.ljust(size, b"\0")

    def seek(self, offset, whence=0):
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self):
        return self.place

    def close(self):
        pass


def find_pages(source, chunk):
    """Finds the pages of a column in a row group.

    Returns (the column's first byte, the bytes of its dictionary, [(first byte, end, rows) of each data page], whether these are
    all pages: behind a damaged header, no page can be found).
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    first, end, dictionary, pages = start, start + chunk.total_compressed_size, b"", []
    while first < end:
        source.seek(first)
        head = source.read(min(MAX_HEADER, end - first))
        try:
            header, size = read_struct(head, 0)
            kind, after = header[1], first + size + header[3]
            rows = header[ROWS[kind]][1] if kind in ROWS else 0
            if not first < after <= end or rows < 0:
                raise ValueError
        except (IndexError, KeyError, TypeError, ValueError):
            return start, dictionary, pages, False
        if kind in ROWS:
            pages.append((first, after, rows))
        elif kind == DICTIONARY_PAGE:
            source.seek(first)
            dictionary = source.read(after - first)
        first = after
    return start, dictionary, pages, True


# --- Thrift's compact protocol, https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md --------------

def read_varint(data, place):
    """Returns (an unsigned number of variable length, the place behind it)."""
    number, shift = 0, 0
    while True:
        number, shift, place = number | (data[place] & 127) << shift, shift + 7, place + 1
        if data[place - 1] < 128:
            return number, place


def read_struct(data, place):
    """Returns (a struct as {field's number: value}, the place behind it). Only the types in a page's header have values.

    Raises IndexError or ValueError if it is damaged.
    """
    fields, number = {}, 0
    while data[place]:
        step, kind = data[place] >> 4, data[place] & 15
        place += 1
        if not step:
            raise ValueError("long form")
        number += step
        if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
            value, place = read_varint(data, place)
            fields[number] = value >> 1 ^ -(value & 1)
        elif kind == 8:  # bytes
            size, place = read_varint(data, place)
            place += size
        elif kind == 12:
            fields[number], place = read_struct(data, place)
        elif kind not in (1, 2):  # the two booleans have no value of their own
            raise ValueError("type %d" % kind)
    return fields, place + 1
