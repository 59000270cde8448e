"""Unpacks a tar safely: nothing leaves its folder, links and devices are refused, an interrupted run is continued."""

import lzma
import os
import shutil
import sys
import tarfile
import time
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from utility import UserError

# What a broken or hostile archive makes tarfile and the decompressors raise.
BROKEN = (
    tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip


class Refused(Exception):
    """An archive is not unpacked; the message says why."""


def place(member, top):
    """Where a member goes below the folder; None for what is left out: folders, macOS's ._ files, what is not in top.

    Only plain files are ever written, under names checked here: no link can lead a later member elsewhere.
    """
    parts, shown = [part for part in member.name.split("/") if part not in ("", ".")], repr(member.name[:100])
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise Refused(f"its member {shown} would be written outside the folder")
    if not (member.isreg() or member.isdir()):
        raise Refused(f"its member {shown} is a link or device")
    if top and parts[:1] != [top]:
        return None
    parts = parts[1:] if top else parts
    if not member.isreg() or not parts or any(part.startswith("._") for part in parts):
        return None
    return os.path.join(*parts)


def is_done(member, path, inner):
    """Whether an earlier run has unpacked the member. A file cut short by an interruption is smaller."""
    if inner and path.endswith(".tar"):
        return os.path.isdir(path[:-4])
    return os.path.isfile(path) and os.path.getsize(path) == member.size


def write_member(archive, member, path, inner):
    """Writes a file of an archive, or unpacks the archive that it is."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with archive.extractfile(member) as source:
        if inner and path.endswith(".tar"):
            unpack_file(source, path[:-4], inner=False)
            return
        if os.path.islink(path):
            raise Refused(f"{path} is a link: remove it")
        with open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def unpack_file(file, folder, top="", inner=True, progress=False):
    """Unpacks an open archive (see `unpack`). Raises: Refused, what is in BROKEN."""
    part = f"{folder}.part"
    if os.path.islink(part):
        raise Refused(f"{part} is a link: remove it")
    with tarfile.open(fileobj=file) as archive:
        placed = [(member, place(member, top)) for member in archive]
        members = [(member, os.path.join(part, path)) for member, path in placed if path]
        if not members:
            raise Refused(f"it holds no files in a folder {top!r}" if top else "it is empty")
        os.makedirs(part, exist_ok=True)
        members = [(member, path) for member, path in members if not is_done(member, path, inner)]
        need, free = sum(member.size for member, _ in members), shutil.disk_usage(part).free
        if need > free:
            raise Refused(f"{need / 1e9:.1f} GB are needed for it, {free / 1e9:.1f} GB are free in {part}")
        done, said = 0, time.monotonic()
        for member, path in members:
            write_member(archive, member, path, inner)
            done += member.size
            if progress and time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"  {done / need:.0%} of {need / 1e9:.1f} GB", flush=True)
    os.rename(part, folder)


def unpack(path, folder, top=""):
    """The files below `top` in a tar go to `folder`, those of a tar inside it to a folder named so. Raises: UserError.

    The folder appears when it is complete; until then it is `<folder>.part`, and the next run goes on with it.
    """
    print(f"unpacking {path} into {folder}", flush=True)
    try:
        with open(path, "rb") as file:
            unpack_file(file, folder, top, progress=True)
    except (Refused, *BROKEN) as error:
        raise UserError(f"cannot unpack {path}: {first_line(error)}") from None


def first_line(error):
    """What an error says of a broken archive, short enough for a line."""
    return str(error).partition("\n")[0].rstrip(":")[:300] or type(error).__name__
