"""Where the work of a corpus is done: in this process, in processes of this machine, or on a Ray cluster.

Each engine has `submit`, which runs a function somewhere, `blocks`, which reads a compressed stream somewhere, and
`slots`: how many pieces of work run at once.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection

from data_prep.errors import UserError
from data_prep.readers.formats import Block
from data_prep.work.assembly import unread_blocks

RAY_RETRIES = 5
SMALL_BYTES = 2 << 20  # of input, for which no processes are started unless they are asked for


def open_engine(name: str, workers: int | None, ray_address: str | None, input_bytes: int, *, gpus: int = 0):
    """An engine by its name.

    Args:
        workers: processes, or tasks at a time; 0: this process; None: as many as there is room for.
        input_bytes: of the work; for little, no processes are started unless they are asked for.
        gpus: of this machine, one for each process; with Ray not 0 asks for one a task, if there are any.

    Raises:
        UserError: see `require`.
    """
    require(name, workers)
    if name == "ray":
        return RayEngine(workers, ray_address, wants_gpu=gpus > 0)
    if workers is None and input_bytes < SMALL_BYTES:
        workers = 0
    return InlineEngine() if workers == 0 else LocalEngine(workers or len(os.sched_getaffinity(0)), gpus)


def require(name: str, workers: int | None) -> None:
    """Refuse an engine that cannot be had, before anything is written.

    Raises:
        UserError: no such engine, no such number of workers, or Ray is not installed.
    """
    if workers is not None and workers < 0:
        raise UserError(f"{workers} workers: expected at least 1, or 0 to work in the process itself.")
    if name not in ("local", "ray"):
        raise UserError(f"engine {name!r}: expected local or ray.")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: `pip install minilmv2-deepspeed[ray]`.")


class InlineEngine:
    """Everything in this process, one piece after another."""

    slots = 1

    def submit(self, function: Callable, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def blocks(self, *arguments) -> Iterator[Block]:
        return unread_blocks(*arguments)

    def close(self) -> None:
        pass


class LocalEngine:
    """Processes on this machine. Threads of the coordinator, which has little else to do, read compressed streams."""

    def __init__(self, workers: int, gpus: int = 0):
        self.slots = workers
        context = multiprocessing.get_context("spawn")
        numbers = context.Queue()
        for worker in range(workers if gpus else 0):
            numbers.put(worker % gpus)
        self._pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(numbers,) if gpus else ()
        )

    def submit(self, function: Callable, *arguments) -> Future:
        return self._pool.submit(function, *arguments)

    def blocks(self, *arguments) -> Iterator[Block]:
        return unread_blocks(*arguments)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayEngine:
    """Tasks on a Ray cluster, whose nodes share the file system of the inputs and the output.

    Ray runs a task again when its worker or node dies; a task writes whole files or none, so doing it twice is
    harmless. A compressed stream is read by a task, which hands over its blocks through Ray's object store.
    """

    def __init__(self, workers: int | None, address: str | None, *, wants_gpu: bool = False):
        import ray

        self._ray = ray
        self._is_mine = not ray.is_initialized()
        if self._is_mine:
            _check_reachable(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`."
                ) from error
        resources = ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0)) if wants_gpu else 0
        self.slots = workers or max(1, self.gpus or int(resources.get("CPU", 1)))
        share = dict(num_cpus=1, num_gpus=1) if self.gpus else dict(num_cpus=1)
        self._run = ray.remote(**share, max_retries=RAY_RETRIES)(_run_on_ray)
        # A reader waits most of the time for its blocks to be taken, so it does not hold a core of its own.
        self._read = ray.remote(num_cpus=0, max_retries=RAY_RETRIES, num_returns="streaming")(_read_on_ray)

    def submit(self, function: Callable, *arguments) -> Future:
        future: Future = Future()

        def finish(done: Future) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(_plain_error(error))

        self._run.remote(function, *arguments).future().add_done_callback(finish)
        return future

    def blocks(self, *arguments) -> Iterator[object]:
        """References to blocks: Ray fetches them where they are used."""
        reader = self._read.options(_generator_backpressure_num_objects=2)
        yield from reader.remote(*arguments)

    def close(self) -> None:
        if self._is_mine:
            self._ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`.") from error


def _plain_error(error: BaseException) -> BaseException:
    """What a task raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (UserError, OSError, MemoryError)):
        return cause
    return UserError(
        f"a task failed on the Ray cluster: {error}. Everything finished is kept: run the same command again."
    )


def _run_on_ray(function: Callable, *arguments):
    _one_thread()
    return function(*arguments)


def _read_on_ray(*arguments) -> Iterator[Block]:
    yield from unread_blocks(*arguments)


def _one_thread() -> None:
    """As many workers as cores, so one thread each."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _start_worker(gpus=None) -> None:
    """No worker outlives its coordinator, which alone is interrupted by Ctrl-C; each takes a GPU of those given."""
    _one_thread()
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = gpus.get()
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
