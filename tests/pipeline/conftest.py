"""Triton decides when it is imported whether kernels are compiled or interpreted, so this comes before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
