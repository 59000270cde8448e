#!/bin/sh
# Fetches, checks, unpacks and splits CUB-200: see usage below. fetch and unpack serve download_imagenet2012.sh, too.

PYTHON=${PYTHON:-python3}

usage() {
    cat <<'EOF'
Fetches CUB-200, unpacks it beside this script, and writes CUB200_train.txt (classes 1-100), CUB200_val.txt (101-200)
and CUB200_classes.txt there, which train.py, eval.py and infer.py read by default.

    sh data/download_cub200.sh            CUB-200 (2010), the data set of the original page: 6,033 images, 650 MB
    sh data/download_cub200.sh 2011       CUB-200-2011, another data set: 11,788 images, 1.1 GB

The lists name the edition asked for last; asking again only rewrites them, nothing is downloaded twice. A broken
download goes on where it ended when you run the script again. Without a network, put the archive beside this script
yourself (images.tgz or CUB_200_2011.tgz) and run it.

  --url=URL      fetch it from there instead (also file:///absolute/path)
  --help         this text

Environment:
  PYTHON         interpreter for checking, unpacking and splitting (default: python3)
  CUB200_URL     as --url
  CUB200_SIZE, CUB200_SHA256, CUB200_IMAGES
                 bytes and SHA-256 of the archive and the number of its .jpg files, for another pack of the same images
EOF
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

need_python() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
        fail "no Python 3.9 or later as '$PYTHON': install python3, or name yours: PYTHON=/path/to/python sh $0"
}

# without_secrets URL: the URL without user, password and query, for messages.
without_secrets() {
    printf '%s\n' "$1" | sed 's#//[^/]*@#//#; s#[?].*##'
}

bytes_of() {
    if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# wrong_with FILE SIZE ALGORITHM:DIGEST: says what is wrong with a file, nothing if it is right. Empty SIZE: any.
wrong_with() {
    if dd if="$1" bs=512 count=1 2>/dev/null | LC_ALL=C grep -qi -e '<html' -e '<!doctype'; then
        echo "it is a web page (a login, or Google Drive asking a person to confirm)"
    elif [ -n "$2" ] && [ "$(bytes_of "$1")" != "$2" ]; then
        echo "it has $(bytes_of "$1") bytes instead of $2"
    else
        found=$("$PYTHON" - "$1" "${3%%:*}" <<'EOF'
import hashlib
import sys

digest = hashlib.new(sys.argv[2])
try:
    with open(sys.argv[1], "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    print(digest.hexdigest())
except OSError as error:
    print(f"not to be had ({error.strerror})")
except KeyboardInterrupt:
    pass
EOF
        )
        [ "$found" = "${3#*:}" ] || echo "its ${3%%:*} is ${found:-not to be had} instead of ${3#*:}"
    fi
}

# get URL FILE: downloads, going on where FILE ends. Sets `reason` where that fails.
get() {
    case $1 in
    file://*)
        reason="cannot copy it"
        cp "${1#file://}" "$2" 2>/dev/null
        return
        ;;
    esac
    # The URL goes in by standard input: it may hold a password, and arguments are seen by all users of the machine.
    restarted=
    while :; do
        before=$(bytes_of "$2") status=0 code=
        if command -v curl >/dev/null 2>&1; then
            tool=curl quiet=-s
            [ ! -t 2 ] || quiet=-#
            code=$(printf 'url = "%s"\n' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')" |
                curl -fL -C - "$quiet" --connect-timeout 15 --speed-limit 1000 --speed-time 60 -w '%{http_code}' \
                    -o "$2" -K -) || status=$?
        elif command -v wget >/dev/null 2>&1; then
            tool=wget quiet=
            [ ! -t 2 ] || ! wget --help 2>&1 | grep -q -e --show-progress || quiet=--show-progress
            # shellcheck disable=SC2086  # no argument at all where quiet is empty
            printf '%s\n' "$1" | wget -c -q $quiet -t 1 --connect-timeout=15 --read-timeout=60 --auth-no-challenge \
                -O "$2" -i - || status=$?
        else
            fail "neither curl nor wget is here: install one of them, or by hand: $by_hand"
        fi
        case $tool-$status in
        *-0) return 0 ;;
        curl-5 | curl-6) reason="host not found" ;;
        curl-7 | curl-28 | wget-4) reason="no answer" ;;
        curl-22 | wget-8) reason="HTTP error${code:+ $code}" ;;
        curl-23 | wget-3) reason="cannot write $2: is the disk full?" ;;
        *) reason="exit status $status of $tool" ;;
        esac
        if [ "$before" -gt 0 ] && [ -z "$restarted" ] && { [ "$tool-$status" = curl-33 ] || [ "$code" = 416 ]; }; then
            restarted=yes
            rm -f "$2" # this server can't go on in the middle of a file, or its own is shorter
        elif [ "$(bytes_of "$2")" -le "$before" ]; then
            return 1
        fi
    done
}

