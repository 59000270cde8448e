"""The folder of a training run, <model_save_dir>/<model>/: its checkpoints, the links `latest` and `best`, the log.

A checkpoint is `<epoch>/` after an epoch and `<epoch>_<step>/` inside one. Whatever ends the process leaves at most a
name that ends in `.tmp<letters>`, which the next run in the folder deletes.
"""

import contextlib
import dataclasses
import filecmp
import json
import os
import re

import files
from runtime import parallel
from utility import UserError
from weights import checkpoint
from weights.checkpoint import CONTENT, LEFTOVER, LINKS, checkpoint_name, described_name, position

LOG_FILE = "train_log.jsonl"
SET_ASIDE, MOVED = "replaced", ".moved_by_train"  # a folder, and the file in it that lists what we have put there
PROBE = re.compile(r"\.write_test(\.old)?\.tmp\d+")
OWN_LEFTOVER = re.compile(rf"({re.escape(LOG_FILE)}|{re.escape(MOVED)})\.tmp[a-z0-9_]{{8}}")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    steps: int  # of an epoch
    epoch: int = 0
    step: int = 0  # steps done in it
    evaluated: bool = False  # whether the recall after `epoch` has been measured
    best: dict = None  # {"recall@1", "epoch"} of the best epoch so far
    waited: int = 0  # evaluations since then
    bad: tuple = ()  # (index, reason) of the pictures of the epoch that could not be read, until the log has them

    @classmethod
    def of(cls, description):
        """That of a checkpoint's description."""
        known = {"waited": 0, "bad": (), **description}  # which older ones have not
        known = {field.name: known[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "bad": tuple(map(tuple, known["bad"]))})

    def at_step(self, step, bad=()):
        return dataclasses.replace(self, step=step, bad=bad)

    def at_epoch(self, epoch):
        """At the start of `epoch`, or where it is if that is in it."""
        return self if epoch == self.epoch else dataclasses.replace(self, epoch=epoch, step=0, evaluated=False, bad=())

    def with_recall(self, recall):
        """After the evaluation of the epoch."""
        best, waited = self.best, self.waited + 1
        if best is None or recall > best["recall@1"]:
            best, waited = {"recall@1": recall, "epoch": self.epoch}, 0
        return dataclasses.replace(self, evaluated=True, best=best, waited=waited)


