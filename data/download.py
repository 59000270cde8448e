"""Fetches a large file: what the scripts that prepare a data set share.

A download goes on where an earlier one ended, is checked before it gets its name, and takes the next address where one
fails. Proxies are those of the environment (https_proxy and so on); passwords, which addresses may hold, are sent to
their own host only and never shown.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import encodings.idna  # noqa: F401  else imported with the first connection, where a Ctrl-C can get lost
import hashlib
import itertools
import os
import re
import shutil
import sys
import time
import urllib.parse
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import files
import utility
from runtime import process, web
from runtime.web import SLOW, TIMEOUT, Broken, Failed, explain
from utility import UserError, say

AGENT = "deep-metric-learning"  # some hosts refuse Python's own name
POOR = 10, 1_000_000  # so many connections in a row may break before they have brought so many bytes
MOST = 1 << 28  # bytes of a file whose size is not known
PAGE = "it is a web page (a login, or Google Drive asking a person to confirm)"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A file that is needed: its name in messages, its path, how to check it, and how a person can get it.

    `size` is in bytes, None for any up to MOST; `digest` is such as "sha256:0c68...".
    """

    name: str
    path: str
    size: int | None
    digest: str
    by_hand: str


def script_folder(file, *below):
    """The folder of a script, or one below it, as short as it can be said from here."""
    folder = os.path.join(os.path.dirname(os.path.abspath(file)), *below)
    with contextlib.suppress(ValueError):  # another drive
        short = os.path.relpath(folder)
        if not short.startswith(os.pardir):
            return short
    return folder


def run_script(main):
    """Runs `main()` and ends the process: 0, 2 after a mistake (one line on stderr), 130 after Ctrl-C."""

    def guarded():
        try:
            main()
        except KeyboardInterrupt:
            raise process.Stopped(130, "interrupted: run this again to go on") from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"{error.filename or 'the output'}: {error.strerror or error}") from None

    process.run_script(guarded)


def from_environment(name, default):
    """The text of an environment variable, or the default where it is not set or empty."""
    return os.environ.get(name) or default


def number_from_environment(name, default):
    """The whole number of an environment variable. Raises: UserError."""
    text = os.environ.get(name, "")
    if text and not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{name}={text}: expected a whole number")
    return int(text) if text else default


# ---------------------------------------------------------------- addresses


def without_secrets(url):
    """The address without user, password, query and fragment, for messages."""
    scheme, rest = re.fullmatch(r"(?s)([a-z]*://)?(.*)", url).groups("")
    # Up to the last @, unless a plain host stands before it: a password may hold any character.
    if "@" in rest and not re.match(r"[^/@?#:]*(:\d+)?([/?#]|$)", rest):
        rest = rest.rpartition("@")[2]
    return utility.plain(scheme + re.split("[?#]", rest)[0], 1000)


