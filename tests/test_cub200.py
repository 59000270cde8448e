"""data/download_cub200.sh, run by the shells that are here, against a small server on this machine."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile

import pytest
from archives import CUB, IMAGENET, PAGE, SHELLS, link, needs_shell, picture, sh, tar
from conftest import ROOT, listing

sys.path.insert(0, os.path.join(ROOT, "data"))

import cub200

pytestmark = needs_shell


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


@pytest.mark.parametrize("shell", SHELLS)
def test_from_the_download_to_the_lists_from_any_folder(server, home, tmp_path, shell):
    """And the only program that is needed beside Python and the shell is dirname."""
    server.files["/images.tgz"] = ARCHIVE
    environment = pack(ARCHIVE, url=f"{server.url}/images.tgz")
    path = tmp_path / "bin"
    path.mkdir()
    (path / "dirname").symlink_to(shutil.which("dirname"))
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


def test_a_broken_download_is_continued(server, home):
    server.files["/images.tgz"] = ARCHIVE
    (home / "data" / "images.tgz.part1").write_bytes(ARCHIVE[:5000])
    server.breaks_at = [9000]  # and breaks again while this run looks on
    sh(home, CUB, **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
    check_birds(home)
    assert [seen[1].rstrip("-") for seen in server.seen] == ["bytes=5000", "bytes=9000"]


def test_a_server_that_cannot_continue_sends_all_again(server, home):
    server.files["/images.tgz"], server.ranges = ARCHIVE, False
    (home / "data" / "images.tgz.part1").write_bytes(ARCHIVE[:5000])
    sh(home, CUB, **pack(ARCHIVE, url=f"{server.url}/images.tgz"))
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
    (tmp_path / "cub.tgz").rename(tmp_path / "my cub.tgz")
    sh(home, CUB, f"--url=file://{tmp_path}/my%20cub.tgz", **pack(ARCHIVE))
    check_birds(home)
    assert "--url is for a download" in sh(home, CUB, str(tmp_path), "--url=file:///x", status=2).stderr


@pytest.mark.parametrize(
    "content, message",
    [
        (ARCHIVE[:-1] + bytes([ARCHIVE[-1] ^ 1]), "its sha256 is "),
        (ARCHIVE + b"more", f"it has {len(ARCHIVE) + 4} bytes instead of {len(ARCHIVE)}"),
        (PAGE, "it is a web page"),
        (None, "HTTP error 404"),
    ],
    ids=["checksum", "size", "page", "absent"],
)
def test_a_wrong_file_is_said_and_not_kept(server, home, content, message):
    server.files["/f"] = content
    before = listing(home)
    error = sh(home, CUB, status=2, **pack(ARCHIVE, url=f"{server.url}/f")).stderr
    assert "could not download CUB-200 (2010)" in error and message in error
    assert "by hand: download https://" in error and "put it at data/images.tgz" in error
    assert listing(home) == before


def test_an_unreachable_server_keeps_what_is_there(home):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        part = home / "data" / "images.tgz.part1"
        part.write_bytes(ARCHIVE[:5000])
        url = f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}/images.tgz?token=secret"
        result = sh(home, CUB, status=2, **pack(ARCHIVE, url=url))
    assert "no answer" in result.stderr and "by hand" in result.stderr
    assert "secret" not in result.stdout + result.stderr
    assert part.read_bytes() == ARCHIVE[:5000]


@pytest.mark.parametrize("folder", ["-d", "two\nlines", "\x1b[2J $(touch evil)"], ids=ascii)
def test_folders_of_any_name(home, tmp_path, folder):
    """One that looks like a flag, and one whose name a terminal would obey: shown in one line."""
    os.rename(home / "data", home / folder)
    (home / folder / "images.tgz").write_bytes(ARCHIVE)
    shell = [shutil.which("sh"), "--", f"{folder}/download_cub200.sh"]
    environment = {**os.environ, "PYTHON": sys.executable, **{k: str(v) for k, v in pack(ARCHIVE).items()}}
    result = subprocess.run(shell, cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert (home / folder / "CUB200_train.txt").read_text() == expected_list((1, 2))
    assert len(result.stdout.splitlines()) == 8 and "\x1b" not in result.stdout and result.stderr == ""
    assert not list(tmp_path.rglob("evil"))


def test_a_url_is_one_address(home, tmp_path, server):
    """Neither a blank nor a line break in it makes a second one."""
    (tmp_path / "cub.tgz").write_bytes(ARCHIVE)
    for blank in (" ", "\n", "\t"):
        url = f"{server.url}/absent{blank}file://{tmp_path}/cub.tgz"
        error = sh(home, CUB, status=2, **pack(ARCHIVE, url=url)).stderr
        assert error.startswith("error: could not download CUB-200 (2010): http://127.0.0.1:")
    assert [seen[0] for seen in server.seen] == [f"/absent%20file://{tmp_path}/cub.tgz"]


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


def test_mistakes_in_the_command(home):
    assert "Expected 2010 or 2011" in sh(home, CUB, "2012", status=2).stderr
    assert "what is '--ulr=x'?" in sh(home, CUB, "--ulr=x", status=2).stderr
    assert "CUB200_SIZE=1 GB: expected a whole number" in sh(home, CUB, status=2, CUB200_SIZE="1 GB").stderr


@pytest.mark.parametrize("script", [CUB, IMAGENET])
def test_the_shell_scripts_without_and_with_python(home, script):
    error = sh(home, script, status=2, PYTHON="no-such-python").stderr
    assert "no Python 3.9 or later as 'no-such-python': install python3, or name yours: PYTHON=" in error
    out = sh(home, script, "--help").stdout
    assert "PYTHON" in out and "sh " in out and "default" in out
    with open(home / script) as file:
        assert len(file.readlines()) <= 10  # what they do is in Python


def test_the_function_that_does_it_all(tmp_path, monkeypatch, capsys):
    """In any folder, for any edition, without the shell."""
    edition = cub200.EDITIONS["2010"]
    monkeypatch.setenv("CUB200_SIZE", str(len(ARCHIVE)))
    monkeypatch.setenv("CUB200_SHA256", hashlib.sha256(ARCHIVE).hexdigest().upper())
    monkeypatch.setenv("CUB200_IMAGES", "8")
    tiny = cub200.described_by_environment(edition)
    assert (tiny.size, tiny.count, tiny.homes) == (len(ARCHIVE), 8, edition.homes)
    (tmp_path / "cub.tgz").write_bytes(ARCHIVE)
    (tmp_path / "data").mkdir()
    cub200.prepare(str(tmp_path / "data"), tiny, f"file://{tmp_path}/cub.tgz")
    check_birds(tmp_path)
    assert cub200.count_pictures(str(tmp_path / "data" / "images")) == 8
    assert capsys.readouterr().out.startswith(f"downloading CUB-200 (2010) from file://{tmp_path}/cub.tgz (")


def test_ctrl_c_leaves_the_part_and_says_so(home):
    """The signal reaches Python itself, which has taken the shell's place."""
    part = home / "data" / "images.tgz.part1"
    part.write_bytes(ARCHIVE[:5000])
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = pack(ARCHIVE, url=f"http://127.0.0.1:{silent.getsockname()[1]}/images.tgz")
        process = subprocess.Popen(
            ["sh", CUB],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in environment.items()}},
            # What a shell starts in the background, such as these tests, ignores Ctrl-C, and so does what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout.readline().startswith(b"downloading CUB-200 (2010) from ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"interrupted: run this again to go on\n")
    assert part.read_bytes() == ARCHIVE[:5000] and not (home / "data" / "images").exists()


def test_python_itself_does_the_same(home):
    (home / "data" / "images.tgz").write_bytes(ARCHIVE)
    environment = {name: str(value) for name, value in pack(ARCHIVE).items()}
    subprocess.run([sys.executable, "data/cub200.py", "2010"], cwd=home, env={**os.environ, **environment}, check=True)
    check_birds(home)
