#!/bin/sh
# Prepares ImageNet (ILSVRC2012) from its official files: ../imagenet2012.py does all of it; --help says more.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || {
    printf "error: no Python 3.9 or later as '%s': install python3, or name yours: PYTHON=/path/to/python sh %s\n" \
        "$python" "$0" >&2
    exit 2
}
exec "$python" -- "$(dirname -- "$0")/../imagenet2012.py" "$@"
