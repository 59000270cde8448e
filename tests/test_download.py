"""The two download scripts, run by the shells that are here, against a small server on this machine."""

import hashlib
import http.server
import io
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import types
import zlib

import pytest
from conftest import ROOT

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
TOOLS = [tool for tool in ("curl", "wget") if shutil.which(tool)]
COMMANDS = ["cat", "cp", "dd", "dirname", "find", "grep", "mkdir", "mv", "rm", "sed", "wc", "sh"]
CUB = "data/download_cub200.sh"
IMAGENET = "data/ILSVRC2012/download_imagenet2012.sh"

pytestmark = pytest.mark.skipif(not SHELLS or not TOOLS, reason="needs a POSIX shell and curl or wget")


# ---------------------------------------------------------------- helpers


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; keeps what was asked in server.seen, as (path, Range, Authorization)."""

    def do_GET(self):
        server = self.server
        asked, password = self.headers.get("Range"), self.headers.get("Authorization")
        server.seen.append((self.path, asked, password))
        if server.password and not password:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="tars"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked[len("bytes=") :].split("-")[0]) if asked and server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = server.breaks_at.pop() if server.breaks_at else len(content)
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.seen, server.ranges, server.breaks_at, server.password = {}, [], True, [], False
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path):
    """A checkout's data folder, in a place with a space in its name."""
    home = tmp_path / "my checkout"
    for name in (CUB, IMAGENET, "data/split.py", "files.py", "utility.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), home / name)
    return home


@pytest.fixture
def path_with(tmp_path):
    """-> function that makes a PATH on which, of curl and wget, only the named ones are."""

    def make(*tools):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in (*COMMANDS, *tools):
            (folder / name).symlink_to(shutil.which(name))
        return str(folder)

    return make


def sh(home, script, *arguments, shell="sh", status=0, cwd=None, **environment):
    """Runs a script; a failure has exactly one line on stderr, an `error:`. -> CompletedProcess."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    result = subprocess.run(
        [shutil.which(shell), script, *(str(argument) for argument in arguments)],
        cwd=cwd or home,
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "PYTHON": sys.executable, **{name: str(value) for name, value in environment.items()}},
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


def pack(content, images=8, url=None):
    """The environment that describes a CUB archive."""
    about = {"CUB200_SIZE": len(content), "CUB200_SHA256": hashlib.sha256(content).hexdigest(), "CUB200_IMAGES": images}
    return {**about, "CUB200_URL": url} if url else about


def birds(top="images", first=0):
    members = {f"{top}/{c:03d}.Bird/Bird_{i}.jpg": picture(first + 10 * c + i) for c in range(1, 5) for i in (1, 2)}
    return {**members, f"{top}/._001.Bird": b"mac", f"{top}/001.Bird/._Bird_1.jpg": b"mac"}


def expected_list(classes, top="images"):
    return "".join(f"{top}/{c:03d}.Bird/Bird_{i}.jpg {c}\n" for c in classes for i in (1, 2))


def check_birds(home, top="images", images="images"):
    data = home / "data"
    assert (data / "CUB200_train.txt").read_text() == expected_list((1, 2), images)
    assert (data / "CUB200_val.txt").read_text() == expected_list((3, 4), images)
    assert not list(data.rglob("._*")) and not list(data.glob("*.part*")) and not list(data.glob("*.tmp"))
    assert (data / images / "003.Bird" / "Bird_2.jpg").read_bytes()[:3] == b"\xff\xd8\xff"


ARCHIVE = tar(birds())


# ---------------------------------------------------------------- CUB-200


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("tool", TOOLS)
def test_from_the_download_to_the_lists_from_any_folder(server, home, path_with, tmp_path, shell, tool):
    server.files["/images.tgz"] = ARCHIVE
    environment = pack(ARCHIVE, url=f"{server.url}/images.tgz")
    path = path_with(tool)
    out = sh(home, home / CUB, shell=shell, cwd=tmp_path, PATH=path, **environment).stdout
    check_birds(home)
    assert [seen[:2] for seen in server.seen] == [("/images.tgz", None)]
    assert "found a collection of your own: 8 images of 4 classes" in out
    # Another run needs no network and writes the lists again.
    (home / "data" / "CUB200_val.txt").unlink()
    (home / "data" / "images.tgz").unlink()
    sh(home, CUB, shell=shell, PATH=path, **environment)
    check_birds(home)
    assert len(server.seen) == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_a_broken_download_is_continued(server, home, path_with, tool):
    server.files["/images.tgz"] = ARCHIVE
    (home / "data" / "images.tgz.part1").write_bytes(ARCHIVE[:5000])
    server.breaks_at = [9000]  # and breaks again while this run looks on
    sh(home, CUB, PATH=path_with(tool), **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
    check_birds(home)
    assert [seen[1].rstrip("-") for seen in server.seen] == ["bytes=5000", "bytes=9000"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_server_that_cannot_continue_sends_all_again(server, home, path_with, tool):
    server.files["/images.tgz"], server.ranges = ARCHIVE, False
    (home / "data" / "images.tgz.part1").write_bytes(ARCHIVE[:5000])
    sh(home, CUB, PATH=path_with(tool), **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
    check_birds(home)


def test_a_part_that_is_whole_already_and_one_that_is_too_long(server, home):
    server.files["/images.tgz"] = ARCHIVE
    part = home / "data" / "images.tgz.part1"
    part.write_bytes(ARCHIVE)
    sh(home, CUB, **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
    assert not server.seen and not part.exists()
    shutil.rmtree(home / "data" / "images")
    (home / "data" / "images.tgz").unlink()
    part.write_bytes(ARCHIVE + b"x")
    sh(home, CUB, **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
    check_birds(home)


def test_file_url_and_flag(home, tmp_path):
    (tmp_path / "cub.tgz").write_bytes(ARCHIVE)
    sh(home, CUB, f"--url=file://{tmp_path}/cub.tgz", **pack(ARCHIVE, url="http://127.0.0.1:9/"))
    check_birds(home)
    shutil.rmtree(home / "data" / "images")
    (home / "data" / "images.tgz").unlink()
    assert "cannot copy it" in sh(home, CUB, "--url=file:///absent.tgz", status=2, **pack(ARCHIVE)).stderr


PAGE = b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>"


@pytest.mark.parametrize(
    "content, message",
    [
        (ARCHIVE[:-1] + bytes([ARCHIVE[-1] ^ 1]), "its sha256 is "),
        (ARCHIVE + b"more", f"it has {len(ARCHIVE) + 4} bytes instead of {len(ARCHIVE)}"),
        (PAGE, "it is a web page"),
        (None, "HTTP error 404" if "curl" in TOOLS else "HTTP error"),
    ],
    ids=["checksum", "size", "page", "absent"],
)
def test_a_wrong_file_is_said_and_not_kept(server, home, content, message):
    server.files["/f"] = content
    error = sh(home, CUB, status=2, **pack(ARCHIVE, url=f"{server.url}/f")).stderr
    assert "could not download CUB-200 (2010)" in error and message in error
    assert "by hand: download https://" in error and "put it at data/images.tgz" in error
    assert sorted(os.listdir(home / "data")) == ["ILSVRC2012", "download_cub200.sh", "split.py"]


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unreachable_server_keeps_what_is_there(home, path_with, tool):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        part = home / "data" / "images.tgz.part1"
        part.write_bytes(ARCHIVE[:5000])
        url = f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}/images.tgz?token=secret"
        result = sh(home, CUB, status=2, PATH=path_with(tool), **pack(ARCHIVE, url=url))
    assert "no answer" in result.stderr and "by hand" in result.stderr
    assert "secret" not in result.stdout + result.stderr
    assert part.read_bytes() == ARCHIVE[:5000]


def test_the_mirror_follows_a_first_home_that_sends_a_page(server, home):
    """And the mirror's own part, of an earlier run, is neither lost nor mixed with the page."""
    server.files = {"/home": PAGE, "/mirror": ARCHIVE}
    (home / "cub.tgz.part2").write_bytes(PAGE[:20])
    (home / "cub.tgz.part3").write_bytes(ARCHIVE[:5000])
    code = (
        'functions_only=yes; . data/download_cub200.sh; fetch CUB cub.tgz "$CUB200_SIZE" "sha256:$CUB200_SHA256" "" '
        f"{server.url}/gone {server.url}/home {server.url}/mirror"
    )
    out = sh(home, "-c", code, **pack(ARCHIVE)).stdout
    assert (home / "cub.tgz").read_bytes() == ARCHIVE and out.count("downloading CUB") == 3
    assert ("/mirror", "bytes=5000-") in [seen[:2] for seen in server.seen] and not list(home.glob("*.part*"))


def test_an_archive_put_there_by_hand(home):
    file = home / "data" / "images.tgz"
    file.write_bytes(ARCHIVE)
    sh(home, CUB, **pack(ARCHIVE))
    check_birds(home)
    shutil.rmtree(home / "data" / "images")
    file.write_bytes(ARCHIVE[:-5])
    error = sh(home, CUB, status=2, **pack(ARCHIVE)).stderr
    assert "data/images.tgz is not CUB-200 (2010): it has" in error and "Remove it" in error
    assert file.exists() and not (home / "data" / "images").exists()


def test_an_interrupted_unpacking_goes_on(home):
    (home / "data" / "images.tgz").write_bytes(ARCHIVE)
    part = home / "data" / "images.part"
    (part / "001.Bird").mkdir(parents=True)
    whole, cut = part / "001.Bird" / "Bird_1.jpg", part / "001.Bird" / "Bird_2.jpg"
    whole.write_bytes(picture(11))
    os.utime(whole, (1, 1))
    cut.write_bytes(picture(12)[:100])
    sh(home, CUB, **pack(ARCHIVE))
    check_birds(home)
    images = home / "data" / "images" / "001.Bird"
    assert (images / "Bird_1.jpg").stat().st_mtime == 1 and (images / "Bird_2.jpg").read_bytes() == picture(12)


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("images/001.Bird/../../../evil", b"x", "outside"),
        ("../evil", b"x", "outside"),
        ("{tmp_path}/evil", b"x", "outside"),
        ("images\\..\\evil", b"x", "outside"),
        ("images/001.Bird/link.jpg", link("images/001.Bird/link.jpg"), "link or device"),
        ("images/001.Bird/hard.jpg", link("images/001.Bird/hard.jpg", tarfile.LNKTYPE), "link or device"),
        ("images/pipe", link("images/pipe", tarfile.FIFOTYPE), "link or device"),
    ],
)
def test_hostile_archives_write_nothing(home, tmp_path, name, content, message):
    archive = tar({**birds(), name.format(tmp_path=tmp_path): content})
    (home / "data" / "images.tgz").write_bytes(archive)
    error = sh(home, CUB, status=2, **pack(archive)).stderr
    assert "cannot unpack data/images.tgz: its member" in error and message in error
    assert not list(tmp_path.rglob("*evil*"))
    assert not [path for path in (home / "data").glob("images*") if path.is_dir()]


