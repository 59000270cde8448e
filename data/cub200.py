"""Fetches CUB-200, unpacks it beside this script, and writes CUB200_train.txt (classes 1-100), CUB200_val.txt (101-200)
and CUB200_classes.txt there, which train.py, eval.py and infer.py read by default.

    sh data/download_cub200.sh            CUB-200 (2010), the data set of the original page: 6,033 images, 650 MB
    sh data/download_cub200.sh 2011       CUB-200-2011, another data set: 11,788 images, 1.1 GB
    python data/cub200.py 2011            the same

The lists name the edition asked for last; asking again only rewrites them, nothing is downloaded twice. A broken
download goes on where it ended when you run the script again. Without a network, put the archive beside this script
yourself (images.tgz or CUB_200_2011.tgz) and run it.

Environment:
  PYTHON         interpreter that the shell script takes (default: python3)
  CUB200_URL     as --url
  CUB200_SIZE, CUB200_SHA256, CUB200_IMAGES
                 bytes and SHA-256 of the archive and the number of its .jpg files, for another pack of the same images
  https_proxy, http_proxy, no_proxy
                 as everywhere
"""

import dataclasses
import os

import download
import split
import unpack
import utility
from utility import UserError, say


@dataclasses.dataclass(frozen=True)
class Edition:
    """One of the two data sets: its archive, the folder that all of it is in, where its pictures are below that."""

    name: str
    archive: str
    top: str
    images: str
    size: int
    sha256: str
    count: int  # of .jpg files
    homes: tuple


EDITIONS = {
    "2010": Edition(
        name="CUB-200 (2010)",
        archive="images.tgz",
        top="images",
        images="images",
        size=679421896,
        sha256="2a6d2246bbb9778ca03aa94e2e683ccb4f8821a36b7f235c0822e659d60a803e",
        count=6033,
        # The first home often gives no answer; the second asks for confirmation unless told that it is given.
        homes=(
            "http://www.vision.caltech.edu/visipedia-data/CUB-200/images.tgz",
            "https://drive.google.com/uc?export=download&id=1GDr1OkoXdhaXWGA8S3MAq3a522Tak-nx&confirm=t",
        ),
    ),
    "2011": Edition(
        name="CUB-200-2011",
        archive="CUB_200_2011.tgz",
        top="CUB_200_2011",
        images="CUB_200_2011/images",
        size=1150585339,
        sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
        count=11788,
        homes=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    ),
}


def described_by_environment(edition):
    """The edition as CUB200_SIZE, CUB200_SHA256 and CUB200_IMAGES describe it. Raises: UserError."""
    return dataclasses.replace(
        edition,
        size=download.number_from_environment("CUB200_SIZE", edition.size),
        sha256=download.from_environment("CUB200_SHA256", edition.sha256),
        count=download.number_from_environment("CUB200_IMAGES", edition.count),
    )


def count_pictures(folder):
    """The number of .jpg files below a folder, without macOS's ._ files."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(name.endswith(".jpg") and not name.startswith("._") for name in names)


def prepare(folder, edition, url=None):
    """Fetches and unpacks an edition into `folder`, unless it is there, and writes its lists.

    Args:
        url: to fetch it from there, and from nowhere else.

    Raises: UserError, OSError
    """
    archive, top = os.path.join(folder, edition.archive), os.path.join(folder, edition.top)
    if os.path.exists(top):
        say(f"{top} is here already")
    else:
        by_hand = (
            f"download {edition.homes[-1]} in a browser ({edition.size} bytes), put it at {archive} and run this again"
        )
        wanted = download.Wanted(edition.name, archive, edition.size, f"sha256:{edition.sha256}", by_hand)
        download.fetch(wanted, [url] if url else edition.homes)
        unpack.unpack(archive, top, edition.top)
        say(f"{archive} is no longer needed")
    images = os.path.join(folder, *edition.images.split("/"))
    found = count_pictures(images)
    if found != edition.count:
        raise UserError(
            f"{images} holds {found} .jpg files, not the {edition.count} of {edition.name}: other or incomplete "
            f"pictures; move {top} away and run this again"
        )
    split.split(images, folder, "CUB200", split.Division())
    if all(os.path.exists(os.path.join(folder, other.top)) for other in EDITIONS.values()):
        say(f"note: images/ and CUB_200_2011/ are both in {folder}; the lists now name the images of {edition.name}")


def main():
    parser = utility.make_parser(__doc__)
    parser.add_argument("edition", nargs="?", default="2010", help="2010 or 2011")
    parser.add_argument("--url", help="fetch it from there instead (also file:///absolute/path)")
    args, unknown = parser.parse_known_args()
    for text in ([] if args.edition in EDITIONS else [args.edition]) + unknown:
        raise UserError(f"what is {text!r}? Expected 2010 or 2011 (see --help)")
    url = args.url or os.environ.get("CUB200_URL")
    prepare(download.script_folder(__file__), described_by_environment(EDITIONS[args.edition]), url)


if __name__ == "__main__":
    download.run_script(main)
