"""Triton decides when it is imported whether kernels are compiled or interpreted, so this comes before any import."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