@pytest.mark.parametrize("content", [b"no tar at all" * 99, tar({"pictures/1.jpg": b"x"}), ARCHIVE[:6000]])
def test_archives_that_cannot_be_unpacked(home, content):
    (home / "data" / "images.tgz").write_bytes(content)
    assert "cannot unpack data/images.tgz" in sh(home, CUB, status=2, **pack(content)).stderr
    assert not (home / "data" / "images").exists() and not (home / "data" / "CUB200_train.txt").exists()


def test_both_editions_and_the_way_back(home):
    later = tar({**birds("CUB_200_2011/images", 100), "CUB_200_2011/images.txt": b"1 x", "attributes.txt": b"y"})
    (home / "data" / "images.tgz").write_bytes(ARCHIVE)
    (home / "data" / "CUB_200_2011.tgz").write_bytes(later)
    sh(home, CUB, "2010", **pack(ARCHIVE))
    out = sh(home, CUB, "2011", **pack(later)).stdout
    assert "both in data; the lists now name the images of CUB-200-2011" in out
    check_birds(home, images="CUB_200_2011/images")
    assert (home / "data" / "CUB_200_2011" / "images.txt").exists()
    out = sh(home, CUB, **pack(ARCHIVE)).stdout
    assert "the lists now name the images of CUB-200 (2010)" in out
    check_birds(home)


