"""lib/gallery/storage.py and shards.py: what identifies an input, names given twice, addresses, and a storage that fails."""
import errno
import http.server
import os
import re
import subprocess
import sys
import threading
import types
import zipfile

import fsspec
import numpy as np
import pyarrow
import pyarrow.fs
import pytest
from pyarrow import parquet

from helpers import ROOT, write_images
from lib.gallery import shards, storage
from lib.gallery.shards import find_input
from lib.gallery.storage import absolute, create, names_in, open_binary, read_image, read_range, size_and_checksum, write
from lib.script import has_module



def found(*inputs, root=None, size=1000, keep="error", columns=("path", "bytes")):
    """Returns the Input of a command line."""
    return find_input(types.SimpleNamespace(
        input=list(map(str, inputs)), root=root and str(root), shard_size=size, duplicates=keep, path_column=columns[0],
        bytes_column=columns[1]), "copy")


def check_refused(text, *inputs, **options):
    with pytest.raises((OSError, ValueError), match=text) as caught:
        found(*inputs, **options)
    assert "\n" not in str(caught.value)


def described(*inputs, **options):
    """Returns what identifies an input, and its shards."""
    input = found(*inputs, **options)
    return input.settings, [input.describe(number) for number in range(input.count)]


@pytest.fixture
def crops(tmp_path):
    """crops/ with im0.png ... im3.png, two more in crops/b, and list.txt beside it."""
    write_images(tmp_path / "crops", 4)
    write_images(tmp_path / "crops" / "b", 2)
    (tmp_path / "list.txt").write_text("im0.png\nim1.png\nb/im0.png\n")
    return tmp_path / "crops"


# --- lists and folders ------------------------------------------------------------------------------------------------------

def test_each_mount_below_the_root_has_a_witness(crops, monkeypatch):
    """A node may lack one of them. A mount of which no image can be read has none."""
    for name in "c", "d":
        (crops / name).mkdir()
    (crops.parent / "list.txt").write_text("im0.png\nim1.png\nc/none.png\nb/none.png\nb/im0.png\nd/none.png\nb/im1.png\n")
    stat = os.stat
    numbers = {str(crops / "b"): 1001, str(crops / "d"): 1002}
    monkeypatch.setattr(shards.os, "stat", lambda path, **more: types.SimpleNamespace(st_dev=numbers[path]) if path in numbers else
                        stat(path, **more))
    for size in 1, 1000:
        input = found(crops.parent / "list.txt", root=crops, size=size)
        assert [witness["name"] for witness in input.witnesses] == (["im0.png", "b/im0.png"] if size == 1 else ["im0.png"])


def test_shards_of_a_list(crops):
    """A byte order mark and blank lines; each shard knows the number of its images; the witness is an image that can be read."""
    path = crops.parent / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfmissing.png\r\n\n im1.png \r\nb/im0.png\nb/im1.png")
    input = found(path, root=crops, size=2)
    content = path.read_bytes()
    assert [shards.names_of(content[shard["start"]:shard["end"]], shard["start"]) for shard in map(input.describe, range(3))] == [
        ["missing.png"], ["im1.png", "b/im0.png"], ["b/im1.png"]]
    assert [input.describe(number)["images"] for number in range(3)] == [1, 2, 1] and input.images == 4
    assert input.witnesses == [{"root": str(crops), "name": "im1.png"}]


def test_root_of_a_list_is_checked(crops, monkeypatch):
    path = crops.parent / "list.txt"
    check_refused("list.txt: none of its first 3 images is in .*crops/b/none: im0.png, im1.png, b/im0.png$", path,
                  root=crops / "b" / "none")
    os.mkfifo(str(crops / "b" / "im0.jpg"))
    path.write_text("im0.jpg\n")
    check_refused("none of its first 1 images can be read: im0.jpg .not a regular file.$", path, root=crops / "b")
    monkeypatch.setattr(shards, "MAX_TRIED", 2)
    path.write_text("".join("none%d.png\n" % i for i in range(9)) + "im0.png\n")
    check_refused("none of its first 2 images is in", path, root=crops)


