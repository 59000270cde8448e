"""The packages that the scripts need. To be called before any of them is imported: imports nothing itself."""

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


def check(names=tuple(PACKAGES)):
    """Ends the process with one line and status 2 where a package is missing."""
    missing = [PACKAGES[name] for name in names if importlib.util.find_spec(name) is None]
    if missing:
        how = "pip install -r requirements.txt installs all that is needed; make quickstart makes a .venv with it"
        print(f"error: not installed in this Python ({sys.executable}): {', '.join(missing)}; {how}", file=sys.stderr)
        sys.exit(2)
