"""The markers of a JPEG, read as libjpeg reads them: what it will allocate and do is known before it begins."""

import collections
import re

# width, height; components; restart: MCUs between restart markers, 0 for none; mcus: of an interleaved
# scan; exif: whether there is EXIF or XMP data, where an orientation may be; scan: where the first scan's data begins;
# all_in_one: whether the first scan has all components, and nothing comes after it.
Header = collections.namedtuple("Header", "width height components restart mcus exif scan all_in_one")

_LOSSLESS, _PROGRESSIVE = (0xC3,), (0xC2, 0xCA)
_FRAMES = (0xC0, 0xC1, 0xC9, *_LOSSLESS, *_PROGRESSIVE)  # those that libjpeg knows
MOST_SEGMENTS = 10_000
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers that no length follows
_WITH_LENGTH = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_DRI, _SOS, _EOI = 0xDD, 0xDA, 0xD9
# Of several FF only the last counts: a pattern that took all of them would try each anew.
_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_RESTARTS = [bytes((0xFF, kind)) for kind in range(0xD0, 0xD8)]
_END_OF_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)


class BadJpeg(Exception):
    """No header that libjpeg would take; the message says why."""


def read_header(data):
    """The Header of the bytes of a JPEG. Raises: BadJpeg."""
    frame, restart, exif, at = None, 0, False, 2
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, at)  # fill bytes and what is between segments are passed over, as in libjpeg
        if not found:
            break
        at = found.end()
        kind = data[at - 1]
        if kind in _ALONE:
            continue
        end = at + _length(data, at)
        segment = data[at + 2 : end]
        if kind == _SOS:
            return _header(frame, restart, exif, end, segment)
        if kind in _FRAMES:
            if frame:
                raise BadJpeg("two frames in one JPEG")
            frame = (kind, segment)
        elif kind == _DRI:
            restart = int.from_bytes(segment[:2], "big")
        elif kind == 0xE1:
            exif = exif or segment.startswith((b"Exif\0", b"http://ns.adobe.com/xap/"))
        elif kind not in _WITH_LENGTH:
            raise BadJpeg(f"a JPEG of a kind that is not read (marker {kind:02X})")
        at = end
    raise BadJpeg("a JPEG without a picture in it")


def _length(data, at):
    """Of the segment at `at`, with the two bytes that say it."""
    length = int.from_bytes(data[at : at + 2], "big")
    if length < 2 or at + length > len(data):
        raise BadJpeg("a truncated JPEG")
    return length


def _header(frame, restart, exif, scan, scan_segment):
    if not frame or len(frame[1]) < 6 or not scan_segment:
        raise BadJpeg("a JPEG without a frame")
    kind, segment = frame
    height, width = (int.from_bytes(segment[at : at + 2], "big") for at in (1, 3))
    components = segment[5]
    if not (height and width and components) or len(segment) != 6 + 3 * components or segment[0] != 8:
        raise BadJpeg("a JPEG whose frame is broken, or of more than 8 bits")
    sampling = [(segment[at] >> 4, segment[at] & 15) for at in range(7, len(segment), 3)]
    across, down = (8 * max(factors) for factors in zip(*sampling))
    if components == 1:
        across = down = 8
    if not (across and down):
        raise BadJpeg("a JPEG whose frame is broken")
    restart = 0 if kind in _LOSSLESS else restart  # counted in other units
    mcus = -(-width // across) * -(-height // down)
    all_in_one = kind not in _PROGRESSIVE and scan_segment[0] == components
    return Header(width, height, components, restart, mcus, exif, scan, all_in_one)


def count_scans(data, header, most):
    """The number of scans, each of which costs a decoder a pass over the picture; not counted beyond `most`."""
    count, at = 1, header.scan
    for _ in range(0 if header.all_in_one else MOST_SEGMENTS):
        found = _END_OF_SCAN.search(data, at)
        if not found or found[1][0] == _EOI or count >= most:
            return count
        kind, at = found[1][0], found.end()
        count += kind == _SOS
        if kind not in _ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return count if header.all_in_one else most


def lacks_restarts(data, header):
    """Whether there are fewer restart markers than a whole picture has; False where it has none."""
    if not (header.restart and header.all_in_one):
        return False
    found = _END_OF_SCAN.search(data, header.scan)
    end = found.start() if found else len(data)
    there = sum(data.count(marker, header.scan, end) for marker in _RESTARTS)
    return there < (header.mcus - 1) // header.restart
