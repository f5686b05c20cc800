"""What accelerators can do, in one table.

Numbers are those of the makers' data sheets for one device, dense, without sparsity. Matrix products are of 16-bit
numbers summed in fp32. SXM (and OAM) modules, PCIe cards and NVL cards are devices of their own: they differ by up to a
third under one name.
"""

import re
from dataclasses import dataclass

from data_prep.errors import UserError

# Exponentials and the like that one multiprocessor (compute unit) finishes in a clock: four units of four lanes.
SPECIAL_FUNCTIONS_A_CLOCK = 16
# Part of a device, or a slower namesake: what the table says of it would be wrong.
_OTHERS = {"MIG", "Laptop", "D", "MaxQ", "Max-Q"}


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator.

    Attributes:
        words: that all stand in the name its driver gives it; the row with the most of them counts.
        tera: 10^12 operations a second of 16-bit matrix products.
        tera_fp32: the same in fp32 as torch computes by default, without TF32.
        gigabytes: of memory, 10^9 bytes.
        bandwidth: of memory, 10^9 bytes a second.
        units: streaming multiprocessors, or compute units.
        gigahertz: highest clock.
        link: to its neighbours in the machine, 10^9 bytes a second in one direction.
        bf16: whether it computes in bf16.
        source: the data sheet.
    """

    words: str
    tera: float
    tera_fp32: float
    gigabytes: float
    bandwidth: float
    units: int
    gigahertz: float
    link: float
    bf16: bool = True
    source: str

    @property
    def exponentials(self) -> float:
        """A second."""
        return SPECIAL_FUNCTIONS_A_CLOCK * self.units * self.gigahertz * 1e9


def _row(words, tera, tera_fp32, gigabytes, bandwidth, units, gigahertz, link, source, bf16=True) -> Device:
    return Device(
        words=words, tera=tera, tera_fp32=tera_fp32, gigabytes=gigabytes, bandwidth=bandwidth, units=units,
        gigahertz=gigahertz, link=link, source=source, bf16=bf16,
    )  # fmt: skip


_PCIE3, _PCIE4, _PCIE5 = 12.8, 25.6, 51.2  # x16 in one direction, four fifths of what the wires carry

DEVICES: dict[str, Device] = {
    # key                     driver's words     16-bit fp32   GB     GB/s  units GHz  link    source
    "gb300":            _row("GB300",            2500,  80,   288,   8000, 160, 1.92, 900,    "NVIDIA GB300 NVL72"),
    "b300-sxm":         _row("B300",             2250,  75,   270,   7700, 148, 1.92, 900,    "NVIDIA HGX B300"),
    "gb200":            _row("GB200",            2500,  80,   186,   8000, 152, 1.965, 900,   "NVIDIA GB200 NVL72"),
    "b200-sxm":         _row("B200",             2250,  75,   180,   7700, 148, 1.965, 900,   "NVIDIA DGX B200"),
    "gh200":            _row("GH200",            989,   67,   96,    4000, 132, 1.98, 450,    "NVIDIA GH200"),
    "h200-sxm":         _row("H200",             989,   67,   141,   4800, 132, 1.98, 450,    "NVIDIA H200"),
    "h200-nvl":         _row("H200 NVL",         835,   60,   141,   4800, 132, 1.785, 450,   "NVIDIA H200"),
    "h100-sxm":         _row("H100",             989,   67,   80,    3350, 132, 1.98, 450,    "NVIDIA H100"),
    "h100-nvl":         _row("H100 NVL",         835,   60,   94,    3900, 132, 1.785, 300,   "NVIDIA H100"),
    "h100-pcie":        _row("H100 PCIe",        756,   51,   80,    2000, 114, 1.755, _PCIE5, "NVIDIA H100 PCIe"),
    "h800-sxm":         _row("H800",             989,   67,   80,    3350, 132, 1.98, 200,    "NVIDIA H800"),
    "h800-pcie":        _row("H800 PCIe",        756,   51,   80,    2000, 114, 1.755, _PCIE5, "NVIDIA H800 PCIe"),
    "h20-sxm":          _row("H20",              148,   44,   96,    4000, 78,  1.98, 450,    "NVIDIA H20"),
    "a100-sxm-80gb":    _row("A100",             312,   19.5, 80,    2039, 108, 1.41, 300,    "NVIDIA A100"),
    "a100-sxm-40gb":    _row("A100 SXM4 40GB",   312,   19.5, 40,    1555, 108, 1.41, 300,    "NVIDIA A100"),
    "a100-pcie-80gb":   _row("A100 80GB PCIe",   312,   19.5, 80,    1935, 108, 1.41, _PCIE4, "NVIDIA A100"),
    "a100-pcie-40gb":   _row("A100 PCIE 40GB",   312,   19.5, 40,    1555, 108, 1.41, _PCIE4, "NVIDIA A100"),
    "a800-sxm":         _row("A800",             312,   19.5, 80,    2039, 108, 1.41, 200,    "NVIDIA A800"),
    "a40":              _row("A40",              149.7, 37.4, 48,    696,  84,  1.74, _PCIE4, "NVIDIA A40"),
    "a30":              _row("A30",              165,   10.3, 24,    933,  56,  1.44, _PCIE4, "NVIDIA A30"),
    "a10":              _row("A10",              125,   31.2, 24,    600,  72,  1.695, _PCIE4, "NVIDIA A10"),
    "a10g":             _row("A10G",             70,    31.5, 24,    600,  80,  1.71, _PCIE4, "NVIDIA A10G"),
    "l40s":             _row("L40S",             362,   91.6, 48,    864,  142, 2.52, _PCIE4, "NVIDIA L40S"),
    "l40":              _row("L40",              181,   90.5, 48,    864,  142, 2.49, _PCIE4, "NVIDIA L40"),
    "l4":               _row("L4",               121,   30.3, 24,    300,  58,  2.04, _PCIE4, "NVIDIA L4"),
    "rtx-6000-ada":     _row("RTX 6000 Ada",     364,   91.1, 48,    960,  142, 2.505, _PCIE4, "NVIDIA RTX 6000 Ada"),
    "rtx-a6000":        _row("RTX A6000",        154.8, 38.7, 48,    768,  84,  1.8,  _PCIE4, "NVIDIA RTX A6000"),
    "rtx-5090":         _row("RTX 5090",         209.5, 104.8, 32,   1792, 170, 2.41, _PCIE5, "NVIDIA RTX Blackwell"),
    "rtx-4090":         _row("RTX 4090",         165.2, 82.6, 24,    1008, 128, 2.52, _PCIE4, "NVIDIA Ada"),
    "rtx-3090":         _row("RTX 3090",         71,    35.6, 24,    936,  82,  1.695, _PCIE4, "NVIDIA GA102"),
    "v100-sxm":         _row("V100",             125,   15.7, 32,    900,  80,  1.53, 150,    "NVIDIA V100", False),
    "t4":               _row("T4",               65,    8.1,  16,    320,  40,  1.59, _PCIE3, "NVIDIA T4", False),
    "mi355x":           _row("MI355X",           2516,  157,  288,   8000, 256, 2.4,  537,    "AMD Instinct MI355X"),
    "mi325x":           _row("MI325X",           1307,  163,  256,   6000, 304, 2.1,  448,    "AMD Instinct MI325X"),
    "mi300x":           _row("MI300X",           1307,  163,  192,   5300, 304, 2.1,  448,    "AMD Instinct MI300X"),
}  # fmt: skip


def named(key: str) -> Device:
    """The device of a key; a UserError names those there are."""
    if key not in DEVICES:
        raise UserError(f"the device {key!r} is not in the table; known are {', '.join(DEVICES)}, and this-machine")
    return DEVICES[key]


def recognised(driver_name: str) -> Device | None:
    """The device of the name that its driver gives it; None for one that is not in the table."""
    words = set(re.split(r"[\s_-]+", driver_name))
    rows = [device for device in DEVICES.values() if set(device.words.split()) <= words]
    if not rows or words & _OTHERS:
        return None
    return max(rows, key=lambda device: len(device.words.split()))
