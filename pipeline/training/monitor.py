"""What a run says while it runs: metrics.jsonl for programs, TensorBoard for people, one line for the terminal."""

import contextlib
import errno
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep import durable
from pipeline.config import flat
from pipeline.engine.deepspeed_config import MONITORS
from pipeline.training.metrics import METRICS, METRICS_BYTES, iterate_metrics, line_of, thinned


class Terminal:
    """What a job says on the terminal, by rank 0 alone: lines, and a bar or a line for its progress."""

    def __init__(self, *, total_steps: int, first_step: int, is_main: bool) -> None:
        self._total_steps, self._first_step, self._is_main = total_steps, first_step, is_main
        self._began, self._bar = time.perf_counter(), None

    def begin(self) -> None:
        """From here on time counts for what is left: steps are taken, everything is loaded."""
        self._began = time.perf_counter()
        if self._is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total_steps, initial=self._first_step, unit="step", dynamic_ncols=True)

    def progress(self, step: int, text: str) -> None:
        """Show where the job is: moves the bar on a terminal, prints a line elsewhere."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        done = step - self._first_step
        left = (time.perf_counter() - self._began) / max(1, done) * (self._total_steps - step)
        self.say(f"step {step}/{self._total_steps}  {text}  left {clock(left)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class RunLog:
    """The records of one run, written by rank 0 alone; on other ranks every method does nothing.

    Args:
        output: the run's folder.
        write_events: takes [(name, value, step)]; DeepSpeed's monitor.
        first_step: steps done before this start; records of later steps, which a crash has undone, are dropped.
        is_main: whether this is rank 0.
        say: tells the user something.
    """

    def __init__(
        self,
        output: Path,
        write_events: Callable[[list], None],
        *,
        first_step: int,
        is_main: bool,
        say: Callable[[str], None],
    ) -> None:
        self._write_events, self._is_main, self._say = write_events, is_main, say
        if not is_main:
            return
        self._path = output / METRICS
        kept = (r for r in iterate_metrics(output) if r["step"] <= first_step) if first_step else ()
        durable.write_chunks(self._path, map(line_of, kept))
        self._file = self._path.open("ab", buffering=0)
        self._most_bytes = METRICS_BYTES
        self._complained: set[str] = set()

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one record: nested dictionaries become TensorBoard tags joined by `/`."""
        if not self._is_main:
            return
        self._try(METRICS, lambda: self._append({"kind": kind, "step": step, **values}))
        numbers = [(tag, value) for tag, value in flat(values, "/") if isinstance(value, (int, float))]
        events = [(f"{kind}/{tag}", value, step) for tag, value in numbers]
        self._try("TensorBoard's events", lambda: self._write_events(events))

    def _append(self, record: dict[str, Any]) -> None:
        end, line = self._file.seek(0, os.SEEK_END), line_of(record)
        try:
            if self._file.write(line) < len(line):  # a disk that fills up takes a part without a word
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # no half line for the next one to be joined to
            raise
        if end > self._most_bytes:
            self._thin()

    def _thin(self) -> None:
        """Halve the older training records; the next time comes when the file has grown as much again."""
        self._most_bytes *= 2  # where this fails, such as on a disk without room for both files
        durable.write_chunks(self._path, map(line_of, thinned(iterate_metrics(self._path.parent))))
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self._most_bytes = max(METRICS_BYTES, 2 * self._path.stat().st_size)

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """Logging that fails does not end a training: it is said once, and tried again at the next record."""
        try:
            write()
        except Exception as error:  # whatever a library of a logger raises, often out of a thread of its own
            if what not in self._complained:
                self._say(f"warning: {what} cannot be written ({error}); training goes on")
            self._complained.add(what)

    def close(self) -> None:
        if self._is_main:
            with contextlib.suppress(OSError):
                self._file.close()


class PhaseTimer:
    """Seconds that the phases of a step take, summed until `take`; on CUDA measured by events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call. On CUDA this waits for the device: call it on logging steps only."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken


class Interval:
    """Since when throughput and waiting are counted; saving is, measuring is not."""

    def __init__(self, first_step: int, data_wait_seconds: float) -> None:
        self._first_step, self._began = first_step, time.perf_counter()
        self.data_wait_seconds = data_wait_seconds

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens meanwhile takes no time of a step."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def steps(self, step: int) -> int:
        return step - self._first_step

    def seconds_a_step(self, step: int) -> float:
        return (time.perf_counter() - self._began) / self.steps(step)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profiler(output: Path, rank: int):
    """A torch profiler of three steps, after three to warm up; its trace opens in TensorBoard or Perfetto."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(output / "profile"), worker_name=f"rank{rank}"),
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def start_monitor(config: dict[str, Any], output: Path, summary: str, first_step: int):
    """DeepSpeed's monitor: TensorBoard under `output`/tensorboard, and W&B, Comet or CSV where `config` asks for it.

    `summary` is shown in TensorBoard as a text. What earlier starts have written there of steps after `first_step`,
    which are taken again, is no longer shown.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    chosen = {name: config[name] for name in MONITORS if name in config}
    os.environ.setdefault("WANDB_DIR", str(output))  # not the folder that somebody happens to stand in
    chosen.setdefault("tensorboard", dict(enabled=True, output_path=str(output), job_name="tensorboard"))
    monitor = MonitorMaster(get_monitor_config(chosen))
    if writer := getattr(monitor.tb_monitor, "summary_writer", None):
        forget_later(writer, first_step)
        writer.add_text("recipe", summary)
    return monitor


def forget_later(writer, first_step: int) -> None:
    """Let TensorBoard drop what earlier files say of steps after `first_step`, which are taken again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    if first_step:
        begins = SessionLog(status=SessionLog.START)
        writer.file_writer.add_event(Event(step=first_step + 1, session_log=begins))