@pytest.mark.parametrize("lines", ["a.png\nim0.png\n./im0.png\n", "im0.png\n\nb.png\n.//im0.png\n", "b/im0.png\nim1.png\nb//././im0.png\n"])
def test_list_that_names_an_image_twice(crops, capsys, lines):
    path = crops.parent / "list.txt"
    path.write_text(lines)
    numbers = [number for number, line in enumerate(lines.split("\n"), 1) if "im0" in line]
    text = r"list.txt: 1 images are given more than once: (b/)?im0.png \(line %d, line %d\)" % tuple(numbers)
    check_refused(text + ".*--duplicates keep", path, root=crops, size=1)
    assert found(path, root=crops, keep="keep").images == 3
    assert "list.txt: 1 images are given more than once; each gets a row" in capsys.readouterr().err


def test_names_with_the_same_number_are_no_duplicates(monkeypatch):
    monkeypatch.setattr(shards, "hash", lambda name: len(name), raising=False)
    seen, names = shards.Repeated(), ["aa", "bb", "c"]
    seen.add(names)
    seen.check("list", ((name, "a line") for name in names), False)
    seen.add(["bb"])
    with pytest.raises(ValueError, match="1 images are given more than once: bb "):
        seen.check("list", ((name, "a line") for name in names + ["bb"]), False)