def split_login(url):
    """-> the address without user and password and with what it must not hold quoted; the Authorization, or None."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    path, query = (urllib.parse.quote(text, safe="%/:=&?~+!$,;'@()*[]|") for text in (parts.path, parts.query))
    if parts.scheme == "ftp":  # urllib's own handler takes the login from the address
        return urllib.parse.urlunsplit(("ftp", parts.netloc, path, query, "")), None
    address = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
    if not at:
        return address, None
    user, _, password = login.partition(":")
    plain = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
    return address, "Basic " + base64.b64encode(plain.encode()).decode()


def request(url, start):
    """Asks for a file from byte `start` on; -> the answer. Raises: Failed; web.Beyond where nothing is there."""
    try:
        if re.search(r"[\0-\x1f\x7f]", url):  # which urllib would leave out: another address
            raise Failed("not an address: it has a line break or another control character in it")
        address, authorization = split_login(url)
        if urllib.parse.urlsplit(address).scheme not in ("http", "https", "ftp"):
            raise Failed("no such kind of address: it must begin with http://, https://, ftp:// or file:///")
        asked = urllib.request.Request(address, headers={"User-Agent": AGENT})
    except ValueError as error:
        raise Failed(explain(error)) from None
    if start:
        asked.add_header("Range", f"bytes={start}-")
    if authorization:
        asked.add_unredirected_header("Authorization", authorization)
    return web.ask(asked, TIMEOUT)


# ---------------------------------------------------------------- one address


class Meter:
    """Shows on a terminal how far something is, where stderr is one."""

    def __init__(self, total, done=0):
        self.total, self.first, self.started, self.said = total, done, time.monotonic(), 0.0
        self.on = sys.stderr.isatty()

    def show(self, done):
        now = time.monotonic()
        if not self.on or now < self.said + 0.5:
            return
        self.said = now
        speed = (done - self.first) / max(now - self.started, 1e-3)
        text = f"{done / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s"
        if self.total and speed:
            left = utility.duration((self.total - done) / speed)
            text = f"{done / self.total:4.0%} of {self.total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s, {left} left"
        print(f"\r  {text}\033[K", end="", file=sys.stderr, flush=True)

    def end(self):
        if self.on:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def bytes_of(path):
    """The size of a file; 0 where there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def is_page(head):
    """Whether a file that begins so is a web page."""
    return bool(re.search(rb"<html|<!doctype", head[:512], re.IGNORECASE))


def wrong_size(found, size):
    """What is wrong with a file of `found` bytes, "" if nothing is."""
    return f"it has {found} bytes instead of {size}" if size is not None and found != size else ""


def wrong_with(path, wanted):
    """What is wrong with a file, "" if it is the wanted one."""
    algorithm, _, digest = wanted.digest.partition(":")
    found, size = hashlib.new(algorithm), bytes_of(path)
    try:
        with files.open_file(path) as file:
            if is_page(file.read(512)):
                return PAGE
            if wrong_size(size, wanted.size):
                return wrong_size(size, wanted.size)
            file.seek(0)
            meter, done = Meter(size), 0
            while block := file.read(1 << 20):
                found.update(block)
                done += len(block)
                meter.show(done)
            meter.end()
    except OSError as error:
        return f"its {algorithm} is not to be had ({error.strerror}) instead of {digest}"
    return "" if found.hexdigest() == digest.lower() else f"its {algorithm} is {found.hexdigest()} instead of {digest}"


@contextlib.contextmanager
def opened_part(path, start):
    """A partial file, cut to `start` bytes, to be written on. Raises: UserError where it can't be written."""
    try:
        with open(path, "r+b" if os.path.exists(path) else "xb") as file:
            file.seek(start)
            file.truncate()
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write_blocks(blocks, part, start, size):
    """Writes what comes to a partial file from byte `start` on. Raises: Failed, UserError.

    Args:
        blocks: iterable of bytes.
        size: bytes of the whole file; no more than one block beyond them is written.

    Returns: the bytes that the file then has.
    """
    done, meter = start, Meter(size, start)
    try:
        with opened_part(part, start) as file:
            for block in blocks:
                file.write(block)
                done += len(block)
                if done > size:
                    break  # whatever follows must not fill the disk
                meter.show(done)
    finally:
        meter.end()
    return done


def receive(url, part, size):
    """Asks once, for what a partial file lacks, and writes what comes. Raises: Failed, Broken, UserError.

    The partial file is left alone where what comes is not the wanted file.
    """
    start = bytes_of(part)
    try:
        answer = request(url, start)
    except web.Beyond:  # the server's file ends before ours does
        answer = request(url, 0)
    with contextlib.closing(web.blocks(answer, SLOW)) as blocks:
        block = next(blocks, b"")
        continues = re.match(r"bytes ([0-9]{1,18})-", answer.headers.get("Content-Range") or "")
        if getattr(answer, "status", None) != 206:
            start = 0  # this server can't go on in the middle of a file: all of it comes
        elif not continues or int(continues[1]) != start:
            raise Failed("the server goes on at another place than was asked for")
        length = web.announced(answer)
        total = size if length is None else start + length
        if start == 0 and is_page(block):
            raise Failed(f"not the right file: {PAGE}")
        if total is not None and wrong_size(total, size):
            raise Failed(f"not the right file: {wrong_size(total, size)}")
        most = MOST if total is None else total
        if most > MOST and size is None:
            raise Failed(f"not the right file: it has {most} bytes, more than {MOST}")
        done = write_blocks(itertools.chain([block], blocks), part, start, most)
    if done > most:
        os.remove(part)
        raise Failed(f"not the right file: it has more than {most} bytes")
    if total is not None and done < total:
        raise Broken(f"it ended after {done} of {total} bytes")


