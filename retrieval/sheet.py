"""Rows of pictures, a query and its neighbours, as HTML without scripts and with all pictures in it; a page of them."""

import base64
import concurrent.futures
import html
import itertools

import cv2

import transforms
from utility import plain

SIDE = 160  # pixels of a picture's longer side
QUALITY = 80
THREADS = 4

START = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="{script}">\n'
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
"""
STYLE = """
body { font: 14px/1.3 sans-serif; margin: 8px; color: #222; background: #fff; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px;
  padding: 8px 0; border-bottom: 1px solid #ccc; }
figure { margin: 0; padding: 4px; border: 3px solid #ccc; overflow-wrap: anywhere; }
figure.query { border-color: #222; }
figure.same { border-color: #1a7f37; }
figure.other { border-color: #c62828; border-style: dashed; }
img, .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #eee; }
figcaption { font-size: 12px; }
"""


def start(script):
    """How a page begins that `script` has written: by this it is known again."""
    return START.format(script=script)


def write(text, rows, threshold, max_pixels):
    """Writes a page of nothing else.

    Args:
        text: an open file.
        rows: iterable of (search.Found, those of its neighbours that are shown).
        threshold: the cosine that they needed, or None; max_pixels: of the pictures that are read.
    """
    text.write(start("infer.py") + HEAD.format(title="Nearest pictures", style=STYLE))
    what = "Each row: a picture, then the nearest ones, with their cosines"
    what += "." if threshold is None else f"; those under {threshold:g} are left out."
    what += " Where labels are known: a green frame, whole, for the query's own class, a red one, dashed, for another."
    text.write(f"<p>{what}</p>\n")
    for query, others in rows:
        text.write(section(query, others, ["query", _class(query), query.path], max_pixels))
    text.write("</html>\n")


def section(query, others, lines, max_pixels, shown=str):
    """A row of pictures.

    Args:
        query: search.Found; others: those of its neighbours that are shown.
        lines: texts under the query's picture; max_pixels: of the pictures that are read.
        shown: function(path) -> text, what is shown of a neighbour's path.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        paths = [query.path, *(other.path for other in others)]
        pictures = list(pool.map(_picture, paths, itertools.repeat(max_pixels)))
    row = [_figure("query", pictures[0], lines)]
    for other, picture in zip(others, pictures[1:]):
        kind = {None: "", True: "same", False: "other"}[other.same]
        row.append(_figure(kind, picture, [f"{other.cosine:.3f}", _class(other), shown(other.path)]))
    if not others:
        row.append('<figure><div class="none"></div><figcaption>nothing near enough</figcaption></figure>\n')
    return "<section>\n" + "".join(row) + "</section>\n"


def _class(one):
    return one.name or ("" if one.label is None else f"class {one.label}")


def _figure(kind, picture, lines):
    caption = "<br>".join(html.escape(plain(line, 300)) for line in lines if line)
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>\n'


def _picture(path, max_pixels):
    """A small JPEG of a picture as an element of the page, or an empty field where it can't be read."""
    try:
        image = transforms.load(path, max_pixels)
    except transforms.BadImage as error:
        return f'<div class="none">{html.escape(plain(error))}</div>'
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
