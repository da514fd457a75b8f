"""The command `brim`. Owns the list of verbs and nothing of what they do.

`brim --help` is instant: no module imported here imports torch, fastapi or transformers; verbs import what they need when
they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from brim.cli import bench, doctor, plan, ps, run, serve
from brim.cli.errors import guarded

app = typer.Typer(
    name="brim",
    help="Brim, an LLM inference and serving engine that measures memory instead of guessing it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes before the verb.")] = False,
) -> None:
    """Brim, an LLM inference and serving engine that measures memory instead of guessing it."""


@app.command()
@guarded
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed_version

    print(f"brim {installed_version('brim')}")


app.command(name="run")(guarded(run.run))
app.command(name="serve")(guarded(serve.serve))
app.command(name="ps")(guarded(ps.ps))
app.command(name="plan")(guarded(plan.plan))
app.command(name="doctor")(guarded(doctor.doctor))
app.add_typer(bench.app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits the process."""
    app(args=list(arguments) if arguments is not None else None, prog_name="brim")
