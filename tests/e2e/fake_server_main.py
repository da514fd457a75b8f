"""`brim serve` with the model of letters: host 127.0.0.1, any port. Arguments: the model, then settings as NAME=VALUE."""

from __future__ import annotations

import sys

from tests.e2e.command import ENGINE
from tests.unit.server.letters import LetterFront

from brim.config.resolve import resolve
from brim.server.http_server import run_server


def main(model: str, *settings: str) -> None:
    """Serve until a signal."""
    given = {"model": model, "port": "0", **dict(setting.split("=", 1) for setting in settings)}
    run_server(resolve(given), open_front=lambda _: LetterFront(), command=ENGINE)


if __name__ == "__main__":
    main(*sys.argv[1:])
