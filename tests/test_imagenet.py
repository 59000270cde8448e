"""The official files, and weights in the scripts."""

import contextlib
import hashlib
import http.server
import os
import re
import threading

import numpy as np
import paddle
import pytest
from archives import talking
from conftest import run
from test_layouts import loaded
from test_load import vision_file
from test_models import close, normalised, pictures

import models
import weights
from retrieval import extraction
from runtime import web
from utility import UserError
from weights import imagenet


@contextlib.contextmanager
def server(content, promised=None):
    """A web server whose every file is `content`; -> (its URL, the paths that were asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(promised or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEP_METRIC_LEARNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def official(monkeypatch, url, md5=None):
    monkeypatch.setitem(imagenet.IMAGENET, "ResNet8", imagenet.Official(f"{url}/r8.pdparams", md5))


def test_imagenet_is_downloaded_once_and_checked(tmp_path, cache, monkeypatch, capsys):
    paddle.save(models.build_model("ResNet8", 3).state_dict(), str(tmp_path / "r8"))
    content = (tmp_path / "r8").read_bytes()
    with server(content) as (url, asked):
        official(monkeypatch, url, hashlib.md5(content).hexdigest())
        for _ in range(2):
            assert weights.read_weights("imagenet", "ResNet8").file_name == f"{cache}/r8.pdparams"
    assert asked == ["/r8.pdparams"] and os.listdir(cache) == ["r8.pdparams"]
    assert capsys.readouterr().err == f"downloading {url}/r8.pdparams (0 MB)\n"


@pytest.mark.parametrize(
    ("content", "promised", "md5", "wanted"),
    [
        (b"content", None, "0" * 32, "has MD5 9a0364b9e99bb480dd25e1f0284c8555 instead of 000"),
        (b"content", 1000, None, "ended after 7 of 1000 bytes|IncompleteRead"),
        (b"<html>login</html>", None, None, "a web page, not weights"),
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(cache, monkeypatch, content, promised, md5, wanted):
    with server(content, promised) as (url, _):
        official(monkeypatch, url, md5)
        with pytest.raises(UserError, match=wanted) as caught:
            weights.read_weights("imagenet", "ResNet8")
    message = str(caught.value)
    assert os.listdir(cache) == [] and ".tmp" not in message and f"put it at {cache}/r8.pdparams" in message


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TO = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "


@pytest.mark.parametrize("wait", [0, 0.02])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ((HEAD + b"Content-Length: abc\r\n\r\n", b"x"), "more than 100000 bytes|too slow"),
        ((HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"x"), "more than 100000 bytes|too slow"),
        ((HEAD + b"Content-Length: -1\r\n\r\n", b"x"), "more than 100000 bytes|too slow"),
        ((HEAD + b"Content-Length: 100001\r\n\r\n", b"x"), "it says that it has 100001 bytes, more than 100000"),
        ((HEAD + b"\r\n", b"x" * 10000), "more than 100000 bytes"),
        ((CHUNKED + b"-1\r\n", b"x"), "more than 100000 bytes|too slow"),
        ((CHUNKED + b"-5\r\n", b"x"), "more than 100000 bytes|too slow"),
        ((CHUNKED + b"0\r\n", b"A: b\r\n"), "too slow|broke"),
        ((HEAD, b"A: b\r\n"), "no answer|not an answer"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n",), "no answer"),
        ((TO + b"/b\r\n\r\n", b""), "HTTP error 302"),
        ((TO + b"http://[::1\r\n\r\n", b""), "not an address"),
        ((TO + b"ftp://127.0.0.1/a\r\n\r\n", b""), "it leads to what is no web server"),
    ],
    ids=["word", "digits", "negative", "large", "endless", "chunk-1", "chunk-5", "trailers", "headers", "continue"]
    + ["circle", "address", "ftp"],
)
def test_a_server_that_never_ends_or_says_nonsense(cache, monkeypatch, said, wanted, wait):
    monkeypatch.setattr(imagenet, "MOST", 100_000)
    monkeypatch.setattr(web, "PATIENCE", 0.3)
    monkeypatch.setattr(web, "SLOW", (0.2, 10_000))
    with talking(*said, wait=wait) as (url, _):
        official(monkeypatch, url, "0" * 32)
        with pytest.raises(UserError, match=wanted) as caught:
            weights.read_weights("imagenet", "ResNet8")
    assert "\n" not in str(caught.value) and os.listdir(cache) == []


def test_without_a_network_it_says_which_file_to_bring_and_where_to_put_it(cache, monkeypatch):
    official(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        weights.read_weights("imagenet", "ResNet8")
    message = str(caught.value)
    assert message.startswith("cannot download http://127.0.0.1:9/r8.pdparams (")
    assert message.endswith(f"without a network, bring this file yourself and put it at {cache}/r8.pdparams")
    paddle.save(models.build_model("ResNet8", 3).state_dict(), f"{cache}/r8.pdparams")
    assert weights.read_weights("imagenet", "ResNet8").file_name == f"{cache}/r8.pdparams"


def test_models_without_an_official_file(monkeypatch):
    for name in set(models.MODELS) - set(imagenet.IMAGENET):
        with pytest.raises(UserError, match=f"no official ImageNet file for {name}.*; there is one for .*ResNet50, "):
            weights.read_weights("imagenet", name)
    assert set(imagenet.IMAGENET) <= set(models.MODELS)
    urls = getattr(paddle.vision.models.resnet, "model_urls", {})
    for depth in (18, 50, 101, 152):
        assert tuple(imagenet.IMAGENET[f"ResNet{depth}"]) == urls[f"resnet{depth}"]
    monkeypatch.delenv("DEEP_METRIC_LEARNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert imagenet.cache_folder() == "/somewhere/deep_metric_learning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert imagenet.cache_folder() == os.path.expanduser("~/.cache/deep_metric_learning")


def test_the_scripts_take_foreign_weights_and_say_in_one_line_what_is_wrong(birds, tmp_path):
    path = vision_file(tmp_path, 18)
    common = [*birds.lists, "--use_gpu=False", "--image_shape=3,32,32", "--model=ResNet18"]
    result = run("infer.py", *common, f"--pretrained_model={path}", f"--feature_file={tmp_path}/f.npz")
    line = f"loaded 100 of 100 backbone tensors from {path} (paddle.vision ResNet18); head loaded: 1000 classes"
    assert line in result.stdout.splitlines()
    assert np.load(tmp_path / "f.npz")["features"].shape == (48, 512)

    broken = vision_file(tmp_path, 18, **{"bn1.bias": np.zeros(65, np.float32)})
    flags = ["--num_epochs=1", "--total_images=8", "--train_batch_size=8", "--samples_each_class=2", "--eval_every=0"]
    train = ["train.py", *common, *flags, f"--model_save_dir={tmp_path}/out"]
    result = run(*train, f"--pretrained_model={broken}", status=2)
    assert re.fullmatch(r"error: .*: not the weights of ResNet18: backbone.bn1.bias .*\n", result.stderr)
    for script in (train, ["eval.py", *common]):
        result = run(*script, f"--pretrained_model={broken}", "--allow_partial=True")
        assert "loaded 99 of 100 backbone tensors" in result.stdout
        done = "skipped" if script is train else "loaded"
        assert f"passed over backbone.bn1.bias ([65] there, [64] here); head {done}: 1000 classes" in result.stdout
    message = run("eval.py", *common, f"--pretrained_model={path}", "--embedding_size=16", status=2).stderr
    assert message == f"error: --embedding_size=16, but {path} has no embedding layer\n"


def test_eval_and_infer_rebuild_pooling_embedding_and_head_of_a_file_without_description(tmp_path, capsys):
    paddle.save(models.build_model("ResNet8", 3, "gem", 16).state_dict(), str(tmp_path / "w.pdparams"))
    asked = {**dict.fromkeys((*models.SETTLED, "class_dim")), "model": "ResNet8"}
    opened = extraction.open_network(asked, f"{tmp_path}/w")
    found = opened.settings
    assert opened.labels is None and (found.pooling, found.embedding_size, found.class_dim) == ("gem", 16, 3)
    out = capsys.readouterr().out
    assert "; pool loaded; embedding loaded: 16 values; head loaded: 3 classes\n" in out
    assert "w.pdparams does not say how it was trained" in out and "--pooling=gem, --embedding_norm=none" in out


def test_help_says_what_cannot_be_seen_in_a_file():
    text = " ".join(run("train.py", "--help").stdout.split())
    assert "cannot be seen in a file: Caffe and Keras" in text and "--allow_partial" in text


@pytest.mark.parametrize(
    ("name", "model"),
    [("resnet50", "ResNet50"), ("resnet101", "ResNet101"), ("seresnext50_32x4d", "SE_ResNeXt50_32x4d")],
)
def test_a_network_of_timm(tmp_path, name, model):
    """timm's ResNets have torchvision's names."""
    torch, timm = (pytest.importorskip(name, exc_type=ImportError) for name in ("torch", "timm"))
    from safetensors.torch import save_file

    theirs = timm.create_model(name, num_classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5, generator=generator)
    theirs.eval()
    save_file(theirs.state_dict(), str(tmp_path / "t.safetensors"))
    network, line = loaded(tmp_path / "t.safetensors", model, head="must")
    assert f"(torchvision/timm {model}); head loaded: 7 classes" in line
    image = pictures()
    with torch.no_grad(), paddle.no_grad():
        wanted = theirs(torch.from_numpy(normalised(image).numpy())).numpy()
        close(network(paddle.to_tensor(image))[1], wanted)
