"""Draws imaginary bird species: the sample data on which quickstart.py trains, without any download.

    python data/make_sample.py                           96 species, 20 pictures of each, in data/sample
    python data/make_sample.py --output_dir=/tmp/birds --species=48 --size=160

It writes the layout of CUB, images/NNN.Name/Name_0001.jpg and so on, then birds_train.txt, birds_val.txt and
birds_classes.txt as data/split.py does (the first half of the species trains, the others are unseen), and sample.json
with the traits of every species.

The birds come in families that wear the same four colours: a species is told by where its colours sit, by its bill,
tail, crest, wing and face, not by which colours it has. Any two species differ in at least two traits. The same flags
give the same bytes again.
"""

import concurrent.futures
import contextlib
import io
import json
import math
import os
import re
import signal
import stat
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import packages

packages.check(("numpy", "cv2"))
import cv2
import numpy as np

import files
from runtime import process
from split import Division, split
from utility import UserError, make_parser, number, parse_typed, say

RANGES = {"species": (2, 200), "images": (2, 9999), "size": (32, 1024), "seed": (0, 2**31 - 1)}
MARK = "sample.json"  # says that a folder is a sample, and which files in it are ours
MOST_MARK = 1 << 20  # bytes; that of 200 species has 60,000
LISTS = ("birds_train.txt", "birds_val.txt", "birds_classes.txt")
EARLIER_LISTS = ("CUB200_train.txt", "CUB200_val.txt", "CUB200_classes.txt")  # the same in a sample of an older version
LEFTOVERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file viewers leave in folders that they show

# ---------------------------------------------------------------- species

COLOURS = {
    "White": (238, 236, 228), "Black": (38, 38, 44), "Grey": (140, 146, 152), "Russet": (178, 84, 36),
    "Scarlet": (206, 40, 44), "Golden": (240, 198, 48), "Olive": (112, 134, 48), "Teal": (30, 150, 146),
    "Azure": (52, 108, 206), "Violet": (124, 76, 168), "Rose": (232, 138, 158), "Umber": (104, 72, 48),
}  # fmt: skip
# Each species of a family wears all four colours of it.
FAMILIES = (
    ("Azure", "Golden", "White", "Black"), ("Scarlet", "Grey", "Black", "White"), ("Olive", "Golden", "Violet", "Rose"),
    ("Violet", "White", "Teal", "Umber"), ("Russet", "Grey", "White", "Azure"), ("Teal", "Rose", "Black", "Golden"),
)  # fmt: skip
COLOURED = ("crown", "back", "breast", "bars")  # face marks have the colour of the wing bars
SHAPES = {
    "wing": ("one bar", "two bars", "patch"),
    "face": ("plain", "eye ring", "eye stripe"),
    "crest": ("none", "peaked", "swept"),
    "bill": ("cone", "needle", "hook", "spatula", "sickle"),
    "tail": ("forked", "fan", "pointed", "long", "short"),
}
NOUNS = {
    "cone": ("Seedcracker", "Grainling"), "needle": ("Needlebill", "Nectarling"), "hook": ("Hookbill", "Thornwing"),
    "spatula": ("Spoonling", "Paddlebill"), "sickle": ("Sicklebill", "Mossprobe"), "forked": ("Forktail", "Skydart"),
    "fan": ("Fantail", "Flitterling"), "pointed": ("Wedgetail", "Arrowling"), "long": ("Streamertail", "Ribbonbird"),
    "short": ("Stubtail", "Bobbin"),
}  # fmt: skip
PARTS = {"crown": ("crowned", "capped"), "back": ("backed", "mantled"), "breast": ("breasted", "bellied")}