# fetch NAME FILE SIZE ALGORITHM:DIGEST BY_HAND [URL...]: FILE is there and right, or the script ends. A download from
# the first URL is FILE.part1 until it has been checked, and so on: what one server sends can't spoil another's part.
fetch() {
    name=$1 file=$2 size=$3 digest=$4 by_hand=$5
    shift 5
    if [ -e "$file" ]; then
        echo "checking $file${size:+ ($((size / 1000000)) MB)}"
        wrong=$(wrong_with "$file" "$size" "$digest")
        [ -z "$wrong" ] || fail "$file is not $name: $wrong. Remove it and run this again, or by hand: $by_hand"
        return
    fi
    [ -w "$(dirname -- "$file")" ] || fail "$(dirname -- "$file"): cannot write into this folder"
    tried='' number=0
    for url in "$@"; do
        number=$((number + 1))
        part=$file.part$number
        # Without a known size a whole file cannot be told from a broken one.
        if [ -z "$size" ] || [ "$(bytes_of "$part")" -gt "$size" ]; then rm -f "$part"; fi
        from=$(without_secrets "$url")
        begun=$(bytes_of "$part")
        echo "downloading $name from $from${size:+ ($size bytes, $begun of them are here)}"
        if [ "$begun" = "$size" ] || get "$url" "$part"; then
            echo "checking it"
            wrong=$(wrong_with "$part" "$size" "$digest")
            if [ -z "$wrong" ]; then
                mv -f "$part" "$file"
                rm -f "$file".part[0-9]
                return
            fi
            rm -f "$part"
            reason="not the right file: $wrong"
        fi
        tried="$tried$from: $reason; "
    done
    fail "could not download $name: ${tried}run this again to go on or start anew, or by hand: $by_hand"
}

