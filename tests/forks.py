"""Runs scripts in forks of one process that has Paddle already: importing it is most of a short run's time.

As a program it reads runs from stdin, a line of JSON each, {"argv", "cwd", "environment", "stdout", "stderr"}, the last
two of which are files that are there, and answers each with a line, its exit status.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback


class Server:
    """The process that is forked; it starts with the first run and ends with the one that has made it."""

    def __init__(self):
        self.process = None

    def run(self, command, cwd):
        """As subprocess.run(command, cwd=cwd, capture_output=True, text=True) of a Python with a script."""
        if not self.process:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)
        with tempfile.NamedTemporaryFile("r+") as out, tempfile.NamedTemporaryFile("r+") as err:
            job = {"argv": command[1:], "cwd": str(cwd), "environment": dict(os.environ)}
            self.process.stdin.write(json.dumps({**job, "stdout": out.name, "stderr": err.name}) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, status, out.read(), err.read())


def main():
    import cv2  # noqa: F401
    import paddle  # noqa: F401
    from PIL import Image  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            end(run(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(job):
    """In the fork: runs the script as Python would have; -> its exit status."""
    signal.alarm(600)  # a test fails rather than waits for ever
    for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status):
    """Ends the fork as Python ends, but without the destructors of Paddle's library: they wait for ever for a lock
    that a thread of the process that was forked may have held at that moment."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
