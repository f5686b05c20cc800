"""One progress line for all workers: a bar on a terminal, plain lines in a log."""

import sys
import time

LINE_SECONDS = 30.0


class Progress:
    """Counts finished input bytes, and text, documents and tokens made from them."""

    def __init__(self, total_bytes: int, *, show: bool):
        self._total, self._done, self._text, self._documents, self._tokens = total_bytes, 0, 0, 0, 0
        self._started = self._last_line = time.monotonic()
        self._show = show
        self._bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="prepare", dynamic_ncols=True)

    def skip(self, input_bytes: int) -> None:
        """Counts work that an earlier run has done."""
        self._done += input_bytes
        if self._bar is not None:
            self._bar.initial += input_bytes
            self._bar.update(input_bytes)

    def add(self, record: dict[str, int]) -> None:
        """Counts one finished piece of work."""
        input_bytes = record.get("input_bytes", 0)
        self._done += input_bytes
        self._text += record.get("text_bytes", 0)
        self._documents += record.get("documents", 0)
        self._tokens += record.get("tokens", 0)
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(input_bytes)
        elif self._show and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._text / seconds / 1e6:.1f} MB/s text, {self._documents:,} documents, {self._tokens:,} tokens"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        share = self._done / self._total if self._total else 1.0
        left = (self._last_line - self._started) * (1 - share) / share if share else float("inf")
        print(f"prepare: {share:6.1%}, {self._rates()}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, or writes the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._show:
            self._line()