# unpack ARCHIVE FOLDER TOP: the files below TOP in a tar go to FOLDER, those of a tar inside it to a folder named so.
# FOLDER appears when it is complete; until then it is FOLDER.part, and the next run goes on with it.
unpack() {
    "$PYTHON" - "$@" <<'EOF' || exit 2
import os
import shutil
import sys
import tarfile
import time
import zlib


class Refused(Exception):
    pass


def place(member, top):
    """Where a member goes below the folder; None for what is left out: folders, macOS's ._ files, what is not in top.

    Only plain files are ever written, under names checked here: no link can lead a later member elsewhere.
    """
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise Refused(f"its member {member.name!r} would be written outside the folder")
    if not (member.isreg() or member.isdir()):
        raise Refused(f"its member {member.name!r} is a link or device")
    if top and parts[:1] != [top]:
        return None
    parts = parts[1:] if top else parts
    return os.path.join(*parts) if member.isreg() and parts and not any(p.startswith("._") for p in parts) else None


def is_done(member, path):
    """Whether an earlier run has unpacked the member. A file cut short by an interruption is smaller."""
    if path.endswith(".tar"):
        return os.path.isdir(path[:-4])
    return os.path.isfile(path) and os.path.getsize(path) == member.size


def unpack(file, folder, top="", progress=False):
    part = folder + ".part"
    with tarfile.open(fileobj=file) as archive:
        placed = [(member, place(member, top)) for member in archive]
        members = [(member, os.path.join(part, path)) for member, path in placed if path]
        if not members:
            raise Refused(f"it holds no files in a folder {top!r}" if top else "it is empty")
        os.makedirs(part, exist_ok=True)
        members = [(member, path) for member, path in members if not is_done(member, path)]
        need, free = sum(member.size for member, _ in members), shutil.disk_usage(part).free
        if need > free:
            raise Refused(f"{need / 1e9:.1f} GB are needed for it, {free / 1e9:.1f} GB are free in {part}")
        done, said = 0, time.monotonic()
        for member, path in members:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.extractfile(member) as source:
                if path.endswith(".tar"):
                    unpack(source, path[:-4])
                else:
                    with open(path, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            done += member.size
            if progress and time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"  {done / need:.0%} of {need / 1e9:.1f} GB", flush=True)
    os.rename(part, folder)


path, folder, top = sys.argv[1:]
try:
    print(f"unpacking {path} into {folder}", flush=True)
    with open(path, "rb") as file:
        unpack(file, folder, top, progress=True)
except (Refused, tarfile.TarError, EOFError, zlib.error, OSError) as error:
    reason = str(error).partition("\n")[0].rstrip(":")
    sys.exit(f"error: cannot unpack {path}: {reason}")
except KeyboardInterrupt:
    sys.exit("interrupted: run this again to go on")
EOF
}

main() {
    here=$(dirname -- "$0") edition=2010 url=${CUB200_URL:-}
    trap 'exit 130' INT # bash would go on after a Python that ended in good order
    for argument in "$@"; do
        case $argument in
        -h | --help) usage && exit 0 ;;
        --url=*) url=${argument#--url=} ;;
        2010 | 2011) edition=$argument ;;
        *) fail "what is '$argument'? Expected 2010 or 2011 (see --help)" ;;
        esac
    done
    need_python

    if [ "$edition" = 2010 ]; then
        name="CUB-200 (2010)" file=$here/images.tgz top=images
        size=679421896 sha256=2a6d2246bbb9778ca03aa94e2e683ccb4f8821a36b7f235c0822e659d60a803e count=6033
        images=$here/images
        # The first home often gives no answer; the second asks for confirmation unless told that it is given.
        home=http://www.vision.caltech.edu/visipedia-data/CUB-200/images.tgz
        mirror="https://drive.google.com/uc?export=download&id=1GDr1OkoXdhaXWGA8S3MAq3a522Tak-nx&confirm=t"
    else
        name=CUB-200-2011 file=$here/CUB_200_2011.tgz top=CUB_200_2011
        size=1150585339 sha256=0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081 count=11788
        images=$here/CUB_200_2011/images
        home=https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz
        mirror=
    fi
    size=${CUB200_SIZE:-$size} sha256=${CUB200_SHA256:-$sha256} count=${CUB200_IMAGES:-$count}

    if [ -e "$here/$top" ]; then
        echo "$here/$top is here already"
    else
        by_hand="download ${mirror:-$home} in a browser ($size bytes), put it at $file and run this again"
        # shellcheck disable=SC2086  # an empty mirror is no argument
        fetch "$name" "$file" "$size" "sha256:$sha256" "$by_hand" ${url:-"$home" $mirror}
        unpack "$file" "$here/$top" "$top"
        echo "$file is no longer needed"
    fi
    found=$(($(find "$images/" -name '*.jpg' ! -name '._*' 2>/dev/null | wc -l)))
    [ "$found" -eq "$count" ] ||
        fail "$images holds $found .jpg files, not the $count of $name: other or incomplete pictures;" \
            "move $here/$top away and run this again"
    "$PYTHON" "$here/split.py" "$images" --output_dir="$here" || exit 2
    if [ -e "$here/images" ] && [ -e "$here/CUB_200_2011" ]; then
        echo "note: images/ and CUB_200_2011/ are both in $here; the lists now name the images of $name"
    fi
}

[ -n "${functions_only:-}" ] || main "$@"
