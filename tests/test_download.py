"""data/download.py and data/unpack.py: their functions, against a small server on this machine."""

import base64
import bz2
import gzip
import hashlib
import io
import lzma
import os
import socket
import ssl
import sys
import tarfile
import time
import urllib.error

import pytest
from archives import PAGE, link, picture, talking, tar
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "data"))

import download
import unpack
from runtime import web
from utility import UserError

CONTENT = b"".join(picture(seed) for seed in range(200))  # 300 KB


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def wanted(tmp_path, content=CONTENT, size=True, algorithm="sha256"):
    digest = hashlib.new(algorithm, content).hexdigest()
    path = str(tmp_path / "file.tgz")
    return download.Wanted("the file", path, len(content) if size else None, f"{algorithm}:{digest}", "ask somebody")


def fails(about, *urls):
    """-> the message of the UserError that `fetch` must end with."""
    with pytest.raises(UserError) as error:
        download.fetch(about, urls)
    assert "\n" not in str(error.value) and not os.path.exists(about.path)
    return str(error.value)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url, shown",
    [
        ("http://host/a/b.tgz", "http://host/a/b.tgz"),
        ("https://me:secret@host:8080/a?token=secret#secret", "https://host:8080/a"),
        ("https://secret@host/a", "https://host/a"),
        ("https://me:sec@ret@host/a", "https://host/a"),
        ("https://me:sec/ret@host/a", "https://host/a"),
        ("https://me:sec?ret@host/a", "https://host/a"),
        ("https://me:sec#ret@host/a", "https://host/a"),
        ("https://host:80/a@b/c", "https://host:80/a@b/c"),
        ("me:secret@host/a", "host/a"),
        ("HTTPS://me:secret@host/a", "host/a"),
        ("file:///home/a@b/c.tgz", "file:///home/a@b/c.tgz"),
        ("", ""),
    ],
)
def test_messages_hold_no_secrets(url, shown):
    assert download.without_secrets(url) == shown


def test_logins_go_into_a_header():
    address, authorization = download.split_login("http://m%40e:a%3Ab@[::1]:80/my file.tgz?x=%20&y=ü")
    assert address == "http://[::1]:80/my%20file.tgz?x=%20&y=%C3%BC"
    assert base64.b64decode(authorization.split()[1]) == b"m@e:a:b"
    assert download.split_login("https://host/a%20b") == ("https://host/a%20b", None)
    assert download.split_login("ftp://me:pass@host/a") == ("ftp://me:pass@host/a", None)


@pytest.mark.parametrize(
    "error, text",
    [
        (urllib.error.HTTPError("http://secret/", 503, "secret", {}, io.BytesIO()), "HTTP error 503"),
        (urllib.error.URLError(socket.gaierror(-2, "secret")), "host not found"),
        (urllib.error.URLError(socket.timeout()), "no answer"),
        (urllib.error.URLError(OSError("Tunnel connection failed: 407")), "no answer (refused by a proxy)"),
        (urllib.error.URLError(OSError(101, "Network is unreachable")), "no answer (Network is unreachable)"),
        (urllib.error.URLError(ssl.SSLError(1, "secret")), "no secure connection"),
        (urllib.error.URLError("ftp error: secret"), "FTP error"),
        (ValueError("secret"), "not an address of a file"),
    ],
)
def test_what_went_wrong_is_said_in_plain_words(error, text):
    assert download.explain(error) == text


@pytest.mark.parametrize(
    "url", ["http://me:secret@host:port/", "secret", "gopher://secret@host/a", "http://", "http://a b/"]
)
def test_what_is_no_address(tmp_path, url):
    message = fails(wanted(tmp_path), url)
    assert "address" in message and "secret@" not in message and "ask somebody" in message


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_is_fetched_and_checked(server, tmp_path, capsys, algorithm, size, says_length):
    server.files["/a"], server.says_length = CONTENT, says_length
    about = wanted(tmp_path, size=size, algorithm=algorithm)
    for _ in range(2):  # and again without the network
        download.fetch(about, [f"{server.url}/a"])
        assert (tmp_path / "file.tgz").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file.tgz"] and len(server.seen) == 1
    captured = capsys.readouterr()
    assert f"downloading the file from {server.url}/a" in captured.out and "checking it" in captured.out
    assert captured.err == ""  # no terminal, no progress


