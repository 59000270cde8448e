"""Rows of pictures, a query and its neighbours, as HTML without scripts and with all pictures in it; a page of them."""

import base64
import concurrent.futures
import html

import cv2

import transforms
from utility import plain

SIDE = 160  # pixels of a picture's longer side
QUALITY = 80
THREADS = 4

START = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="infer.py">\n'
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


def write(text, found, threshold=None):
    """Writes a page of nothing else.

    Args:
        text: an open file.
        found: iterable of search.Found.
        threshold: the cosine that neighbours need, or None.
    """
    text.write(START + HEAD.format(title="Nearest pictures", style=STYLE))
    what = "Each row: a picture, then the nearest ones, with their cosines"
    what += "." if threshold is None else f"; those under {threshold:g} are left out."
    what += " Where labels are known: a green frame, whole, for the query's own class, a red one, dashed, for another."
    text.write(f"<p>{what}</p>\n")
    for query in found:
        others = [other for other in query.neighbours if threshold is None or other.cosine >= threshold]
        text.write(section(query, others, ["query", _class(query), query.path]))
    text.write("</html>\n")


def section(query, others, lines, shown=str):
    """A row of pictures.

    Args:
        query: search.Found; others: those of its neighbours that are shown.
        lines: texts under the query's picture.
        shown: function(path) -> text, what is shown of a neighbour's path.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pictures = list(pool.map(_picture, [query.path, *(other.path for other in others)]))
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


def _picture(path):
    """A small JPEG of a picture as an element of the page, or an empty field where it can't be read."""
    try:
        image = transforms.load(path)
    except transforms.BadImage as error:
        return f'<div class="none">{html.escape(plain(error))}</div>'
    height, width = image.shape[:2]
    scale = min(1, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