def test_images_replaced_under_their_names(crops):
    """Other sizes are another input; other times, as those of a copied folder, are not."""
    first = described(crops)
    os.utime(str(crops / "im0.png"), (1, 1))
    assert described(crops) == first
    (crops / "im0.png").write_bytes(b"other")
    settings, _ = described(crops)
    assert {name for name in settings if settings[name] != first[0][name]} == {"contents"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gbk"])
def test_list_in_another_encoding(crops, encoding):
    path = crops.parent / "list.txt"
    path.write_bytes("im0.png\nim1.png\n\u884c\u4eba.png\n".encode(encoding))
    check_refused("list.txt: is not UTF-8 text .*iconv -f %s" % encoding.upper().replace("-LE", "LE"), path, root=crops)


def test_names_and_patterns(crops, monkeypatch):
    """file:// in place of a path, :: in a name, patterns, ** and a file whose name looks like a pattern."""
    (crops / "x::y").mkdir()
    os.rename(str(crops / "im0.png"), str(crops / "x::y" / "im0.png"))
    assert absolute("file://%s/" % crops) == absolute("file://localhost%s" % crops) == str(crops)
    assert described("file://%s" % crops) == described(crops)
    assert found(crops / "x::y").images == 1
    for name in "a.tar", "B.TAR", "c.tgz", "b/d.tar", ".hidden.tar", "a[1].tar":
        (crops / name).write_bytes(b"tar")
    for pattern, names in (("*", ["B.TAR", "a.tar", "a[1].tar", "c.tgz"]), ("**/*.tar", ["a.tar", "a[1].tar", "b/d.tar"]),
                           ("a[1].tar", ["a[1].tar"]), ("a[[]1].tar", ["a[1].tar"]), ("?/d.tar", ["b/d.tar"]), ("*/none.tar", [])):
        assert [url[len(str(crops)) + 1:] for url, folder in matched(crops / pattern) if not folder and "png" not in url] == names


def matched(pattern):
    try:
        return shards.matching(str(pattern))
    except FileNotFoundError:
        return []


def test_inputs_that_do_not_fit(crops):
    (crops / "a.tar").write_bytes(b"")
    path = crops.parent / "list.txt"
    for text, *inputs in (("list.txt: is a list file; give --root", path), ("all end in .tar or all in .parquet$", path, crops / "a.tar"),
                          ("none: no such file or folder$", crops / "none"), ("all in .parquet$", crops, crops / "b")):
        check_refused(text, *inputs)
    check_refused("crops: is a folder; --root is for a list file", crops, root=crops)


def test_file_systems_in_a_chain(crops):
    with zipfile.ZipFile(str(crops.parent / "x.zip"), "w") as file:
        for name in "list.txt", "crops/im0.png", "crops/im1.png", "crops/b/im0.png":
            file.write(str(crops.parent / name), name)
    rest = "::file://%s/x.zip" % crops.parent
    assert found("zip://crops" + rest).images == found("zip://list.txt" + rest, root="zip://crops" + rest).images == 3
    assert [url for url, _ in shards.matching("zip://crops/*0.png" + rest)] == ["zip://crops/im0.png" + rest]


@pytest.mark.parametrize("name, remedy", [
    ("x.tar.bz2", "bzip2 -d x.tar.bz2$"), ("x.txz", "xz -d x.txz$"), ("X.TAR.ZST", "zstd -d X.TAR.ZST$"), ("x.zip", "unpack it"),
    ("x.txt.gz", "unpack it")])
def test_archive_of_another_kind(crops, name, remedy):
    (crops / name).write_bytes(b"")
    check_refused("archives of this kind are not read; .*" + remedy, crops / name)


# --- tars ---------------------------------------------------------------------------------------------------------------------

def test_tars(crops):
    """Their contents identify them. Each folder has a witness. Two patterns may not give the same one."""
    names = [str(crops / name) for name in ("a.tar", "B.TAR", "b/c.tar")]
    for name in names:
        with open(name, "wb") as f:
            f.write(b"first")
    settings, parts = described(*names)
    assert parts == [{"tar": name} for name in names]
    assert found(*names).witnesses == [{"file": names[0]}, {"file": names[2]}]
    with open(names[1], "wb") as f:
        f.write(b"other")
    assert described(*names)[0] == dict(settings, contents=described(*names)[0]["contents"]) != settings
    check_refused("1 files are given more than once: %s; .*--duplicates keep" % names[0], crops / "*.tar", names[0])
    assert found(names[0], names[0], keep="keep").count == 2


# --- Parquet files ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def table():
    return pyarrow.table({
        "path": ["a", "b", None, None, "c"], "bytes": [b"1"] * 5, "text": ["im.png"] * 5, "id": list(range(5)),
        "fixed": pyarrow.array([b"12"] * 5, pyarrow.binary(2)), "list": [[{"bytes": b"1"}]] * 5,
        "image": [{"bytes": b"1", "path": "p%d" % i} for i in range(5)]})


def test_columns_of_parquet_files(tmp_path, table):
    """Their types are checked before any work. Other columns, or other bytes of the same size, are another input."""
    path = tmp_path / "a.parquet"
    parquet.write_table(table, str(path), row_group_size=2)
    settings, parts = described(path)
    assert [(shard["group"], shard["images"]) for shard in parts] == [(0, 2), (1, 2), (2, 1)]
    for columns in ("image.path", "image.bytes"), ("id", "bytes"), ("path", "fixed"):
        assert described(path, columns=columns)[0] == dict(settings, path_column=columns[0], bytes_column=columns[1]) != settings
    for columns, text in (
            (("path", "text"), "the column text holds string, not the bytes of images; give --bytes-column .bytes, fixed, image.bytes.$"),
            (("path", "list"), "the column list holds list<"), (("path", "image"), "the column image holds struct<"),
            (("list", "bytes"), "the column list holds list<.*not paths"), (("no", "bytes"), "has the columns .*, not no and bytes;")):
        check_refused("a.parquet: " + text, path, columns=columns)
    size = path.stat().st_size
    parquet.write_table(table.set_column(1, "bytes", [[b"2"] * 5]), str(path), row_group_size=2)
    assert path.stat().st_size == size and described(path)[0] != settings
    for content in b"no Parquet", b"PAR1" + 99 * b"x" + b"\x40\0\0\0PAR1":
        path.write_bytes(content)
        check_refused("a.parquet: is not a Parquet file", path)


def test_path_twice_in_parquet_files(tmp_path, table):
    """In two row groups or two files; null is no path. A damaged column of paths is the workers' to find."""
    for name, paths in ("a", ["x", "y", None, None, "z"]), ("b", ["u", "v", "./x", "w", b"t".decode()]):
        parquet.write_table(table.set_column(0, "path", [paths]), str(tmp_path / (name + ".parquet")), row_group_size=2, compression="none")
    assert found(tmp_path / "a.parquet").images == 5
    text = "1 images are given more than once: x .*/a.parquet row group 0, .*/b.parquet row group 1.; .*--duplicates keep"
    check_refused(text, tmp_path / "*.parquet")
    assert found(tmp_path / "*.parquet", keep="keep").images == 10
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    start = parquet.read_metadata(str(tmp_path / "b.parquet")).row_group(1).column(0).data_page_offset
    content[start:start + 12] = b"\xff" * 12
    (tmp_path / "b.parquet").write_bytes(content)
    assert found(tmp_path / "*.parquet").images == 10


def test_folder_of_sparks_is_one_input(tmp_path, table):
    part = tmp_path / "x.parquet" / "day=1" / "part-0.snappy.parquet"
    part.parent.mkdir(parents=True)
    check_refused("x.parquet: this folder holds no Parquet file", tmp_path / "x.parquet")
    parquet.write_table(table, str(part))
    for name in "_SUCCESS", "_metadata.parquet", ".part-0.parquet":
        (tmp_path / "x.parquet" / name).write_bytes(b"")
    assert [shard["parquet"] for shard in described(tmp_path / "x.parquet")[1]] == [str(part)]


# --- files here -----------------------------------------------------------------------------------------------------------------

def check_files(url):
    """Writes, creates and reads files in an empty folder."""
    name = url + "/a"
    assert create(name, b"first") and not create(name, b"second") and read_range(name) == b"first"
    write(name, b"replaced")
    assert [read_range(name, *part) for part in ((), (0, 2), (2, 5), (5, 99), (8, 9))] == [b"replaced", b"re", b"pla", b"ced", b""]
    assert read_image(url, "a", 3) == b"rep"
    with open_binary(name) as f:
        f.seek(-2, 2)
        assert f.read() == b"ed"
    assert names_in(url) == ["a"] and names_in(url + "/none") == []
    for function in read_range, open_binary, size_and_checksum:
        with pytest.raises(FileNotFoundError, match="^%s/none: no such file or folder$" % url) as caught:
            function(url + "/none")
        assert caught.value.errno == errno.ENOENT


def test_files_of_this_machine(tmp_path, monkeypatch):
    check_files(str(tmp_path))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    assert create(str(tmp_path / "b"), b"1") and not create(str(tmp_path / "b"), b"2") and names_in(str(tmp_path)) == ["a", "b"]
    with pytest.raises(OSError, match="^/proc/none: ") as caught:
        write("/proc/none", b"1")
    assert caught.value.errno == errno.ENOENT


def test_full_disk_keeps_its_number(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    for function in write, create:
        with pytest.raises(OSError, match="a: No space left on device$") as caught:
            function(str(tmp_path / "a"), b"1")
        assert caught.value.errno == errno.ENOSPC and not os.listdir(str(tmp_path))


# --- files elsewhere ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hdfs():
    """Stands in for HDFS: the same class of fsspec, over a file system of this machine. Returns the hosts that it was opened for."""
    from fsspec.implementations.arrow import ArrowFSWrapper, HadoopFileSystem
    hosts = []

    class Hdfs(HadoopFileSystem):
        def __init__(self, host="default", **more):
            hosts.append(host)
            ArrowFSWrapper.__init__(self, pyarrow.fs.LocalFileSystem(), **more)

    fsspec.register_implementation("hdfs", Hdfs, clobber=True)
    yield hosts
    fsspec.register_implementation("hdfs", HadoopFileSystem, clobber=True)


def test_hdfs(crops, hdfs):
    root = "hdfs://name:9000%s" % crops
    (crops / "new").mkdir()
    check_files(root + "/new")
    (crops / "a.tar").write_bytes(b"tar")
    assert described(root + "/*.tar")[1] == [{"tar": root + "/a.tar"}]
    assert found(root).images == 6 and found(crops.parent / "list.txt", root=root).witnesses == [{"root": root, "name": "im0.png"}]
    assert set(hdfs) == {"name"}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Serves tmp_path as python3 -m http.server does, which sends whole files only. Returns the server; its status is a fault."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if server.status:
                self.send_error(server.status)
            else:
                super().do_GET()

        def do_HEAD(self):
            if server.status:
                self.send_error(server.status)
            else:
                super().do_HEAD()

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        status, daemon_threads = None, True

        def handle_error(self, *_):  # a client that has read enough closes the connection
            pass

    monkeypatch.chdir(tmp_path)
    server = Server(("127.0.0.1", 0), Handler)
    server.url = "http://127.0.0.1:%d" % server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_web_server(crops, table, web, monkeypatch):
    monkeypatch.setattr(storage, "WAITS", ())
    root, path = web.url + "/crops", crops.parent / "list.txt"
    (crops / "100% #1?.png").write_bytes((crops / "im0.png").read_bytes())
    path.write_text("100% #1?.png\nim0.png\n")
    for source in path, web.url + "/list.txt":
        assert found(source, root=root).witnesses == [{"root": root, "name": "100% #1?.png"}]
    table = table.set_column(1, "bytes", [[np.random.RandomState(0).bytes(2 ** 20)] * 5])
    parquet.write_table(table, str(crops / "a.parquet"), row_group_size=1, compression="none", use_dictionary=False)
    assert found(root + "/a.parquet").images == 5
    (crops / "a.tar").write_bytes((crops / "a.parquet").read_bytes())
    with open_binary(root + "/a.tar") as f:
        assert f.read() == (crops / "a.tar").read_bytes()
    check_refused("none of its first 2 images is in", path, root=web.url + "/none")
    for web.status, kind in (403, PermissionError), (404, FileNotFoundError), (503, OSError):
        for function in read_range, open_binary, lambda url: found(url):
            with pytest.raises(OSError, match="^%s/a.tar: [^\n]*$" % root) as caught:
                function(root + "/a.tar")
            assert type(caught.value) is kind


@pytest.fixture
def bucket(s3, crops):
    """The crops in a new bucket. Returns the file system."""
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    if fs.exists("crops"):
        fs.rm("crops", recursive=True)
    fs.mkdir("crops")
    fs.put(str(crops), "crops/images", recursive=True)
    fs.put(str(crops.parent / "list.txt"), "crops/list.txt")
    s3.reset()
    return fs


def test_s3(s3, bucket, crops, monkeypatch, tmp_path):
    check_files("s3://crops/new")
    assert found("s3://crops/images").images == 6
    assert found("s3://crops/list.txt", root="s3://crops/images").images == 3
    first = described("s3://crops/images")
    bucket.pipe_file("crops/images/im0.png", bytes(bytearray((crops / "im0.png").read_bytes())[:-1] + b"x"))
    assert described("s3://crops/images")[0] != first[0]  # the same size, but another ETag
    bucket.pipe_file("crops/images/b::c.png", b"1")
    bucket.pipe_file("crops/images/empty.png", b"")
    assert read_image("s3://crops/images", "b::c.png", 9) == b"1" and read_image("s3://crops/images", "empty.png", 9) == b""
    bucket.pipe_file("crops/images//im9.png", b"1")
    check_refused("s3://crops/images: it holds names that begin with a slash", "s3://crops/images")


def test_stretch_of_a_list_on_s3_is_one_request(s3, bucket):
    bucket.pipe_file("crops/long.txt", b"image.png\n" * 10 ** 5)
    s3.reset()
    assert len(read_range("s3://crops/long.txt", 500000, 510000)) == 10000
    assert len(s3.requests) == 1 and s3.sent < 20000


def test_s3_folder_that_cannot_be_listed(s3, bucket, monkeypatch):
    """It is an error that names the folder, at once for a refusal, and after some tries for a server that is busy."""
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    s3.fault = lambda request: 403 if "prefix=images%2Fb%2F" in request else None
    for pattern in "s3://crops/images", "s3://crops/images/*/*.tar":
        check_refused("^s3://crops/images/b: refused by the test$", pattern)
    assert not waits
    s3.fault = lambda request: 503 if "prefix=images%2Fb%2F" in request and len(waits) < 2 else None
    assert found("s3://crops/images").images == 6 and waits == [4, 8]


@pytest.mark.parametrize("name, value, text", [("ACCESS_KEY_ID", None, "Unable to locate credentials"),
                                               ("ENDPOINT_URL", "http://127.0.0.1:9", "Could not connect to the endpoint URL: .*")])
def test_s3_without_credentials_or_server(tmp_path, s3_server, name, value, text):
    """One line, at once, and nothing more when the process ends."""
    code = "from lib.gallery.shards import matching; from lib.script import command; command(lambda: matching('s3://crops/a.tar'))"
    variables = dict(os.environ, AWS_EC2_METADATA_DISABLED="true", AWS_SHARED_CREDENTIALS_FILE="/none", AWS_CONFIG_FILE="/none",
                     PYTHONPATH=ROOT, **{"AWS_" + name: value or ""})
    done = subprocess.run([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1 and re.match("-c: error: s3://crops/a.tar: %s\n$" % text, done.stdout), done.stdout


def test_object_of_s3_is_created_once(s3, bucket):
    """By the server, not by a look before: a file of another machine appears in between."""
    s3.fault = lambda request: 404 if request.startswith("HEAD") else None
    assert create("s3://crops/m", b"1") and not create("s3://crops/m", b"2")
    assert not any(request.startswith("HEAD") for request in s3.requests)


def test_package_that_is_missing(tmp_path):
    check_refused("^nonsense://a/x.tar: cannot be opened: .*nonsense", "nonsense://a/x.tar")


if not has_module("s3fs"):  # the guide's Python has no package for other machines' files
    for name, test in list(globals().items()):
        if name.startswith("test_") and {"hdfs", "web", "s3", "s3_server", "bucket"} & set(test.__code__.co_varnames):
            del globals()[name]