def test_the_mirror_follows_a_first_home_that_sends_a_page(server, tmp_path, capsys):
    """And the mirror's own part, of an earlier run, is neither lost nor mixed with the page."""
    server.files = {"/home": PAGE, "/mirror": CONTENT}
    (tmp_path / "file.tgz.part2").write_bytes(PAGE[:20])
    (tmp_path / "file.tgz.part3").write_bytes(CONTENT[:5000])
    download.fetch(wanted(tmp_path), [f"{server.url}/{name}" for name in ("gone", "home", "mirror")])
    assert capsys.readouterr().out.count("downloading the file") == 3
    assert (tmp_path / "file.tgz").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file.tgz"]
    assert ("/mirror", "bytes=5000-") in [seen[:2] for seen in server.seen]


def test_connections_that_break_are_followed_by_others_while_they_bring_something(server, tmp_path, monkeypatch):
    server.files["/a"], server.breaks_at = CONTENT, [90_000, 60_000, 30_000]
    download.fetch(wanted(tmp_path), [f"{server.url}/a"])
    assert [seen[1] for seen in server.seen] == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]
    # A server that gives a little each time has no end.
    monkeypatch.setattr(download, "POOR", (3, 1000))
    os.remove(tmp_path / "file.tgz")
    server.seen.clear()
    server.breaks_at = list(range(1000, 10, -10))
    message = fails(wanted(tmp_path), f"{server.url}/a")
    assert f"it ended after 50 of {len(CONTENT)} bytes" in message and len(server.seen) == 4
    assert (tmp_path / "file.tgz.part1").read_bytes() == CONTENT[:50]  # for the next run


def test_a_server_that_is_too_slow_is_given_up(server, tmp_path, monkeypatch):
    server.files["/a"] = CONTENT
    monkeypatch.setattr(download, "SLOW", (0, 10**9))
    monkeypatch.setattr(download, "POOR", (0, 10**9))
    assert "it is too slow" in fails(wanted(tmp_path), f"{server.url}/a")
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        assert ": no answer;" in fails(wanted(tmp_path), f"http://127.0.0.1:{silent.getsockname()[1]}/a")
    assert time.monotonic() - start < 5


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = HEAD + b"Content-Length: %d\r\n\r\n" % len(CONTENT)


@pytest.mark.parametrize("wait", [0, 0.02])
@pytest.mark.parametrize(
    "said",
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /b\r\n\r\n",),
        (HEAD, b"x"),
        (BODY, b"x"),
        (CHUNKED, b"1"),
        (CHUNKED, b"1\r\nx\r\n"),
        (CHUNKED + b"0\r\n", b"A: b\r\n"),
    ],
    ids=["continue", "headers", "redirects", "header", "body", "chunk", "chunks", "trailers"],
)
def test_a_server_that_never_ends_and_one_that_hardly_speaks(tmp_path, monkeypatch, said, wait):
    monkeypatch.setattr(web, "PATIENCE", 0.3)
    monkeypatch.setattr(download, "SLOW", (0.2, 10_000))
    monkeypatch.setattr(download, "POOR", (2, 10**9))
    start = time.monotonic()
    with talking(*said, wait=wait) as (url, asked):
        message = fails(wanted(tmp_path, b"x" * 20000 if said[0] == CHUNKED else CONTENT + b"y"), url)
        assert "a: " in message and time.monotonic() - start < 4 and 1 <= len(asked) <= 15
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10**6


