"""`brim serve`: the OpenAI API over HTTP. Owns the flags; the server itself is `brim.server`'s."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from brim.cli.options import ALL_GROUPS, build_config, with_settings
from brim.cli.progress import ProgressLine


@with_settings(groups=ALL_GROUPS)
def serve(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, a hub id, or demo; or named in --config.")
    ] = None,
    settings: dict[str, Any],
) -> None:
    """Serve the OpenAI API over HTTP.

    Until SIGTERM or Ctrl-C; requests in flight are finished first.
    """
    config = build_config(model, settings)
    from brim.engine.launched_process import LaunchedProcess

    with LaunchedProcess() as launched, ProgressLine() as progress:  # it imports beside this process
        from brim.server.http_server import run_server

        def ready(info: Mapping[str, Any]) -> None:
            progress.clear()
            print(info.get("startup_report", ""), file=sys.stderr)

        run_server(config, on_progress=progress, on_ready=ready, launched=launched)
