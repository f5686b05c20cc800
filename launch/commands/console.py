"""Where tables are shown."""

import sys


def console():
    from rich.console import Console

    # Names of files and sources are shown as they are: brackets in them are no markup.
    return Console(width=None if sys.stdout.isatty() else 160, markup=False)
