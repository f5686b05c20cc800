#!/usr/bin/env bash
# This file is both a shell script and a Python program, because `deepspeed launch/distill.sh` has Python run it on
# every rank. To the shell the next line is the command `:` (do nothing); to Python it opens a docstring that ends
# where the shell part ends. What follows is hidden from the shell by a here-document that nobody reads.
""":"
self=$(readlink -f "${BASH_SOURCE[0]}")
if [ -n "${LOCAL_RANK:-}" ]; then
    exec python3 -u "$self" "$@"
fi
exec python3 -u "$self" --launch "$@"
: <<'# end of the Python part'
"""

import sys
from pathlib import Path

# Python put this file's folder here; with the project's root in its place, no file of launch/ shadows a library.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    try:
        from launch.rank import distill_rank
        from launch.supervise import is_rank, launch
    except ModuleNotFoundError as error:
        message = f"{sys.executable} has no package {error.name}: activate the project's environment"
        print(f"distill: error: {message}", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] == ["--launch"]:
        del sys.argv[1]
        if not is_rank(sys.argv[1:]):
            sys.exit(launch(sys.argv[1:]))
    distill_rank()
# end of the Python part
