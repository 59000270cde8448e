"""Draws the pictures of these pages from a quickstart run: queries and their nearest neighbours from its features, and
its report as Chromium shows it, which must be installed.

python docs/make_picture.py
"""

import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image, ImageOps

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUERIES, NEIGHBOURS, SIDE, FRAME = 5, 6, 72, 4
WINDOW = 1100, 1250
RIGHT, WRONG, QUERY = (40, 160, 60), (200, 50, 40), (120, 120, 120)


def framed(path, colour):
    """A picture with a frame: [SIDE, SIDE] pixels in all."""
    with Image.open(os.path.join(ROOT, path)) as image:
        small = image.convert("RGB").resize((SIDE - 2 * FRAME, SIDE - 2 * FRAME))
    return ImageOps.expand(small, FRAME, colour)


def draw(features, labels, paths, queries):
    """A row for each query: itself, then its nearest neighbours by cosine."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    sheet = Image.new("RGB", ((1 + NEIGHBOURS) * (SIDE + 4) + 8, len(queries) * (SIDE + 4)), "white")
    for row, query in enumerate(queries):
        similarity = unit @ unit[query]
        similarity[query] = -2
        nearest = np.argsort(-similarity)[:NEIGHBOURS]
        sheet.paste(framed(paths[query], QUERY), (0, row * (SIDE + 4)))
        for column, found in enumerate(nearest, 1):
            colour = RIGHT if labels[found] == labels[query] else WRONG
            sheet.paste(framed(paths[found], colour), (column * (SIDE + 4) + 8, row * (SIDE + 4)))
    return sheet


def photograph(browser, page, target):
    """Writes the upper part of a page as a JPEG, by headless Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        shot = os.path.join(folder, "shot.png")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/p"]
        size = ",".join(map(str, WINDOW))
        command = [browser, *flags, f"--window-size={size}", f"--screenshot={shot}", f"file://{page}"]
        subprocess.run(command, check=True, capture_output=True)
        with Image.open(shot) as image:
            small = image.convert("RGB").resize([side * 2 // 3 for side in WINDOW], Image.LANCZOS)
    small.save(target, quality=75)


def main():
    source = os.path.join(ROOT, "output_quickstart", "features.npz")
    if not os.path.exists(source):
        print(f"error: {source}: not there: make quickstart writes it", file=sys.stderr)
        sys.exit(2)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        print("error: no chromium or google-chrome here, which the second picture needs", file=sys.stderr)
        sys.exit(2)
    with np.load(source) as file:
        features, labels, paths = (file[name] for name in ("features", "labels", "paths"))
    queries = np.random.default_rng(0).choice(len(labels), QUERIES, replace=False)  # drawn, not chosen
    targets = [os.path.join(ROOT, "docs", name) for name in ("neighbours.jpg", "report.jpg")]
    draw(features, labels, paths, queries).save(targets[0], quality=85)
    photograph(browser, os.path.join(ROOT, "output_quickstart", "report.html"), targets[1])
    for target in targets:
        print(f"wrote {os.path.relpath(target)}: {os.path.getsize(target)} bytes")


if __name__ == "__main__":
    main()
