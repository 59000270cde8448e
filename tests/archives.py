"""What the tests of downloads share: a small server, a checkout to run in, and archives to fetch."""

import contextlib
import glob
import http.server
import io
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import threading

import pytest
from conftest import ROOT

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
CUB = "data/download_cub200.sh"
IMAGENET = "data/ILSVRC2012/download_imagenet2012.sh"
PAGE = b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>"

needs_shell = pytest.mark.skipif(not SHELLS, reason="needs a POSIX shell")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; keeps what was asked in server.seen, as (path, Range, Authorization)."""

    def do_GET(self):
        server = self.server
        asked, password = self.headers.get("Range"), self.headers.get("Authorization")
        server.seen.append((self.path, asked, password))
        if self.path in server.redirects:
            status, where = server.redirects[self.path]
            self.answer(status, Location=where)
            return
        if server.password and not password:
            self.answer(401, **{"WWW-Authenticate": 'Basic realm="tars"'})
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked[len("bytes=") :].split("-")[0]) if asked and server.ranges else 0
        if start >= len(content) > 0:
            self.answer(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = server.breaks_at.pop() if server.breaks_at else len(content)
        with contextlib.suppress(ConnectionError):  # the other side has seen enough
            self.wfile.write(content[start:stop])

    def answer(self, status, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    """A server on this machine, which ends with the block."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.redirects, server.seen, server.breaks_at = {}, {}, [], []
        server.ranges, server.says_length, server.password, server.shift = True, True, False, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def talking(*said, wait=0):
    """A server that says to everybody the same bytes, the last of `said` without end, `wait` seconds after each.

    Yields its URL and a list that gets an item a connection.
    """
    asked, over = [], threading.Event()

    def talk(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            for text in itertools.chain(said, itertools.repeat(said[-1])):
                if over.wait(wait) or not text:
                    break
                connection.sendall(text)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                asked.append(connection)
                threading.Thread(target=talk, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/a", asked
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def make_checkout(folder):
    """Copies what the scripts in data/ need into a folder."""
    paths = [os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "*.py"))]
    for package in ("data", "runtime"):
        paths += [os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, package, "*.py"))]
    for name in (*paths, CUB, IMAGENET):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), folder / name)


def sh(home, script, *arguments, shell="sh", status=0, cwd=None, **environment):
    """Runs a script; a failure has exactly one line on stderr, an `error:`. -> CompletedProcess."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    clean.update(PYTHON=sys.executable, PYTHONDONTWRITEBYTECODE="1")
    result = subprocess.run(
        [shutil.which(shell), script, *(str(argument) for argument in arguments)],
        cwd=cwd or home,
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **{name: str(value) for name, value in environment.items()}},
        timeout=60,
    )
    assert result.returncode == status, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    if status:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result


def picture(seed):
    """What passes for a JPEG by its first bytes, and doesn't compress."""
    return b"\xff\xd8\xff\xe0" + random.Random(seed).randbytes(1500)


def tar(members, mode="w:gz"):
    """The bytes of a tar with dict name -> content, or TarInfo for what is not a plain file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is not content:
                info.size = len(content)
            archive.addfile(info, None if info is content else io.BytesIO(content))
    return buffer.getvalue()


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    """A link, or another special file, for `tar`."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
