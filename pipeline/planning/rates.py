"""How fast a device does each kind of work: of accelerators by their data sheets, of this machine by measuring it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pipeline.devices import Device

# Shares of the data sheet's peaks that whole models reach, as assumed here. None is measured by this project yet.
PRODUCTS_SHARE = 0.6
BANDWIDTH_SHARE = 0.75
EXPONENTIALS_SHARE = 0.6
LINK_SHARE = 0.7
# Between two operations that are started one after another from Python, with autograd: what a small batch waits for.
LAUNCH_SECONDS = 7e-6
# DeepSpeed's hooks for each trained tensor and micro-batch, and its step.
HOOK_SECONDS = 15e-6
STEP_SECONDS = 2e-3
# Between a device and the host's memory, and AdamW there: all ranks of a machine share it.
HOST_BYTES_A_SECOND = 15e9
# One message of a collective, a hop.
LATENCY_SECONDS = 8e-6
MEASURED_SECONDS = 0.3  # for each figure of this machine


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank does in a second.

    Attributes:
        name: of the device.
        products: operations of matrix products of ordinary size.
        narrow: the same for the products of attention and relations: of [positions, width] and [positions, positions],
            by their width; `products` for others.
        bandwidth: bytes that operations between products read and write.
        new_memory: the same for tensors of tens of megabytes, which a CPU's process gets anew each time; None: no less.
        in_cache: numbers of a block that lies in the cache, a pass over it; None: not a CPU.
        exponentials: exponentials.
        random: random numbers of dropout; None: as fast as memory.
        masks: random bits of attention's dropout, numbers of the block; None likewise.
        gelu: activations; None likewise.
        launch: seconds before an operation starts.
        link, network: bytes a second in one direction, inside of a machine and between machines.
        memory: bytes of the device.
        source: where the figures are from, in words.
    """

    name: str
    products: float
    bandwidth: float
    exponentials: float
    memory: int
    link: float
    network: float
    source: str
    narrow: dict[int, float] = field(default_factory=dict)
    new_memory: float | None = None
    in_cache: float | None = None
    random: float | None = None
    masks: float | None = None
    gelu: float | None = None
    launch: float = 0.0

    @property
    def is_cpu(self) -> bool:
        return self.in_cache is not None


def of_device(key: str, device: Device, *, half: bool, network: float) -> Rates:
    """By the data sheet and the shares above.

    Args:
        half: whether matrix products are of 16-bit numbers.
        network: bytes a second that one device sends to other machines.
    """
    peak = device.tera if half else device.tera_fp32
    return Rates(
        name=key,
        products=PRODUCTS_SHARE * peak * 1e12,
        bandwidth=BANDWIDTH_SHARE * device.bandwidth * 1e9,
        exponentials=EXPONENTIALS_SHARE * device.exponentials,
        memory=int(device.gigabytes * 1e9),
        link=LINK_SHARE * device.link * 1e9,
        network=LINK_SHARE * network,
        launch=LAUNCH_SECONDS,
        source=(
            f"{device.source}: {peak:g} TFLOP/s, {device.bandwidth:,} GB/s; of these {PRODUCTS_SHARE:.0%} and "
            f"{BANDWIDTH_SHARE:.0%} are taken as reached"
        ),
    )


def of_this_machine(
    shapes: list[tuple[int, int, int]], widths: list[int], *, positions: int, numbers: int, memory: int,
    seconds: float | None = None, clock: Callable[[], float] = time.perf_counter,
) -> Rates:  # fmt: skip
    """Measured now, with the threads that torch has.

    Args:
        shapes: (rows, inner, columns) of the models' matrix products.
        widths: of attention and relation heads.
        positions: of a sample.
        numbers: of a hidden state of a micro-batch.
        memory: bytes that a rank may use.
        seconds: for each figure; `MEASURED_SECONDS` if absent.
        clock: `time.process_time` leaves out other programs' share, on one thread.
    """

    def rate(amount: float, run: Callable[[], object]) -> float:
        """The median of several."""
        run()
        limit = MEASURED_SECONDS if seconds is None else seconds
        times, began = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < limit:
            start = clock()
            run()
            times.append(clock() - start)
        return amount / max(statistics.median(times), 1e-9)

    products = [_product(rate, *shape) for shape in _largest(shapes)]
    big, part, block = torch.rand(24 << 20), torch.rand(numbers), torch.rand(1 << 19)
    other, words = torch.rand_like(block), torch.empty(1 << 17, dtype=torch.int64)
    return Rates(
        name="this machine",
        products=sum(products) / len(products),
        narrow={width: rate(*_narrow(positions, width)) for width in sorted(set(widths))},
        bandwidth=rate(12.0 * part.numel(), lambda: torch.add(part, part)),
        new_memory=rate(12.0 * big.numel(), lambda: torch.add(big, big)),
        in_cache=rate(block.numel(), lambda: block.mul_(other)),
        exponentials=rate(block.numel(), lambda: torch.exp(other, out=block)),
        random=rate(part.numel(), lambda: part.bernoulli_(0.9)),
        masks=rate(4.0 * words.numel(), lambda: words.random_(-(2**63), None)),
        gelu=rate(part.numel(), lambda: torch.nn.functional.gelu(part)),
        memory=memory,
        link=1e9,
        network=1e9,
        source=f"measured now, {torch.get_num_threads()} threads",
    )


def _product(rate: Callable, rows: int, inner: int, columns: int) -> float:
    left, right = torch.rand(rows, inner), torch.rand(inner, columns)
    return rate(2.0 * rows * inner * columns, lambda: left @ right)


def _largest(shapes: list[tuple[int, int, int]], count: int = 4) -> list[tuple[int, int, int]]:
    return sorted(shapes, key=lambda s: s[0] * s[1] * s[2], reverse=True)[:count]


def _narrow(positions: int, width: int) -> tuple[float, Callable[[], object]]:
    """Operations of the products of a block of heads with its scores, as the loss has them, and the products."""
    n = positions
    heads = max(1, (1 << 19) // n**2)
    x, y, more = torch.rand(heads, n, width), torch.rand(heads, width, n), torch.rand(heads, n, 2 * width + 1)
    scores = torch.empty(heads, n, n)

    def run() -> None:
        torch.bmm(x, y, out=scores)
        scores @ more
        scores.transpose(1, 2) @ x

    return 2.0 * heads * n * n * (4 * width + 1), run