def test_a_redirect_whose_body_has_no_end(tmp_path):
    with talking(b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n", b"x" * (1 << 20)) as (url, asked):
        assert "HTTP error 302" in fails(wanted(tmp_path), url)
    assert len(asked) <= 11


@pytest.mark.parametrize("length", [b"abc", b"9" * 5000, b"-5", b"\xb2", b"1e3", b"9" * 18, b""])
def test_lengths_that_are_none(tmp_path, length):
    with talking(HEAD + b"Content-Length: " + length + b"\r\n\r\n" + CONTENT, b"") as (url, _):
        message = fails(wanted(tmp_path, CONTENT + b"more"), url)
    assert ("it has 9999" if length == b"9" * 18 else "it ended after 300800 of 300804 bytes") in message


@pytest.mark.parametrize("size", [b"-5", b"-1", b"-0", b"z", b"f" * 5000, b""])
def test_chunks_of_no_length(tmp_path, size):
    with talking(CHUNKED + size + b"\r\n" + CONTENT, b"") as (url, _):
        fails(wanted(tmp_path, CONTENT + b"more"), url)


@pytest.mark.parametrize(
    "place", [b"http://[::1", b"//", b"http://a b/", b"\xff://", b"ftp://127.0.0.1:9/a", b"http://h:99999999/", b"?"]
)
def test_redirects_to_nothing(tmp_path, place):
    with talking(b"HTTP/1.1 302 F\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n", b"") as (url, asked):
        assert "could not download" in fails(wanted(tmp_path), url)
    assert len(asked) <= 11 and os.listdir(tmp_path) == []


def test_a_file_of_unknown_size_has_an_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST", 100_000)
    server.files["/a"] = CONTENT
    for server.says_length in (True, False):
        assert "more than 100000" in fails(wanted(tmp_path, size=False), f"{server.url}/a")
        assert os.listdir(tmp_path) == []
    (tmp_path / "b").write_bytes(CONTENT)
    assert "more than the 100000" in fails(wanted(tmp_path, size=False), f"file://{tmp_path}/b")


@pytest.mark.parametrize("where", ["pipe", "zero", ""])
def test_files_that_are_none(tmp_path, where):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    reason = "not a file" if where else "Is a directory"
    assert reason in fails(wanted(tmp_path), f"file://{tmp_path}/{where}")
    os.rename(tmp_path / (where or "pipe"), tmp_path / "file.tgz")
    with pytest.raises(UserError, match="not a file"):  # the pipe, too
        download.fetch(wanted(tmp_path), ["http://127.0.0.1:9/"])


def test_one_address_is_one_address(server, tmp_path, capsys):
    """Neither white space makes two of it nor a line break another."""
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    for blank in (" ", "\n", "\r\n", "\t", "\v", "\x1b[2J"):
        for url in (f"{server.url}/a{blank}file://{secret}", f"{blank}file://{secret}"):
            assert "could not download" in fails(wanted(tmp_path), url)
    assert {seen[0] for seen in server.seen} == {f"/a%20file://{secret}"}
    out = capsys.readouterr().out
    assert out.count("\n") == 12 and "\x1b" not in out


@pytest.mark.parametrize(
    "content, message",
    [
        (PAGE, "it is a web page"),
        (CONTENT + b"more", f"it has {len(CONTENT) + 4} bytes instead of {len(CONTENT)}"),
        (CONTENT[:9000], f"it has 9000 bytes instead of {len(CONTENT)}"),
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_survives_a_server_that_now_sends_something_else(server, tmp_path, content, message, ranges):
    """A login page in the way must not cost the 137 GB that are here."""
    server.files["/a"], server.ranges = content, ranges
    part = tmp_path / "file.tgz.part1"
    part.write_bytes(CONTENT[:20000])
    assert message in fails(wanted(tmp_path), f"{server.url}/a")
    assert part.read_bytes() == CONTENT[:20000]
    server.files["/a"] = CONTENT
    download.fetch(wanted(tmp_path), [f"{server.url}/a"])
    assert os.listdir(tmp_path) == ["file.tgz"]


def test_a_server_that_goes_on_elsewhere(server, tmp_path):
    server.files["/a"], server.shift = CONTENT, 5
    part = tmp_path / "file.tgz.part1"
    part.write_bytes(CONTENT[:20000])
    assert "goes on at another place" in fails(wanted(tmp_path), f"{server.url}/a")
    assert part.read_bytes() == CONTENT[:20000]


def test_more_than_was_asked_for_does_not_fill_the_disk(server, tmp_path):
    server.files["/a"], server.says_length = CONTENT * 20, False
    assert f"it has more than {len(CONTENT)} bytes" in fails(wanted(tmp_path), f"{server.url}/a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_keep_the_range_and_tell_no_password_to_another_host(server, tmp_path, status):
    server.files["/b"], server.password = CONTENT, True
    server.redirects["/a"] = (status, "/b")
    (tmp_path / "file.tgz.part1").write_bytes(CONTENT[:5000])
    login = server.url.replace("//", "//me:secret@")
    download.fetch(wanted(tmp_path), [f"{login}/a"])
    assert [seen[:2] for seen in server.seen] == [("/a", "bytes=5000-"), ("/b", "bytes=5000-")]
    assert all(base64.b64decode(seen[2].split()[1]) == b"me:secret" for seen in server.seen)
    # The same machine by another name is another host.
    (tmp_path / "file.tgz").unlink()
    server.redirects["/a"] = (status, f"{server.url.replace('127.0.0.1', 'localhost')}/b")
    assert "HTTP error 401" in fails(wanted(tmp_path), f"{login}/a")
    assert server.seen[-1][2] is None


def test_a_redirect_to_a_file_of_this_machine_is_refused(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    server.redirects["/a"] = (302, f"file://{secret}")
    assert "HTTP error 302" in fails(wanted(tmp_path), f"{server.url}/a")


def test_a_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    server.files["http://far.example/a"] = CONTENT
    monkeypatch.setenv("http_proxy", server.url)
    download.fetch(wanted(tmp_path), ["http://far.example/a"])
    assert [seen[0] for seen in server.seen] == ["http://far.example/a"]


def test_links_are_not_followed(server, tmp_path):
    server.files["/a"] = CONTENT
    precious = tmp_path / "precious"
    precious.write_bytes(CONTENT[:100])
    part = tmp_path / "file.tgz.part1"
    part.symlink_to(precious)
    assert "a link" in fails(wanted(tmp_path), f"{server.url}/a")
    part.unlink()
    (tmp_path / "file.tgz").symlink_to("nowhere")
    with pytest.raises(UserError, match="a link to nothing"):
        download.fetch(wanted(tmp_path), [f"{server.url}/a"])
    assert precious.read_bytes() == CONTENT[:100] and os.readlink(tmp_path / "file.tgz") == "nowhere"


def test_a_disk_that_cannot_be_written(server, tmp_path):
    server.files["/a"] = CONTENT
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a full disk is like
    try:
        message = fails(wanted(tmp_path), f"{server.url}/a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"cannot write {tmp_path}/file.tgz.part1: File too large"
    download.fetch(wanted(tmp_path), [f"{server.url}/a"])
    assert len(server.seen) == 2 and server.seen[1][1] != "bytes=0-"
    about = download.Wanted("it", "/proc/file.tgz", len(CONTENT), "md5:0", "ask somebody")
    assert "cannot write" in fails(about, f"{server.url}/a")


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    meter = download.Meter(200_000_000, 50_000_000)
    meter.started -= 10
    meter.show(100_000_000)
    meter.show(100_000_001)  # not again at once
    meter.end()
    assert capsys.readouterr().err == "\r   50% of 200 MB, 5.0 MB/s, 0:00:20 left\033[K\r\033[K"


def test_numbers_of_the_environment(monkeypatch):
    monkeypatch.setenv("SIZE", "")
    assert download.number_from_environment("SIZE", 7) == 7 == download.number_from_environment("ABSENT", 7)
    monkeypatch.setenv("SIZE", "12")
    assert download.number_from_environment("SIZE", 7) == 12
    monkeypatch.setenv("SIZE", "-1")
    with pytest.raises(UserError, match="SIZE=-1"):
        download.number_from_environment("SIZE", 7)


# ---------------------------------------------------------------- unpacking


def unpacked(tmp_path, content, top=""):
    (tmp_path / "a.tar").write_bytes(content)
    unpack.unpack(str(tmp_path / "a.tar"), str(tmp_path / "a"), top)
    return sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file())


def test_archives_in_an_archive_become_folders_one_level_deep(tmp_path):
    innermost = tar({"3.jpg": b"3"}, "w")
    inner = tar({"1.jpg": b"1", "deep.tar": innermost, "._1.jpg": b"mac"}, "w")
    assert unpacked(tmp_path, tar({"n01.tar": inner, "2.jpg": b"2"})) == ["2.jpg", "n01/1.jpg", "n01/deep.tar"]
    assert (tmp_path / "a" / "n01" / "deep.tar").read_bytes() == innermost


def test_only_what_is_below_the_top_folder(tmp_path):
    members = {"./top/x/1.jpg": b"1", "top/2.jpg": b"2", "other/3.jpg": b"3", "topmost": b"4", "._top": b"mac"}
    assert unpacked(tmp_path, tar(members), "top") == ["2.jpg", "x/1.jpg"]


@pytest.mark.parametrize(
    "content, message",
    [
        (tar({"a/../../evil": b"x"}), "would be written outside"),
        (tar({"n01.tar": tar({"../evil": b"x"})}, "w"), "would be written outside"),
        (tar({"a": link("a", tarfile.CHRTYPE)}), "a link or device"),
        (tar({"evil\0": b"x", "evil\n" * 1000 + "/..": b"x"}), "outside"),
        (tar({}), "it is empty"),
        (b"", "could not be opened"),
        (b"\x1f\x8b\x08" + bytes(600), ""),
        (b"\xfd7zXZ\0" + bytes(600), ""),
        (tar({"n01.tar": b"no tar"}), "could not be opened"),
    ],
)
def test_what_is_refused_is_one_line_and_writes_nothing_outside(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        unpacked(tmp_path, content)
    text = str(error.value)
    assert text.startswith(f"cannot unpack {tmp_path}/a.tar: ") and message in text
    assert "\n" not in text and len(text) < 600
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "a").exists()


def header(name="a", size=0, kind=tarfile.REGTYPE):
    """A header of a tar, of a file with any `size`."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


LONG = {
    "name": header(size=1 << 33, kind=tarfile.GNUTYPE_LONGNAME),
    "records": header(size=1 << 33, kind=tarfile.XHDTYPE),
    "many": header() * 3000,
    "many names": (header(size=512, kind=tarfile.GNUTYPE_LONGNAME) + b"x" * 512 + header()) * 1000,
    "negative": header(size=-512) * 2,
    "chain": header(kind=tarfile.XHDTYPE) * 5000 + header(),
    "text": header(size=5_000_192) + bytes(5_000_192) + header(),
    "too large": header(size=1 << 62),
}


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "inside"])
@pytest.mark.parametrize("name", LONG)
def test_an_archive_that_is_much_larger_than_it_looks(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(unpack, "HEADERS", 1 << 20)
    content = LONG[name] + bytes(1024)
    packer = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "inside": gzip.compress}[kind]
    content = packer(content) if kind != "inside" else tar({"n01.tar": packer(content)}, "w")
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot unpack") as error:
        unpacked(tmp_path, content)
    assert "\n" not in str(error.value) and time.monotonic() - start < 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10**6


def test_holes_are_no_pictures(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.jpg",
        "GNU.sparse.realsize": str(1 << 30),
    }  # fmt: skip
    info.size = 512
    content = info.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n0\n".ljust(512, b"\0") + bytes(1024)
    with pytest.raises(UserError, match="1073741824 bytes come out of it, more than 1048576"):
        unpacked(tmp_path, content)


def test_what_is_in_the_way_of_a_member(tmp_path):
    (tmp_path / "a.part").mkdir()
    os.mkfifo(tmp_path / "a.part" / "1.jpg")
    with pytest.raises(UserError, match=r"1\.jpg is in the way"):
        unpacked(tmp_path, tar({"1.jpg": b"1"}))
    os.rename(tmp_path / "a.part" / "1.jpg", tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe, not a file"):
        unpack.unpack(str(tmp_path / "pipe"), str(tmp_path / "b"))


def test_no_more_than_the_disk_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="GB are needed for it"):
        unpacked(tmp_path, tar({"1.jpg": bytes(100)}))


def test_unpacking_follows_no_links(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "a.part").symlink_to("precious")
    with pytest.raises(UserError, match="is a link"):
        unpacked(tmp_path, tar({"1.jpg": b"1"}))
    (tmp_path / "a.part").unlink()
    (tmp_path / "a.part").mkdir()
    (tmp_path / "precious" / "mine").write_text("mine")
    (tmp_path / "a.part" / "1.jpg").symlink_to(tmp_path / "precious" / "mine")
    with pytest.raises(UserError, match="is a link"):
        unpacked(tmp_path, tar({"1.jpg": b"1"}))
    assert os.listdir(tmp_path / "precious") == ["mine"] and (tmp_path / "precious" / "mine").read_text() == "mine"
