"""What the `tokenizers` library raises, as ours. Owns that boundary only.

The library raises bare Exception for what it refuses, and a BaseException of its own (PanicException) where it fails inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from brim.errors import BrimError, TokenizerError


@contextmanager
def library_errors(what: str, advice: str) -> Iterator[None]:
    """Inside, any failure of the library becomes a TokenizerError "{what} ({reason}); {advice}."."""
    try:
        yield
    except BrimError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what} ({str(error)[:300]}); {advice}.") from error