def test_a_folder_of_other_pictures_is_left_alone(home):
    (home / "data" / "images" / "cats").mkdir(parents=True)
    (home / "data" / "images" / "cats" / "a.jpg").write_bytes(picture(1))
    error = sh(home, CUB, status=2).stderr
    assert "holds 1 .jpg files, not the 6033 of CUB-200 (2010)" in error and "move data/images away" in error
    assert not (home / "data" / "CUB200_train.txt").exists()


def test_mistakes_in_the_command(home, path_with):
    assert "Expected 2010 or 2011" in sh(home, CUB, "2012", status=2).stderr
    assert "no Python 3.9 or later as 'no-such-python'" in sh(home, CUB, status=2, PYTHON="no-such-python").stderr
    error = sh(home, CUB, status=2, PATH=path_with()).stderr
    assert "neither curl nor wget is here" in error and "put it at data/images.tgz" in error
    for script in (CUB, IMAGENET):
        assert "PYTHON" in sh(home, script, "--help", PYTHON="no-such-python").stdout


# ---------------------------------------------------------------- ImageNet


def element(kind, content):
    """An element of a MATLAB 5 file, in its short form where that holds it."""
    if len(content) <= 4:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(array_class, rows, columns, *content):
    flags = element(6, struct.pack("<II", array_class, 0))
    return element(14, flags + element(5, struct.pack("<ii", rows, columns)) + element(1, b"") + b"".join(content))


