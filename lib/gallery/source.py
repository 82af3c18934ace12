"""A tar or Parquet file that is being read: whether its storage or its content is at fault."""
import errno

from lib.gallery.storage import open_binary


class Damaged(Exception):
    """A file's content is at fault, so that another try would fail in the same way. The text says where."""


class Source(object):
    """An open file of any url that remembers the OSError of its storage, because gzip and pyarrow make other errors of it.

    size: in bytes, as the storage tells. A file that ends before or after that is an error of the storage too.
    """
    mode = "rb"  # pyarrow asks

    def __init__(self, url):
        self.url, self.error, self.closed = url, None, False
        self.file = open_binary(url)
        self.size = self.file.seek(0, 2)
        self.file.seek(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def call(self, method, *arguments):
        try:
            return getattr(self.file, method)(*arguments)
        except OSError as error:
            self.error = error
            raise

    def read(self, size=-1):
        content = self.call("read", size)
        if (size < 0 or len(content) < size) and self.tell() != self.size:
            self.error = OSError(errno.EIO, "%s: ends at byte %d, but has %d bytes" % (self.url, self.tell(), self.size))
            raise self.error
        return content

    def peek(self, size):
        return self.call("peek", size)[:size]

    def seek(self, offset, whence=0):
        return self.call("seek", offset, whence)

    def tell(self):
        return self.file.tell()

    def close(self):
        self.closed = True
        self.file.close()
