"""Everything that creates, replaces, extends, cuts or deletes files, under one rule:

    only what is proved to be ours, and of which nothing is lost;

and the way in which files are read that somebody else may have made.

What is ours the caller says, by the names that a folder of ours holds or by what a file of ours contains. What can't be
proved stays, and is named. A link is never followed to what is deleted, cut or extended.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import tempfile

from utility import UserError, say

# Errors of a file system that lacks a feature, not of a full or broken disk.
CANNOT = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EXDEV}

# ---------------------------------------------------------------- read

MOST_JSON = 2**26  # bytes; the labels of a million classes are an eighth of that


def open_file(path, most=None, buffering=-1):
    """Opens a file, or a link to one, to read its bytes. What is no file could have us wait, or read, for ever.

    Args:
        most: bytes that it may have; None: any number.
        buffering: as of open(); 0 halves the time where little is read of each of many files.

    Raises: OSError, also for a folder, pipe, socket or device, and for a file that is too long; ValueError where no
        file can have such a name.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a pipe" if stat.S_ISFIFO(status.st_mode) else "a device"
            raise OSError(errno.EINVAL, f"{kind}, not a file", path)
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than the {most} that are read", path)
        stack.pop_all()
        return open(descriptor, "rb", buffering)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal. Raises: OSError."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def read_json(path):
    """The content of a JSON file. Raises: OSError; ValueError where it is none, or too deeply nested to be read."""
    with open_file(path, MOST_JSON) as file:
        try:
            return json.load(file, parse_constant=_no_number)
        except RecursionError:
            raise ValueError("too deeply nested") from None


def _no_number(name):
    raise ValueError(f"{name} is no number of JSON")


# ---------------------------------------------------------------- create and replace


def make_directory(path):
    """Creates `path` and its parents; a UserError where that or writing into it is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".write_test.tmp{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"{path}: cannot write into this directory: {error.strerror}") from None


def check_output(path, is_ours, what):
    """Raises a UserError where a file could not be written to `path`, or one that is not ours would be replaced.

    Args:
        is_ours: function of a path that says whether a file there is an earlier output of the kind.
        what: what such an output is, for the message.

    Creates the folders that the file needs.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: a directory, not a file to write")
    if os.path.exists(path) and not (os.path.isfile(path) and (os.path.getsize(path) == 0 or is_ours(path))):
        raise UserError(f"{path}: is there already and is not {what}: it is not replaced; give another name")
    make_directory(os.path.dirname(os.path.realpath(path)))


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a file beside `path` that takes its name only when all was written; a UserError where it can't be.

    A link stays one: what it points at is replaced.
    """
    final = os.path.realpath(path)
    folder, name = os.path.split(final)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{name}.tmp", dir=folder)  # a name that nothing else has
        os.close(descriptor)
        with open(temporary, mode) as file:
            yield file
            file.flush()
            sync(file.fileno())
        with contextlib.suppress(OSError):  # a mount of another user's
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, final)
        temporary = None
        sync_directory(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.remove(temporary)


@contextlib.contextmanager
def temporary_folder(path):
    """Makes a folder beside `path`, `<path>.tmp<letters>`, to be filled and renamed to `path`; what is not, goes."""
    temporary = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}.tmp", dir=os.path.dirname(path) or os.curdir)
    try:
        with contextlib.suppress(OSError):  # a mount of another user's
            os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp's are for their owner alone
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new, path):
    """Renames the folder `new`, a `temporary_folder`, to `path`; one that is there goes, once this has worked.

    That it may go the caller has to know.
    """
    if not os.path.isdir(path):
        os.rename(new, path)
        return
    aside = tempfile.mkdtemp(prefix=f"{os.path.basename(path)}.tmp", dir=os.path.dirname(path) or os.curdir)
    old = os.path.join(aside, "old")
    try:
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # where the old one could not go back
            os.rmdir(aside)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(descriptor):
    """Has what was written to an open file reach the disk, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def sync_directory(path):
    """Has the names in a directory reach the disk, so that a renamed file is still there after a power failure."""
    with contextlib.suppress(OSError):  # not every system can
        descriptor = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- extend and cut


def append(path, text):
    """Adds `text` to the end of a file, which is created where it is not there. Raises: UserError, for a link, too."""
    with _open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
        file.write(text.encode())


