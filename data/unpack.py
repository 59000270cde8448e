"""Unpacks a tar or zip safely: nothing leaves its folder, links are refused, an interrupted run is continued."""

import collections
import lzma
import os
import shutil
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import files
from utility import UserError, say

HEADERS = 1 << 27  # bytes of an archive's headers, more than 200,000 files have
ZIP_HEADERS = 1 << 25  # the same of a zip, whose headers take more memory than they are long
TIMES, LEAST = 100, 1 << 20  # what comes out of an archive is at most so many times as large, or so many bytes

# What a broken or hostile archive makes tarfile, zipfile and the decompressors raise.
BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error, lzma.LZMAError,
    EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


class Refused(Exception):
    """An archive is not unpacked; the message says why."""


class _Limited:
    """A zip, or the tar that an archive is, once decompressed: no more than `left` bytes of it are read, none beyond
    `most`."""

    def __init__(self, file, most, left):
        self.file, self.most, self.left, self.headers = file, most, left, left
        self.tell, self.close, self.seekable = file.tell, file.close, file.seekable

    def seek(self, place, whence=os.SEEK_SET):
        if whence == os.SEEK_SET and place > self.most:
            raise Refused(f"more comes out of it than {self.most} bytes")
        return self.file.seek(place, whence)

    def read(self, size=-1):
        size = os.fstat(self.file.fileno()).st_size - self.file.tell() if size < 0 else size
        self.left -= size
        if self.left < 0:
            raise Refused(f"its headers have more than {self.headers} bytes")
        return self.file.read(size)


class Archive(tarfile.TarFile):
    """A tar that may be hostile, to be opened with `Archive.open(fileobj=..., most=...)`.

    Without a limit, a small file could be many terabytes of members, or have a name of gigabytes.
    """

    def __init__(self, name=None, mode="r", fileobj=None, most=HEADERS, **options):
        super().__init__(name, mode, _Limited(fileobj, most, HEADERS), **options)

    def headers_are_read(self):
        """From now on as much is read as the members have that are asked for."""
        self.fileobj.left = sys.maxsize


class Member(collections.namedtuple("Member", "name size info")):
    """A file in a zip, with those attributes of tarfile's that are used here."""

    def isdir(self):
        return self.name.endswith("/")

    def isreg(self):
        # The kind of file is where Unix systems write it; others leave 0.
        return not self.isdir() and stat.S_IFMT(self.info.external_attr >> 16) in (0, stat.S_IFREG)


class ZipArchive:
    """A zip that may be hostile, with those methods of Archive's that are used here. Raises: Refused."""

    def __init__(self, file, most):
        self.file = _Limited(file, most, ZIP_HEADERS)
        self.zip = zipfile.ZipFile(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.zip.close()

    def __iter__(self):
        for info in self.zip.infolist():
            if info.flag_bits & 1:
                raise Refused("it is encrypted: unpack it with the password that its authors give, and name the folder")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"its member {info.filename[:100]!r} is compressed in a way that is not read")
            yield Member(info.filename, info.file_size, info)

    def headers_are_read(self):
        self.file.left = sys.maxsize

    def extractfile(self, member):
        return self.zip.open(member.info)


def open_archive(file, most):
    """The Archive or ZipArchive of an open file. Raises: Refused, what is in BROKEN."""
    if (start := file.read(512)) and not any(start):  # padding, for a decompressor, however much there is
        raise Refused("it is empty: it begins with zeros")
    file.seek(0)
    return ZipArchive(file, most) if start.startswith(b"PK") else Archive.open(fileobj=file, most=most)


def place(member, top):
    """Where a member goes below the folder; None for what is left out: folders, macOS's ._ files, what is not in top.

    Only plain files are ever written, under names checked here: no link can lead a later member elsewhere.
    """
    parts, shown = [part for part in member.name.split("/") if part not in ("", ".")], repr(member.name[:100])
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise Refused(f"its member {shown} would be written outside the folder")
    if not (member.isreg() or member.isdir()):
        raise Refused(f"its member {shown} is a link or device")
    if member.size < 0:
        raise Refused(f"its member {shown} has {member.size} bytes")
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
            unpack_file(source, path[:-4], member.size, inner=False)
            return
        if os.path.islink(path):
            raise Refused(f"{path} is a link: remove it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise Refused(f"{path} is in the way: remove it")
        with open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def unpack_file(file, folder, size, top="", inner=True, progress=False):
    """Unpacks an open archive of `size` bytes (see `unpack`). Raises: Refused, what is in BROKEN."""
    part, most = f"{folder}.part", max(TIMES * size, LEAST)
    if os.path.islink(part):
        raise Refused(f"{part} is a link: remove it")
    with open_archive(file, most) as archive:
        placed = [(member, place(member, top)) for member in archive]
        archive.headers_are_read()
        members = [(member, os.path.join(part, path)) for member, path in placed if path]
        if not members:
            raise Refused(f"it holds no files in a folder {top!r}" if top else "it is empty")
        os.makedirs(part, exist_ok=True)
        members = [(member, path) for member, path in members if not is_done(member, path, inner)]
        need, free = sum(member.size for member, _ in members), shutil.disk_usage(part).free
        if need > most:  # holes, which are in no archive
            raise Refused(f"{need} bytes come out of it, more than {most}")
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


def top_of(path):
    """The one folder that all files of an archive are in, or "" where there is no such. Raises: UserError."""
    try:
        with files.open_file(path) as file, open_archive(file, max(TIMES * os.path.getsize(path), LEAST)) as archive:
            paths = [inside for inside in (place(member, "") for member in archive) if inside]
    except (Refused, *BROKEN) as error:
        raise UserError(f"cannot unpack {path}: {first_line(error)}") from None
    tops = {inside.partition(os.sep)[0] for inside in paths}
    return tops.pop() if len(tops) == 1 and all(os.sep in inside for inside in paths) else ""


def unpack(path, folder, top=""):
    """The files below `top` in a tar or zip go to `folder`, those of a tar inside to one named so. Raises: UserError.

    The folder appears when it is complete; until then it is `<folder>.part`, and the next run goes on with it.
    """
    say(f"unpacking {path} into {folder}")
    try:
        with files.open_file(path) as file:
            unpack_file(file, folder, os.path.getsize(path), top, progress=True)
    except (Refused, *BROKEN) as error:
        raise UserError(f"cannot unpack {path}: {first_line(error)}") from None


def first_line(error):
    """What an error says of a broken archive, short enough for a line."""
    return str(error).partition("\n")[0].rstrip(":")[:300] or type(error).__name__
