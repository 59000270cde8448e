"""Runs scripts in forks of one process that has Paddle already: importing it is most of a short run's time.

As a program it reads runs from stdin, a line of JSON each, {"argv", "cwd", "environment", "stdout", "stderr"}, the last
two of which are files that are there, and answers each with a line, its exit status.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile


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
            run(json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(job):
    """In the fork: runs the script as Python would have."""
    for descriptor, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
