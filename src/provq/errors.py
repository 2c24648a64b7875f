"""The one exception that a user's mistake raises, and the sentence that helps to mend it.

It stands below every room so that each of them can speak to the user in the same voice.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something that the user gave is wrong; the message says what, where and the nearest fix.

    The command line prints the message alone and exits with `exit_code`: 2 where the request itself was
    wrong (the shell's convention for usage), 1 where the request was right and its data was not.
    """

    exit_code = 1


class UsageError(UserError):
    """The request itself is wrong: an unknown name, a misspelt key, a value out of bounds."""

    exit_code = 2


class DivergenceError(UserError):
    """Training came to a number that is not finite."""


class CodeIndexError(UserError, IndexError):
    """An index is not that of a code."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known word, or the list of all of them."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known"
