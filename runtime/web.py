"""What a web server sends, under limits: it may be slow, endless, or no answer at all."""

import contextlib
import ftplib
import http.client
import re
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT = 30  # seconds without a byte
PATIENCE = 120  # seconds until an answer has begun, with all redirects that lead to it
SLOW = 60, 60_000  # a connection is given up that brings fewer bytes than the second number in the first, in seconds
BLOCK = 1 << 16


class Failed(Exception):
    """An address does not give the file; the message is the reason, without the address."""


class Beyond(Failed):
    """The server's file ends before the byte that was asked for."""


class Broken(Failed):
    """The connection ended too early: another may go on."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the block, whatever it waits for, when it takes longer; 0 seconds are no limit.

    Only in the main thread, and where the system has alarms (not on Windows).
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        raise TimeoutError("it is too slow")

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, where something swallows the first
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, 308 in Python 3.9 and 3.10, too, to web servers; a password stays with its own host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        origins = {urllib.parse.urlsplit(address)[:2] for address in (req.full_url, newurl)}
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise Failed("it leads to what is no web server")
        if new and len(origins) == 1 and req.has_header("Authorization"):
            new.add_unredirected_header("Authorization", req.get_header("Authorization"))
        if new:
            fp.close()  # its body would be read to the end, which it may not have
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def explain(error):
    """What went wrong with a connection, in words that hold nothing of the address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP error {error.code}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ftplib.Error) or str(reason).startswith("ftp error"):
        return "FTP error"
    if isinstance(reason, socket.gaierror):
        return "host not found"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({reason.verify_message})"
    if isinstance(reason, ssl.SSLError):
        return "no secure connection"
    if isinstance(reason, (socket.timeout, ConnectionError, TimeoutError)):
        return "no answer"
    if isinstance(reason, OSError):
        return f"no answer ({reason.strerror or 'refused by a proxy'})"
    if isinstance(reason, http.client.HTTPException) and not isinstance(reason, http.client.InvalidURL):
        return "not an answer of a web server"
    return "not an address of a file"


def ask(request, timeout=TIMEOUT):
    """Sends a request and waits for the beginning of the answer, which it returns.

    Args:
        timeout: seconds without a byte.

    Raises: Failed; Beyond for 416.
    """
    try:
        with time_limit(PATIENCE):
            return urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == 416:
                raise Beyond(explain(error)) from None
        raise Failed(explain(error)) from None


def announced(answer):
    """The number of bytes that an answer says it has, or None."""
    length = answer.headers.get("Content-Length") or ""
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def blocks(answer, slow=None):
    """Yields the bytes of an answer as they come, and closes it.

    Args:
        slow: seconds, and the bytes that must come in them; default: SLOW.

    Raises: Broken, where too few come, too.
    """
    seconds, least = slow or SLOW
    start, came = time.monotonic(), 0
    try:
        while True:
            with time_limit(seconds):  # a server can say much that are no bytes of a file
                block = answer.read1(BLOCK)
            if not block:
                return
            came += len(block)
            if time.monotonic() - start > seconds:
                if came < least:
                    raise TimeoutError
                start, came = time.monotonic(), 0
            yield block
    except TimeoutError:
        raise Broken("it is too slow") from None
    except (OSError, ValueError, http.client.HTTPException):
        raise Broken("the connection broke") from None
    finally:
        with contextlib.suppress(OSError), time_limit(seconds):
            answer.close()
