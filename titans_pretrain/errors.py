"""What a user can get wrong: one exception, one sentence, exit code 1."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: the text says what is wrong, which values disagree and the key or flag to change."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command's `main`: a `UserError` becomes one line on stderr and exit code 1, never a traceback."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if os.environ.get("TITANS_TRACEBACK"):  # for developers: where the sentence came from
                raise
            sys.exit(1)

    return run