class Run:
    """The folder `path`, which need not be there yet."""

    def __init__(self, path):
        self.path = str(path)
        self.locked = None  # a descriptor, which stays open
        self.sink = None  # function(record), which gets what is logged, too

    # ------------------------------------------------------------ its checkpoints

    def save(self, parts, description):
        """Writes the checkpoint of `description` (see weights.checkpoint), then points `latest` at it; -> its path."""
        name = checkpoint_name(description)
        path = os.path.join(self.path, name)
        checkpoint.write_checkpoint(path, parts, description, make_way=lambda: self.remove([name]))
        self.point_at("latest", name)
        return path

    def names(self):
        """The names of the checkpoints in the folder, the newest last."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        names = [name for name in names if position(name) and described_name(os.path.join(self.path, name)) == name]
        return sorted(names, key=position)

    def copied(self):
        """Which of `latest` and `best` are checkpoints themselves: of a run that was copied without its links."""
        paths = {link: os.path.join(self.path, link) for link in LINKS}
        return [link for link, path in paths.items() if not os.path.islink(path) and described_name(path)]

    def newest(self):
        """The path of the newest checkpoint in the folder, under whatever name, or None."""
        paths = [os.path.join(self.path, name) for name in (*self.copied(), *self.names())]
        paths.sort(key=lambda path: position(described_name(path)))  # stable: the number goes before the copy
        return paths[-1] if paths else None

    def in_the_way(self, epochs):
        """The paths of what is no checkpoint of ours and has the name of one in a run of `epochs` epochs."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        own = self.names()
        taken = [name for name in names if position(name) and position(name)[0] < epochs and name not in own]
        return [os.path.join(self.path, name) for name in sorted(taken, key=position)]

    def has(self, description):
        """Whether the checkpoint that `description` belongs to is in the folder."""
        return checkpoint_name(description) in self.names()

    def later(self, name):
        """The names of those that come after the checkpoint `name`."""
        copied = [described_name(os.path.join(self.path, link)) for link in self.copied()]
        found = {other for other in (*self.names(), *copied) if position(other) > position(name)}
        return sorted(found, key=position)

    def remove(self, names):
        """Deletes checkpoints; one that holds something else, or was not written under its name, stays."""
        for name in names:
            path = os.path.join(self.path, name)
            if name in LINKS or described_name(path) == name:
                files.remove_folder(path, CONTENT)

    def remove_old(self, keep):
        """Deletes what is no longer needed: epochs but for the `keep` newest, checkpoints inside an epoch but for the
        newest, and a run set aside. What `latest` and `best` point at stays."""
        names = self.names()
        stay = {self.read_link(link) for link in LINKS}
        stay.update([name for name in names if "_" not in name][-keep:], names[-1:])
        self.remove([name for name in names if name not in stay])
        self.remove_set_aside()

    # ------------------------------------------------------------ latest and best

    def read_link(self, link):
        """The name of the checkpoint that `latest` or `best` points at; None where `point_at` has not made it."""
        return checkpoint.read_link(os.path.join(self.path, link))

    def point_at(self, link, name):
        """Makes the link `<folder>/<link>` (latest, best) point at the checkpoint `name`, in one step.

        Where there are no links, it is a small file with that name in it.
        """
        path = os.path.join(self.path, link)
        temporary = f"{path}.tmp{os.getpid()}"
        self.make_way(link)
        try:
            if files.link(temporary, name):
                os.replace(temporary, path)
                files.sync_directory(self.path)
                return
        except OSError as error:
            raise UserError(f"{path}: cannot make this a link to {name}: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)
        if os.path.islink(path):
            os.remove(path)  # atomic_write would write what it points at
        with files.atomic_write(path) as file:
            file.write(f"{name}\n")

    def remove_dangling(self):
        """Removes those of `latest` and `best` that point at a checkpoint which is no more."""
        for link in LINKS:
            name = self.read_link(link)
            if name and name not in self.names():
                os.remove(os.path.join(self.path, link))

    def make_way(self, link):
        """Moves away what has the name of the link `<folder>/<link>` and is none, such as the checkpoint itself
        in a run that was copied without its links.

        That may be the only copy of its weights: it takes the checkpoint's own name where that is free. It is deleted
        where that checkpoint is there and the same, and else kept under a name that nothing here touches.
        """
        path = os.path.join(self.path, link)
        if not os.path.lexists(path) or self.read_link(link):
            return
        name = None if os.path.islink(path) else described_name(path)
        numbered = name and os.path.join(self.path, name)
        if name and _is_copy(path, numbered) and files.remove_folder(path, CONTENT):
            return
        files.keep(path, numbered)

    # ------------------------------------------------------------ starting in the folder of a run

    def lock(self):
        """Locks the folder against other processes until this one ends. A second call does nothing.

        Raises: UserError where there is another. On a system or file system without locks a line says so.
        """
        if self.locked is not None:
            return
        try:
            import fcntl

            self.locked = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another train.py is writing here: take another --model_save_dir") from None
        except (ImportError, OSError):
            print(f"note: {self.path}: no locks here: nothing keeps a second run from writing there at the same time")

    def remove_leftovers(self):
        """Deletes what an ended process has left in the middle of something; for the one that holds the lock."""
        for folder in (self.path, *(os.path.join(self.path, name) for name in self.names())):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if not any(kind.fullmatch(name) for kind in (LEFTOVER, OWN_LEFTOVER, PROBE)):
                    continue
                if os.path.isdir(path) and not os.path.islink(path):
                    files.remove_folder(path, re.compile("[ab]") if PROBE.fullmatch(name) else CONTENT)
                else:
                    with contextlib.suppress(OSError):
                        os.remove(path)

    # ------------------------------------------------------------ the log

    def log(self, record):
        """Appends one JSON object to the log of the run; of several processes only the first does."""
        if parallel.is_first():
            files.append(os.path.join(self.path, LOG_FILE), json.dumps(record) + "\n")
            if self.sink:
                self.sink(record)

    def cut_log(self, size):
        """Takes from the log what was written after the checkpoint at which it had `size` bytes: it will come again.

        A file that is not a log of ours throughout is kept under another name.
        """
        path = os.path.join(self.path, LOG_FILE)
        if os.path.isfile(path) and not os.path.islink(path):
            if self.read_log() is None:
                files.keep(path)
            files.unshare(path)
        if size is not None:
            files.cut(path, size)

    def log_size(self):
        """Bytes of the log, which are on the disk then."""
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.path, LOG_FILE), "rb") as file:
            try:
                files.sync(file.fileno())
            except OSError as error:
                raise UserError(f"{file.name}: cannot be flushed to the disk: {error.strerror}") from None
            return os.fstat(file.fileno()).st_size
        return 0

    def read_log(self):
        """The records of the log, a list of dicts; None where there is none, or where it is not a log of ours."""
        path = os.path.join(self.path, LOG_FILE)
        if os.path.islink(path):
            return None
        try:
            with open(path, "rb") as file:
                *lines, rest = file.read().split(b"\n")  # the last line may be half written
            records = [json.loads(line) for line in lines]
            ours = all(isinstance(record, dict) and {"args", "epoch"} & set(record) for record in records)
        except (OSError, ValueError):
            return None
        return records if ours and (lines or not rest) else None

    # ------------------------------------------------------------ a run that another replaces

    def set_aside(self):
        """Moves the checkpoints and the log of an earlier run, and nothing else, to `<folder>/replaced/`.

        There they stay until the new run has a checkpoint of its own. What is there already is kept: then the run to
        set aside is one that never came to its first checkpoint.
        """
        aside = os.path.join(self.path, SET_ASIDE)
        names = [*self.names(), *self.copied()]
        names += [link for link in LINKS if self.read_link(link)]
        names += [LOG_FILE] if self.read_log() is not None else []
        if os.path.lexists(aside) and (os.path.islink(aside) or not os.path.isdir(aside)):
            message = "in the way: the earlier run would be moved there until the new one has a checkpoint"
            raise UserError(f"{aside}: {message}")
        taken = [name for name in names if os.path.lexists(os.path.join(aside, name))]
        for name in taken:
            path = os.path.join(self.path, name)
            if not ((name in LINKS and not os.path.isdir(path)) or (name == LOG_FILE and self.restarts())):
                target = os.path.join(aside, name)
                raise UserError(f"{target}: in the way: {path} would be moved there; remove it or rename it")
        moved = [name for name in names if name not in taken]
        try:
            if names:
                os.makedirs(aside, exist_ok=True)
                with files.atomic_write(os.path.join(aside, MOVED)) as file:
                    file.write("\n".join(dict.fromkeys(self.moved() + moved)))
            for name in moved:
                os.rename(os.path.join(self.path, name), os.path.join(aside, name))
            for name in taken:
                os.remove(os.path.join(self.path, name))
        except OSError as error:
            raise UserError(f"{self.path}: cannot set the earlier run aside: {error.strerror}") from None

    def moved(self):
        """The names of what `set_aside` has put into its folder."""
        aside = os.path.join(self.path, SET_ASIDE)
        with contextlib.suppress(OSError), open(os.path.join(aside, MOVED)) as file:
            return [] if os.path.islink(aside) else file.read().splitlines()
        return []

    def remove_set_aside(self):
        """Deletes what `set_aside` has moved, and nothing else that the folder may hold."""
        aside, moved = os.path.join(self.path, SET_ASIDE), self.moved()
        if not moved:
            return
        earlier = Run(aside)
        earlier.remove([name for name in (*earlier.names(), *earlier.copied()) if name in moved])
        own = [link for link in LINKS if earlier.read_link(link)]
        own += [LOG_FILE] if earlier.read_log() is not None else []
        half_written = filter(OWN_LEFTOVER.fullmatch, os.listdir(aside))
        for name in (*(name for name in own if name in moved), *half_written, MOVED):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(aside, name))
        with contextlib.suppress(OSError):  # it holds something of the user's
            os.rmdir(aside)

    def restarts(self):
        """Whether the log is ours and of a run that never finished an epoch: a new one will write the same."""
        records = self.read_log()
        return records is not None and all(
            record.get("epoch", 0) < (0 if "eval" in record else 1) for record in records
        )

    def make_way_for_log(self):
        """For a new run where there are no checkpoints: empties the log of one that had none, and keeps any other."""
        path = os.path.join(self.path, LOG_FILE)
        if self.restarts():
            files.cut(path, 0)
        elif os.path.lexists(path):
            files.keep(path)


def _is_copy(path, other):
    names = os.listdir(path)
    if os.path.islink(other) or not os.path.isdir(other) or sorted(names) != sorted(os.listdir(other)):
        return False
    return filecmp.cmpfiles(path, other, names, shallow=False)[0] == names
