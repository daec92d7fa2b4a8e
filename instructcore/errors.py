"""Errors that a user can mend: shown as one line, without a traceback, by the command line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in input or settings. The message names what must hold and what was found."""
