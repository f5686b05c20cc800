"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """A mistake in what the user gave: arguments, files or settings.

    The message says what was given, what was expected and what to do. Commands print it without a traceback and
    exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's own words, or its class where it has none: for a message of ours."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