def cut(path, size):
    """Takes from the end of a file what is beyond `size` bytes. Raises: UserError, for a link, too."""
    if os.path.lexists(path):
        with _open_own(path, os.O_RDWR) as file:
            if os.fstat(file.fileno()).st_size > size:
                file.truncate(size)


def unshare(path):
    """Makes a file that has other names, too (hard links), one of its own, so that the others stay as they are."""
    if os.path.isfile(path) and not os.path.islink(path) and os.stat(path).st_nlink > 1:
        with open(path, "rb") as file:
            content = file.read()
        with atomic_write(path, "wb") as file:
            file.write(content)


@contextlib.contextmanager
def _open_own(path, flags):
    if os.path.islink(path):
        raise UserError(f"{path}: a link: what is written here must not reach another file; remove it or rename it")
    try:
        with open(os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb", buffering=0) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from None


# ---------------------------------------------------------------- delete


def foreign_entry(path, ours):
    """What keeps the folder `path` from being deleted as one of ours: the path of an entry or of itself; else None.

    Args:
        ours: compiled pattern that the names of all entries must match; they must be regular files.
    """
    if os.path.islink(path) or not os.path.isdir(path):
        return path
    with os.scandir(path) as entries:
        return next(
            (e.path for e in entries if not (ours.fullmatch(e.name) and e.is_file(follow_symlinks=False))), None
        )


def remove_folder(path, ours):
    """Deletes a folder if every entry of it is one of ours (see `foreign_entry`); -> whether it did.

    The folder is renamed first, so that half of it never looks like a whole one. What can't be deleted does no harm.
    """
    temporary = f"{path}.old.tmp{os.getpid()}"
    with contextlib.suppress(OSError):
        if foreign_entry(path, ours):
            return False
        os.rename(path, temporary)
        shutil.rmtree(temporary)
        return True
    return False


def holds(path, content):
    """Whether `path` is a file, or a link to one, with exactly these bytes."""
    try:
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size == len(content) and file.read() == content
    except OSError:
        return False


def starts_with(path, content):
    """Whether `path` is a file, or a link to one, whose first bytes are these."""
    try:
        with open_file(path) as file:
            return file.read(len(content)) == content
    except OSError:
        return False


def free_name(path):
    """`path` if nothing has that name, else the first free one of path.kept1, path.kept2, ..."""
    names = itertools.chain([path], (f"{path}.kept{number}" for number in itertools.count(1)))
    return next(name for name in names if not os.path.lexists(name))


def keep(path, name=None):
    """Renames what is in the way at `path` and not known to be ours, and says so.

    Args:
        name: the path that it is to get, if that is free; else one that nothing of ours has.
    """
    name = name if name and not os.path.lexists(name) else free_name(path)
    os.rename(path, name)
    say(f"note: {path} was in the way and is kept: it is now {name}")


# ---------------------------------------------------------------- what a folder can do


def try_folder(path):
    """Tries in the folder `path` what a run will need there, before work is spent.

    Returns: a line for each of links, locks and flushing that this file system lacks, and that there is a way without.
    Raises: UserError where files and folders can't be written, renamed and replaced.
    """
    make_directory(path)
    missing = []
    probe, moved = (os.path.join(path, f".write_test{what}.tmp{os.getpid()}") for what in ("", ".old"))
    try:
        os.makedirs(probe)
        for name in ("a", "b"):
            with open(os.path.join(probe, name), "w") as file:
                file.write("x")
        os.rename(probe, moved)
        os.replace(os.path.join(moved, "a"), os.path.join(moved, "b"))
        with open(os.path.join(moved, "b"), "rb+") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                missing.append(f"no flushing ({error.strerror}): a power failure may cost what was written last")
        if not link(probe):
            missing.append("no symbolic links: latest and best are small files with the name of the checkpoint")
    except OSError as error:
        raise UserError(
            f"{path}: files and folders can't be renamed and replaced here ({error.strerror}), as checkpoints need: "
            "take another folder"
        ) from None
    finally:
        shutil.rmtree(moved, ignore_errors=True)
        shutil.rmtree(probe, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(probe)
    return missing


def link(path, target="x"):
    """Makes a symbolic link at `path`; -> whether the file system can. Raises: OSError for a full or broken disk."""
    try:
        os.symlink(target, path)
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True