def meta_mat(rows, compressed=True):
    """A devkit's meta.mat: the struct array `synsets` of (ILSVRC2012_ID, WNID, words, num_children, children)."""
    names = ["ILSVRC2012_ID", "WNID", "words", "num_children", "children"]
    fields = [element(5, struct.pack("<i", 32)), element(1, b"".join(name.encode().ljust(32, b"\0") for name in names))]
    for number, wnid, words, children in rows:
        fields += [
            matrix(6, 1, 1, element(2, bytes([number]))),
            matrix(4, 1, len(wnid), element(4, wnid.encode("utf-16-le"))),
            matrix(4, 1, len(words), element(16, words.encode())),
            matrix(6, 1, 1, element(9, struct.pack("<d", len(children)))),
            matrix(6, 1, len(children), element(2, bytes(children))),
        ]
    content = matrix(2, len(rows), 1, *fields)
    if compressed:
        packed = zlib.compress(content)
        content = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H2s", 0x0100, b"IM") + content


# Three classes, whose WordNet ids have another order than their numbers, and the group above two of them.
ROWS = [(1, "n03", "kit fox", []), (2, "n01", "tench, Tinca", []), (3, "n02", "crane", []), (4, "n00", "all", [1, 2])]
TRUTH = [2, 1, 3, 1, 2]
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i) for i in (3, 1, 5, 2, 4)}
TRAIN = {
    f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": picture(f"{wnid}{i}") for i in (2, 10)}, "w")
    for wnid in ("n02", "n03", "n01")
}


@pytest.fixture
def tars(tmp_path):
    """A folder with the three files, and the environment that describes them."""
    folder = tmp_path / "tars"
    folder.mkdir()
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(ROWS),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in TRUTH).encode(),
    }
    environment = {"IMAGENET_CLASSES": 3}
    for part, name, content in (
        ("DEVKIT", "ILSVRC2012_devkit_t12.tar.gz", tar(devkit)),
        ("VAL", "ILSVRC2012_img_val.tar", tar(VAL, "w")),
        ("TRAIN", "ILSVRC2012_img_train.tar", tar(TRAIN, "w")),
    ):
        (folder / name).write_bytes(content)
        environment[f"IMAGENET_{part}_SIZE"] = len(content)
        environment[f"IMAGENET_{part}_MD5"] = hashlib.md5(content).hexdigest()
    return types.SimpleNamespace(folder=folder, environment=environment)


def check_imagenet(folder):
    assert (folder / "train_list.txt").read_text() == "".join(
        f"train/{wnid}/{wnid}_{i}.JPEG {label}\n" for label, wnid in enumerate(("n01", "n02", "n03")) for i in (10, 2)
    )
    # n01 is 0, n02 1, n03 2; by number: 2 is n01, 3 is n02, 1 is n03.
    assert (folder / "val_list.txt").read_text() == "".join(
        f"val/ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate((0, 2, 1, 2, 0), 1)
    )
    rows = [row.split() for name in ("train", "val") for row in (folder / f"{name}_list.txt").read_text().splitlines()]
    content = {**VAL, **{f"{w}_{i}.JPEG": picture(f"{w}{i}") for w in ("n01", "n02", "n03") for i in (2, 10)}}
    assert all((folder / path).read_bytes() == content[os.path.basename(path)] for path, _ in rows)
    assert not [path for path in folder.rglob("*") if path.suffix.startswith((".part", ".tmp"))]


@pytest.mark.parametrize("shell", SHELLS)
def test_imagenet_from_a_folder_of_tars(home, tars, shell):
    """As the original page says: from the script's own folder."""
    folder = home / "data" / "ILSVRC2012"
    out = sh(home, "download_imagenet2012.sh", tars.folder, shell=shell, cwd=folder, **tars.environment).stdout
    check_imagenet(folder)
    assert "6 images, labels 0-2" in out and "5 images, labels 0-2" in out
    # The large files may go; the lists are written again.
    for part in ("train", "val"):
        (tars.folder / f"ILSVRC2012_img_{part}.tar").unlink()
        (folder / f"{part}_list.txt").unlink()
    sh(home, IMAGENET, tars.folder, shell=shell, **tars.environment)
    check_imagenet(folder)