def draw_species(count, seed):
    """-> list of dicts: name, and a value for each of COLOURED and SHAPES; any two differ in at least two traits."""
    rng = np.random.default_rng(seed)
    species, names = [], set()
    while len(species) < count:
        colours = rng.permutation(FAMILIES[len(species) % len(FAMILIES)])
        traits = {part: str(colour) for part, colour in zip(COLOURED, colours)}
        traits.update((trait, values[rng.integers(len(values))]) for trait, values in SHAPES.items())
        if any(sum(traits[trait] != other[trait] for trait in traits) < 2 for other in species):
            continue
        adjectives = [f"{traits[part]}_{word}" for part, words in PARTS.items() for word in words]
        nouns = NOUNS[traits["tail"]] + NOUNS[traits["bill"]]
        free = [f"{a}_{noun}" for a in adjectives for noun in nouns if f"{a}_{noun}" not in names]
        if free:  # else every name that tells something of these traits is taken: draw others
            name = free[rng.integers(len(free))]
            names.add(name)
            species.append({"name": name, **traits})
    return species


# ---------------------------------------------------------------- shapes of a bird that faces right, y down

BODY = [(0.86, -0.1), (0.72, 0.32), (0.25, 0.6), (-0.35, 0.52), (-1.0, 0.08), (-0.55, -0.3), (0.1, -0.5), (0.6, -0.48)]
WING = [(0.1, -0.06), (0.0, 0.3), (-0.6, 0.42), (-1.5, 0.3), (-0.95, -0.1), (-0.35, -0.22)]  # from the shoulder back
WING_MARKS = {
    "one bar": [[(-0.38, -0.2), (-0.62, -0.16), (-0.78, 0.4), (-0.5, 0.4)]],
    "two bars": [
        [(-0.16, -0.17), (-0.34, -0.2), (-0.42, 0.37), (-0.22, 0.34)],
        [(-0.64, -0.15), (-0.82, -0.11), (-0.98, 0.4), (-0.76, 0.41)],
    ],
    "patch": [[(-0.95, 0.36), (-1.5, 0.3), (-1.0, -0.06), (-0.8, 0.12)]],
}
# Head and what is on it: the origin is its centre, 1 is its radius.
CRESTS = {"peaked": [(0.5, -0.8), (-0.35, -1.95), (-0.75, -0.6)], "swept": [(0.0, -0.98), (-1.9, -0.95), (-0.95, -0.1)]}
BILLS = {
    "cone": [(0.75, -0.5), (1.7, 0.12), (0.75, 0.5)],
    "needle": [(0.8, -0.2), (2.8, 0.02), (0.8, 0.24)],
    "hook": [(0.75, -0.48), (1.5, -0.4), (1.85, 0.05), (1.72, 0.62), (1.45, 0.18), (0.75, 0.3)],
    "spatula": [(0.8, -0.2), (1.7, -0.14), (2.15, -0.46), (2.55, 0.02), (2.15, 0.5), (1.7, 0.18), (0.8, 0.24)],
    "sickle": [(0.75, -0.3), (1.6, -0.2), (2.25, 0.35), (2.4, 1.1), (2.0, 0.6), (1.5, 0.16), (0.75, 0.22)],
}
STRIPE = [(0.95, -0.24), (0.3, -0.36), (-0.9, -0.2), (-0.92, 0.16), (0.3, 0.14), (0.95, 0.06)]
# Tails: the origin is the rump.
TAILS = {
    "forked": [(0.25, -0.2), (-1.3, -0.52), (-0.62, 0.0), (-1.3, 0.52), (0.25, 0.2)],
    "fan": [(0.25, -0.16), (-0.75, -0.66), (-1.0, -0.34), (-1.1, 0.0), (-1.0, 0.34), (-0.75, 0.66), (0.25, 0.16)],
    "pointed": [(0.25, -0.26), (-0.5, -0.3), (-1.3, 0.0), (-0.5, 0.3), (0.25, 0.26)],
    "long": [(0.25, -0.13), (-1.8, -0.15), (-1.85, 0.13), (0.25, 0.13)],
    "short": [(0.25, -0.2), (-0.5, -0.26), (-0.5, 0.26), (0.25, 0.2)],
}
HORN, LEG, PUPIL = (226, 150, 62), (150, 96, 60), (18, 16, 18)


