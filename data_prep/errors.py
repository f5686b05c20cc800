"""The one exception for mistakes that the user can mend, and the words for those that the system finds."""

import errno

# What is wrong with a path or a full disk of the user's. Anything else, such as a disk that fails, is no mistake.
_USERS_ERRNO = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_USERS_ERRNO += (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)


class UserError(Exception):
    """A mistake in what the user gave: arguments, files or settings.

    The message says what was given, what was expected and what to do. Commands print it without a traceback and
    exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's own words, or its class where it has none: for a message of ours."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def words_of(error: UserError | OSError) -> str:
    """A mistake in words; raises what is none."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno not in _USERS_ERRNO:
        raise error
    name = str(error.filename or "")
    shown = f"{name[:60]}...{name[-20:]}" if len(name) > 200 else name
    return f"{shown}: {error.strerror}" if name else f"{error.strerror}"