def test_imagenet_goes_on_where_it_was(home, tars, tmp_path):
    """A whole class and a whole picture stay as they are, a cut one is written again."""
    output = tmp_path / "out put"
    (output / "train.part" / "n01").mkdir(parents=True)
    (output / "train.part" / "n03.part").mkdir()
    for i in (2, 10):
        (output / "train.part" / "n01" / f"n01_{i}.JPEG").write_bytes(picture(f"n01{i}"))
    (output / "train.part" / "n03.part" / "n03_2.JPEG").write_bytes(b"\xff\xd8")
    os.utime(output / "train.part" / "n01", (1, 1))
    sh(home, IMAGENET, f"--output_dir={output}", tars.folder, **tars.environment)
    check_imagenet(output)
    assert (output / "train" / "n01").stat().st_mtime == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_imagenet_from_a_url_with_a_password(server, home, path_with, tars, tool):
    server.files = {f"/a/{path.name}": path.read_bytes() for path in tars.folder.iterdir()}
    server.password = True
    folder = home / "data" / "ILSVRC2012"
    (folder / "ILSVRC2012_img_train.tar.part1").write_bytes(server.files["/a/ILSVRC2012_img_train.tar"][:3000])
    url = server.url.replace("//", "//me:s3cr%5Cet@") + "/a/"
    result = sh(home, IMAGENET, PATH=path_with(tool), IMAGENET_URL=url, **tars.environment)
    check_imagenet(folder)
    assert ("/a/ILSVRC2012_img_train.tar", "bytes=3000-") in [seen[:2] for seen in server.seen]
    assert "s3cr" not in result.stdout + result.stderr
    assert not any(b"s3cr" in path.read_bytes() for path in home.rglob("*") if path.is_file())


def test_imagenet_mistakes(home, tars):
    error = sh(home, IMAGENET, status=2).stderr
    assert (
        "not in data/ILSVRC2012: ILSVRC2012_devkit_t12.tar.gz ILSVRC2012_img_val.tar ILSVRC2012_img_train.tar" in error
    )
    assert "image-net.org" in error and "IMAGENET_URL" in error
    assert "no such folder" in sh(home, IMAGENET, "absent", status=2).stderr
    assert "what is '--tars'" in sh(home, IMAGENET, "--tars", status=2).stderr
    wrong = {**tars.environment, "IMAGENET_VAL_MD5": "0" * 32}
    error = sh(home, IMAGENET, tars.folder, status=2, **wrong).stderr
    assert "ILSVRC2012_img_val.tar is not ImageNet's ILSVRC2012_img_val.tar: its md5 is" in error
    assert os.listdir(home / "data" / "ILSVRC2012") == ["download_imagenet2012.sh"]


def test_imagenet_classes_that_do_not_fit(home, tars):
    folder = home / "data" / "ILSVRC2012"
    error = sh(home, IMAGENET, tars.folder, status=2, **{**tars.environment, "IMAGENET_CLASSES": 1000}).stderr
    assert "3 classes instead of 1000" in error
    os.rename(folder / "train" / "n02", folder / "train" / "n77")
    error = sh(home, IMAGENET, tars.folder, status=2, **tars.environment).stderr
    assert "train/n02 is missing: move" in error
    os.rename(folder / "train" / "n77", folder / "train" / "n02")
    (folder / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    error = sh(home, IMAGENET, tars.folder, status=2, **tars.environment).stderr
    assert "ILSVRC2012_val_00000004.JPEG is missing" in error
    assert not list(folder.glob("*_list.txt"))


@pytest.mark.parametrize(
    "mat", [meta_mat(ROWS, compressed=False), meta_mat(ROWS)[:200], meta_mat(ROWS)[:128], b"\x89HDF" * 99, b""],
    ids=["uncompressed", "cut", "empty table", "other format", "empty"],
)  # fmt: skip
def test_imagenet_reads_either_form_of_the_class_table_and_no_broken_one(home, tars, mat):
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat,
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2 1 3 1 2",
    }
    content = tar(devkit)
    (tars.folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(content)
    environment = {**tars.environment, "IMAGENET_DEVKIT_MD5": hashlib.md5(content).hexdigest()}
    good = mat == meta_mat(ROWS, compressed=False)
    result = sh(home, IMAGENET, tars.folder, status=0 if good else 2, **environment)
    if good:
        check_imagenet(home / "data" / "ILSVRC2012")
    else:
        assert "ILSVRC2012_devkit_t12.tar.gz: cannot read the classes" in result.stderr