def curve(points):
    """The closed Catmull-Rom curve through [N, 2] points -> [N * 6, 2]."""
    p1 = np.asarray(points, np.float64)[:, None]
    p0, p2, p3 = (np.roll(p1, shift, axis=0) for shift in (1, -1, -2))
    t = (np.arange(6) / 6)[None, :, None]
    cubic = (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    return ((2 * p1 + (p2 - p0) * t + cubic) / 2).reshape(-1, 2)


def move(points, place=(0.0, 0.0), angle=0.0, scale=1.0):
    """Scales, turns (clockwise, in degrees) and shifts points."""
    c, s = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    return np.asarray(points, np.float64) @ np.array([[c, s], [-s, c]]) + place


def circle(x, y, radius):
    angle = np.arange(24) * (2 * math.pi / 24)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def bird_parts(traits, rng):
    """-> list of (points [N, 2], RGB colour), the hindmost first; the two feet [2, 2]. One unit is half a body."""
    # No two birds of a species have quite the same colours.
    dress = {part: tuple(c + rng.uniform(-9, 9) for c in COLOURS[traits[part]]) for part in COLOURED}
    dark = {part: tuple(0.8 * c for c in colour) for part, colour in dress.items()}
    tilt = rng.uniform(-48, 6)
    body = curve(np.array(BODY) * (1, rng.uniform(0.9, 1.15)))
    parts = []

    def add(points, colour):
        parts.append((move(points, angle=tilt), colour))

    tail, angle, scale = np.array(TAILS[traits["tail"]]), rng.uniform(-16, 14), rng.uniform(0.9, 1.1)
    add(move(tail, (-0.95, 0.1), angle, scale), dark["back"])
    for share in (-0.5, 0.5):  # the edges of two feathers
        end = tail[:, 0].min() * 0.8
        edge = [(0.0, 0.1 * share), (end, 0.42 * share), (end, 0.32 * share)]
        add(move(edge, (-0.95, 0.1), angle, scale), tuple(0.8 * c for c in dark["back"]))
    add(body, dress["back"])
    add(np.concatenate([body[:30], [(-0.55, 0.2), (0.0, 0.12), (0.5, -0.05), (0.8, -0.4)]]), dress["breast"])

    shoulder, wing_angle = (0.38 + rng.uniform(-0.05, 0.05), -0.1), rng.uniform(-12, 10)
    add(move(curve(WING), shoulder, wing_angle), dark["back"])
    for mark in WING_MARKS[traits["wing"]]:
        add(move(mark, shoulder, wing_angle), dress["bars"])

    neck = rng.uniform(0.0, 0.12)
    head, nod = move([(0.66 + neck, -0.6 - neck)], angle=tilt)[0], rng.uniform(-24, 20) + 0.35 * tilt
    radius = 0.5 * rng.uniform(0.95, 1.08)

    def add_head(points, colour):
        parts.append((move(points, head, nod, radius), colour))

    add_head(BILLS[traits["bill"]], HORN)
    if traits["crest"] != "none":
        add_head(CRESTS[traits["crest"]], dress["crown"])
    add_head(circle(0, 0, 1), dress["breast"])
    add_head(np.concatenate([circle(0, 0, 1.02)[10:], [(0.86, -0.2), (0.2, 0.08), (-0.5, 0.2)]]), dress["crown"])
    if traits["face"] == "eye stripe":
        add_head(STRIPE, dress["bars"])
    if traits["face"] == "eye ring":
        add_head(circle(0.36, -0.14, 0.44), dress["bars"])
    add_head(circle(0.36, -0.14, 0.23), PUPIL)
    add_head(circle(0.43, -0.22, 0.08), (245, 245, 245))

    feet = move([(-0.02, 0.5), (0.28, 0.5)], angle=tilt) + (rng.uniform(-0.05, 0.05), 0.42)
    for foot in feet:
        hip = (foot[0] - 0.02, foot[1] - 0.55)
        parts.insert(0, (np.array([hip, (hip[0] + 0.07, hip[1]), (foot[0] + 0.05, foot[1]), foot]), LEG))
    return parts, feet


# ---------------------------------------------------------------- pictures

# top colour, bottom colour, colours of blurred spots, how many, their size in shares of the picture, how flat
SCENES = (
    ((96, 150, 214), (200, 220, 236), ((240, 244, 248),), 7, 0.16, 0.4),  # sky and clouds
    ((46, 84, 42), (30, 58, 34), ((92, 138, 62), (60, 106, 48), (150, 178, 92)), 46, 0.08, 0.8),  # leaves
    ((128, 160, 176), (48, 92, 122), ((170, 196, 206), (70, 116, 140)), 30, 0.16, 0.1),  # water
    ((190, 202, 216), (236, 240, 246), ((250, 252, 255), (168, 182, 200)), 20, 0.1, 0.5),  # snow
    ((96, 74, 124), (240, 166, 108), ((250, 204, 150), (140, 92, 124)), 8, 0.22, 0.2),  # dusk
    ((150, 180, 110), (84, 130, 56), ((236, 208, 80), (226, 130, 160), (240, 240, 236)), 24, 0.035, 1.0),  # meadow
    ((150, 96, 50), (96, 60, 38), ((206, 136, 54), (178, 84, 44), (220, 176, 90)), 40, 0.08, 0.8),  # autumn
    ((150, 146, 140), (110, 106, 102), ((170, 164, 156), (92, 90, 90)), 16, 0.12, 0.6),  # rock wall
)


def fill(image, points, colour):
    """Fills a polygon with smooth edges, its points being in pixels."""
    cv2.fillPoly(image, [np.rint(points * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)


def draw_scene(rng, size):
    """A background out of focus -> uint8 [size, size, 3]."""
    top, bottom, spots, count, extent, flat = SCENES[rng.integers(len(SCENES))]
    small = size // 4  # blurred anyway
    ramp = np.linspace(0, 1, small)[:, None, None]
    image = np.ascontiguousarray(np.broadcast_to((1 - ramp) * top + ramp * bottom, (small, small, 3)).astype(np.uint8))
    for _ in range(count):
        x, y, radius = *rng.uniform(0, small, 2), small * extent * rng.uniform(0.5, 1.5)
        fill(image, circle(0, 0, radius) * (1, flat) + (x, y), spots[rng.integers(len(spots))])
    image = cv2.GaussianBlur(image, (0, 0), small * rng.uniform(0.012, 0.03))
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_perch(image, foot, unit, rng):
    """Draws what the bird stands on: a branch, a post or a stone."""
    size, (x, y) = len(image), foot
    thick, slope, kind = unit * rng.uniform(0.12, 0.22), rng.uniform(-0.25, 0.25), rng.integers(4)
    wood = tuple(rng.uniform(0.7, 1.3) * c for c in (104, 78, 58))
    if kind == 0:
        wide, high = unit * rng.uniform(0.9, 1.4) + 0.5 * (size - y), size - y + 0.4 * unit
        stone = circle(0, 0, 1) * (wide, high) + (x, y + high) + rng.uniform(-0.05, 0.05, (24, 2)) * unit
        fill(image, stone, tuple(rng.uniform(0.6, 1.2) * c for c in rng.uniform(110, 130, 3)))
    elif kind == 1:
        half = unit * rng.uniform(0.3, 0.5)
        for left, light in ((-1, 1.0), (0.4, 0.8)):  # the post and its shaded side
            edge = [(x + half * left, y), (x + half, y), (x + half, size), (x + half * left, size)]
            fill(image, np.array(edge), tuple(light * c for c in wood))
    else:
        left, right = y - slope * x, y + slope * (size - x)
        branch = [(0, left), (size, right), (size, right + 0.6 * thick), (0, left + 1.3 * thick)]
        fill(image, np.array(branch), wood)
        for at in rng.uniform(0, size, rng.integers(6)):
            leaf = move(circle(0.5, 0, 0.5) * (1, 0.4), (at, y + slope * (at - x)), rng.uniform(0, 360), unit * 0.55)
            fill(image, leaf, tuple(rng.uniform(0.7, 1.3) * c for c in (84, 128, 52)))


def draw_picture(traits, rng, size):
    """One bird of a species -> uint8 RGB [size, size, 3]."""
    full = 2 * size  # reduced at the end, which smooths edges
    image = draw_scene(rng, full)
    parts, feet = bird_parts(traits, rng)
    outline = np.concatenate([points for points, _ in parts])
    low, high = outline.min(axis=0), outline.max(axis=0)
    unit = full * rng.uniform(0.8, 0.98) / max(high - low)
    place = full / 2 + rng.uniform(-0.5, 0.5, 2) * (full - unit * (high - low)) - unit * (low + high) / 2
    facing = np.array([1 if rng.integers(2) else -1, 1])
    place[0] = place[0] if facing[0] > 0 else full - place[0]

    draw_perch(image, feet.mean(axis=0) * facing * unit + place, unit, rng)
    bird, mask = image.copy(), np.zeros((full, full), np.uint8)
    for points, colour in parts:
        pixels = points * facing * unit + place
        fill(bird, pixels, tuple(min(max(c, 0), 255) for c in colour))
        fill(mask, pixels, 255)

    # The bird is round: brighter towards the light, darker away from it; and its plumage is not quite even.
    light = round(0.3 * unit), round(rng.uniform(-0.3, 0.3) * unit)
    soft = cv2.GaussianBlur(mask, (0, 0), 0.22 * unit).astype(np.float32)
    shifted = np.roll(soft, light, axis=(0, 1))
    plumage = cv2.resize(rng.uniform(-0.07, 0.07, (size // 2, size // 2)).astype(np.float32), (full, full))
    shade = 1 + (soft - shifted) * np.float32(rng.uniform(0.4, 0.8) / 255) + plumage
    alpha = (mask.astype(np.float32) / np.float32(255))[..., None]
    image = image * (1 - alpha) + bird * (shade[..., None] * alpha)
    return expose(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), rng)


def expose(image, rng):
    """Light of the day, shadow and grain: float32 RGB [S, S, 3] -> uint8."""
    size = len(image)
    gain = rng.uniform(0.78, 1.15) * rng.uniform(0.94, 1.06, 3)
    shadow = np.zeros((size, size), np.float32)
    if rng.integers(2):  # of something outside of the picture
        edge = [(-1, -1), (rng.uniform(-1, 2), -1), (rng.uniform(-1, 2), 2), (-1, 2)]
        fill(shadow, np.array(edge) * size, rng.uniform(0.15, 0.35))
        shadow = cv2.GaussianBlur(shadow, (0, 0), size * 0.05)
    grain = rng.normal(0, rng.uniform(1, 4), image.shape).astype(np.float32)
    image = image * gain.astype(np.float32) * (1 - shadow[..., None]) + rng.uniform(-10, 14) + grain
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


# ---------------------------------------------------------------- files


def species_folder(number, name):
    return os.path.join("images", f"{number:03d}.{name}")


def picture_paths(names, images):
    """-> list of (species, image, path below the sample's folder), both counted from 1."""
    return [
        (s, i, os.path.join(species_folder(s, name), f"{name}_{i:04d}.jpg"))
        for s, name in enumerate(names, 1)
        for i in range(1, images + 1)
    ]


def read_mark(folder):
    """What sample.json says: -> (dict folder of a species -> its name, pictures of each species).

    Raises: OSError, ValueError, KeyError, TypeError.
    """
    path = os.path.join(folder, MARK)
    if os.path.getsize(path) > MOST_MARK:
        raise ValueError
    sample = files.read_json(path)
    names, images = [bird["name"] for bird in sample["species"]], sample["images"]
    for key, value in (("species", len(names)), ("images", images)):
        if type(value) is not int or not RANGES[key][0] <= value <= RANGES[key][1]:
            raise ValueError
    return {species_folder(number, name): name for number, name in enumerate(names, 1)}, images


def foreign_file(folder):
    """What keeps a folder from being a sample of ours that may be deleted: a path in it, or None. Raises: OSError."""
    try:
        names, images = read_mark(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return os.path.join(folder, MARK) + " (missing or unreadable)"
    earlier = not any(os.path.lexists(os.path.join(folder, name)) for name in LISTS)
    ours = {MARK, *(EARLIER_LISTS if earlier else LISTS)}

    def is_ours(path):
        inside, name = os.path.split(path)
        number = re.fullmatch(r"(.*)_([0-9]{4})\.jpg", name, re.DOTALL)
        picture = number and number[1] == names.get(inside) and 1 <= int(number[2]) <= images
        return path in ours or name in LEFTOVERS or picture

    def stop(error):  # what can't be seen is not known to be ours
        raise error

    for root, folders, others in os.walk(folder, onerror=stop):
        below = os.path.relpath(root, folder)
        known = below in (os.curdir, "images") or below in names
        for name in others + folders:
            path, inside = os.path.join(root, name), os.path.normpath(os.path.join(below, name))
            mode = os.lstat(path).st_mode
            if not stat.S_ISDIR(mode) and not (known and stat.S_ISREG(mode) and is_ours(inside)):
                return path
        if not known and not folders:
            return root
    return None


def write_sample(folder, species, images, size, seed):
    """Writes pictures, lists and sample.json into a new folder. Raises: OSError, UserError."""
    paths = picture_paths([traits["name"] for traits in species], images)

    def write(s, i, path):
        rng = np.random.default_rng([seed, s, i])  # of its own: the order of drawing changes nothing
        picture = cv2.cvtColor(draw_picture(species[s - 1], rng, size), cv2.COLOR_RGB2BGR)
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 96))])[1]
        with open(os.path.join(folder, path), "wb") as file:
            file.write(jpeg.tobytes())

    for part in {os.path.dirname(path) for _, _, path in paths}:
        os.makedirs(os.path.join(folder, part))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, *zip(*paths)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        split(folder, folder, "birds", Division())
    with open(os.path.join(folder, MARK), "w", encoding="utf-8", newline="\n") as file:
        json.dump({"seed": seed, "size": size, "images": images, "species": species}, file, indent=1)


def make_sample(output_dir, species, images, size, seed, overwrite):
    """Makes the sample beside its place and moves it there. Raises: OSError, UserError."""
    target = os.path.realpath(output_dir)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UserError(f"{output_dir}: is a file: name a folder with --output_dir")
    if os.path.isdir(target) and os.listdir(target):
        if not overwrite:
            raise UserError(
                f"{output_dir}: is not empty: --overwrite makes a sample anew, --output_dir names another folder"
            )
        foreign = foreign_file(target)
        if foreign:
            raise UserError(f"{output_dir}: not deleted, for not all of it comes from this script: {foreign}")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with files.temporary_folder(target) as new:
        write_sample(new, draw_species(species, seed), images, size, seed)
        files.replace_folder(new, target)


def main():
    default = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample"))
    parser = make_parser(__doc__)
    add = parser.add_argument
    types = {name: number(int, low=low, high=high) for name, (low, high) in RANGES.items()}
    add("--output_dir", default=default, help="folder to make")
    add("--species", type=types["species"], default=96, help="how many, 2 to 200; half of them train")
    add("--images", type=types["images"], default=20, help="pictures of each species, 2 to 9999")
    add("--size", type=types["size"], default=96, help="pixels of a side, 32 to 1024; the birds stay the same")
    add("--seed", type=types["seed"], default=0, help="another seed draws other species and other pictures")
    add("--overwrite", action="store_true", help="replace an earlier sample; a folder with other files is left alone")
    args, _ = parse_typed(parser)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is half drawn goes
    try:
        make_sample(args.output_dir, args.species, args.images, args.size, args.seed, args.overwrite)
    except OSError as error:
        raise UserError(f"{args.output_dir}: cannot write there: {error.strerror or error}") from None
    total = args.species * args.images
    say(f"drew {total} birds, {args.images} of each of {args.species} species, in {args.output_dir}")


if __name__ == "__main__":
    process.run_script(main)
