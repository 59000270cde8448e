"""From a list to features, and the progress that is shown."""

import io
import sys

import numpy as np
import paddle
import pytest

import reader
from retrieval import extraction
from runtime import parallel, process
from utility import UserError

READING = reader.Reading([3, 8, 8])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals_only(monkeypatch):
    for stderr in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        fake_batches(monkeypatch, np.zeros((5, 4, 4, 3), np.uint8))
        extraction.extract(Means(False), samples_of(5), READING, 2)
        shown = stderr.getvalue()
        if stderr.isatty():
            assert "5/5" in shown and "images/s" in shown and shown.endswith("\n")
        else:
            assert shown == ""


def samples_of(count):
    return reader.Samples([""] * count, None, None, None)


def fake_batches(monkeypatch, images, bad=()):
    """Two images in each batch."""
    count = len(images)
    batches = [
        reader.Batch(
            images[i : i + 2], None, np.arange(i, min(i + 2, count)), [pair for pair in bad if i <= pair[0] < i + 2]
        )
        for i in range(0, count, 2)
    ]
    monkeypatch.setattr(reader, "read_in_order", lambda samples, reading, batch_size: iter(batches))


class Means(paddle.nn.Layer):
    """Embeds a picture as its colours' means, once in float16, and has a head only where told to."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, image):
        assert not self.training and not paddle.is_grad_enabled()
        embedding = image.astype("float32").mean(axis=[1, 2])
        return embedding.astype("float16"), embedding * 2 if self.head else None


@pytest.mark.parametrize("head", [True, False])
def test_extract(monkeypatch, head):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    fake_batches(monkeypatch, images, bad=[(4, "broken"), (1, "missing")])
    seen = []
    found = extraction.extract(
        Means(head), samples_of(5), READING, 2, lambda index, logits: seen.append((index, logits))
    )
    wanted = images.reshape(5, -1, 3).mean(axis=1)
    assert found.features.dtype == np.float32 and np.abs(found.features - wanted).max() < 0.1
    assert found.index.tolist() == list(range(5)) and found.bad == [(1, "missing"), (4, "broken")]
    assert [index.tolist() for index, _ in seen] == [[0, 1], [2, 3], [4]]
    if head:
        assert np.allclose(np.concatenate([logits for _, logits in seen]), wanted * 2, rtol=1e-5)
    else:
        assert all(logits is None for _, logits in seen)
    fake_batches(monkeypatch, images[:0])
    with pytest.raises(UserError, match="not one image could be read"):
        extraction.extract(Means(head), samples_of(0), READING, 2)


def test_a_batch_without_a_good_picture(monkeypatch):
    empty = reader.Batch(np.zeros((0, 4, 4, 3), np.uint8), None, np.zeros(0, np.int64), [(0, "broken"), (1, "broken")])
    whole = reader.Batch(np.ones((1, 4, 4, 3), np.uint8), None, np.array([2]))
    monkeypatch.setattr(reader, "read_in_order", lambda samples, reading, batch_size: iter([empty, whole]))
    found = extraction.extract(Means(False), samples_of(3), READING, 2)
    assert found.index.tolist() == [2] and [index for index, _ in found.bad] == [0, 1]


def test_a_signal_ends_it_between_two_batches(monkeypatch):
    signals = process.Signals()
    fake_batches(monkeypatch, np.zeros((6, 4, 4, 3), np.uint8))
    seen = []

    def stop(index, logits):
        seen.append(index.tolist())
        signals.number = 15

    with pytest.raises(parallel.Signalled) as error:
        extraction.extract(Means(False), samples_of(6), READING, 2, stop, signals)
    assert error.value.number == 15 and seen == [[0, 1]]