def copy_file(path, part, size):
    """Copies a file of this machine to a partial file. Raises: Failed, UserError."""
    try:
        source = files.open_file(path, MOST if size is None else None)
    except (OSError, ValueError) as error:
        raise Failed(f"cannot copy it: {getattr(error, 'strerror', None) or error}") from None
    with source:
        wrong = wrong_size(os.fstat(source.fileno()).st_size, size)
        if wrong:
            raise Failed(f"not the right file: {wrong}")
        with opened_part(part, 0) as target:
            shutil.copyfileobj(source, target, 1 << 20)


def get(url, part, size):
    """Downloads to a partial file, going on where it ends, over as many connections as bring something.

    Raises: Failed, UserError
    """
    if url.startswith("file://"):
        path = url[len("file://") :]
        copy_file(path if os.path.exists(path) else urllib.parse.unquote(path), part, size)
        return
    most, poor = bytes_of(part), 0
    while True:
        try:
            receive(url, part, size)
            return
        except Broken:
            gained = bytes_of(part) - most
            poor = poor + 1 if gained < POOR[1] else 0
            if gained <= 0 or poor > POOR[0]:
                raise
            most += gained


# ---------------------------------------------------------------- a file from several addresses


def try_address(wanted, url, part):
    """Has an address give the file to `part`, and checks it. Raises: Failed, UserError."""
    if os.path.islink(part):
        raise UserError(f"{part}: a link: what is written here must not reach another file; remove it or rename it")
    if os.path.exists(part) and (wanted.size is None or bytes_of(part) > wanted.size):
        os.remove(part)  # without a known size a whole file can't be told from a broken one
    size, begun = wanted.size, bytes_of(part)
    amount = "" if size is None else f" ({size} bytes, {begun} of them are here)"
    say(f"downloading {wanted.name} from {without_secrets(url)}{amount}")
    if begun != size:
        get(url, part, size)
    print("checking it", flush=True)
    wrong = wrong_with(part, wanted)
    if wrong:
        os.remove(part)
        raise Failed(f"not the right file: {wrong}")


def fetch(wanted, urls):
    """`wanted.path` is there and right, or a UserError says why not.

    Args:
        urls: addresses, the best first. A download from the first is `<path>.part1` until it has been checked, and so
            on: what one server sends can't spoil another's part.
    """
    path, folder = wanted.path, os.path.dirname(wanted.path) or os.curdir
    if os.path.exists(path):
        say(f"checking {path}" + ("" if wanted.size is None else f" ({wanted.size // 10**6} MB)"))
        wrong = wrong_with(path, wanted)
        if wrong:
            raise UserError(
                f"{path} is not {wanted.name}: {wrong}. Remove it and run this again, or by hand: {wanted.by_hand}"
            )
        return
    if os.path.lexists(path):
        raise UserError(f"{path}: a link to nothing: remove it or mend it")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot write into this folder")
    tried = ""
    for number, url in enumerate(urls, 1):
        part = f"{path}.part{number}"
        try:
            try_address(wanted, url, part)
        except Failed as reason:
            tried += f"{without_secrets(url)}: {reason}; "
            continue
        os.rename(part, path)
        for other in range(1, 10):
            with contextlib.suppress(OSError):
                os.remove(f"{path}.part{other}")
        return
    raise UserError(
        f"could not download {wanted.name}: {tried}run this again to go on or start anew, or by hand: {wanted.by_hand}"
    )
