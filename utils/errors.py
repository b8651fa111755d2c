"""The one exception that is shown to the user without a traceback."""


class UserError(ValueError):
    """Something that the person who started the run can put right.

    The message names the thing, what is allowed, and the way out.  ``train.py`` prints it alone and exits with code 2.
    """

    everywhere = False
    """Whether every rank has this same error, so that one of them is enough to tell it."""


def listed(problems: list[str], heading: str) -> str:
    """Join several problems to one message, so that all of them are seen in one attempt."""
    return heading + "".join(f"\n  - {problem}" for problem in problems)
