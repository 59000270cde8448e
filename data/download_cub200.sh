#!/bin/sh
# Fetches CUB-200, unpacks it beside this script and writes its lists: cub200.py does all of it; --help says more.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || {
    printf "error: no Python 3.9 or later as '%s': install python3, or name yours: PYTHON=/path/to/python sh %s\n" \
        "$python" "$0" >&2
    exit 2
}
exec "$python" -- "$(dirname -- "$0")/cub200.py" "$@"
