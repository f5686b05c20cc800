"""The end of a rank that is done."""

import os
import subprocess
import sys
import textwrap

RANK = textwrap.dedent(
    """
    import atexit, sys, threading
    from launch.status import end_process
    threading.Thread(target=threading.Event().wait).start()  # of a library, which Python would wait for
    atexit.register(print, "handed over")
    print("done", end=" ")
    end_process(75)
    """
)


def test_a_rank_ends_with_its_code_and_all_that_it_wrote_whatever_its_threads_do():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.run([sys.executable, "-c", RANK], env=environment, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (75, "done handed over\n"), process.stderr
