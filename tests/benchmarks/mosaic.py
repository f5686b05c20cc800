"""Opening MosaicML's streaming library where only the CPU build of PyTorch is installed."""

import sys
import types
from importlib.machinery import ModuleSpec


def import_streaming():
    """MosaicML streaming; it imports torchvision for its image classes, which no matching build may exist for."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.VisionDataset, module.to_tensor = object, None
        sys.modules[name] = module
    for name in ("datasets", "transforms"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    import streaming

    return streaming
