#!/usr/bin/env bash
# This file is both a shell script and a Python program, because `deepspeed launch/distill.sh` has Python run it on
# every rank. To the shell the next line is the command `:` (do nothing); to Python it opens a docstring that ends
# where the shell part ends. What follows is hidden from the shell by a here-document that nobody reads.
""":"
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
if [ -n "${LOCAL_RANK:-}" ]; then
    exec python3 -u "$self" "$@"
fi
launcher=()
recipe=()
while [ $# -gt 0 ]; do
    case $1 in
        --num_gpus | --num_nodes | --hostfile | --include | --exclude | --master_addr | --master_port | --launcher | \
            --launcher_args | --node_rank)
            launcher+=("$1" "${2?"$1 needs a value"}")
            shift
            ;;
        --num_gpus=* | --num_nodes=* | --hostfile=* | --include=* | --exclude=* | --master_addr=* | --master_port=* | \
            --launcher=* | --launcher_args=* | --node_rank=* | --no_ssh | --force_multi) launcher+=("$1") ;;
        *) recipe+=("$1") ;;
    esac
    shift
done
exec deepspeed "${launcher[@]}" "$self" "${recipe[@]}"
: <<'# end of the Python part'
"""

import sys
from pathlib import Path

# Python put this file's folder here; with the project's root in its place, no file of launch/ shadows a library.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.cli import distill_rank  # noqa: E402

if __name__ == "__main__":
    distill_rank()
# end of the Python part
