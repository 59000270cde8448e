"""The packages that the scripts need. To be called before any of them is imported: imports nothing itself."""

import importlib.metadata
import importlib.util
import sys

# What is imported, and what it is called where packages are installed from.
PACKAGES = {
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "paddle": "paddlepaddle",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
# The oldest that will do, as in requirements.txt, and all names that such a package has.
OPENCV = [f"opencv-{kind}python{end}" for kind in ("", "contrib-") for end in ("-headless", "")]
LEAST = {"cv2": ((4, 11), OPENCV), "PIL": ((11, 3), ["pillow"])}


def check(names=tuple(PACKAGES)):
    """Ends the process with one line and status 2 where a package is missing or too old."""
    wrong = [PACKAGES[name] for name in names if importlib.util.find_spec(name) is None]
    what = "not installed"
    if not wrong:
        wrong, what = [text for name in names if name in LEAST for text in _too_old(*LEAST[name])], "too old"
    if wrong:
        how = "pip install -r requirements.txt installs all that is needed; make quickstart makes a .venv with it"
        print(f"error: {what} in this Python ({sys.executable}): {', '.join(wrong)}; {how}", file=sys.stderr)
        sys.exit(2)


def _too_old(least, names):
    """[what to say] of a package that is installed under one of these names, in a version below `least`."""
    found = {one.metadata["Name"]: one.version for name in names for one in importlib.metadata.distributions(name=name)}
    numbers = [tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) for version in found.values()]
    if not found or max(numbers) >= least:
        return []
    name, version = next(iter(found.items()))
    return [f"{name} {version} (needed: {'.'.join(map(str, least))})"]
