"""Write what is generated from the code: the help texts in the docs and the snapshot of the public surface.

    python scripts/generate_docs.py            write
    python scripts/generate_docs.py --check    only compare; exit 1 and show the difference

In README.md and docs/*.md, everything between `<!-- generated: brim run --help -->` and `<!-- end generated -->` is replaced
by that command's output. The surface (exports, flags, variables, settings, HTTP routes and fields) is one JSON file that a
change of any of them changes, so that it is seen in review.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SURFACE = ROOT / "tests" / "structure" / "golden" / "public_surface.json"
CLI_PAGE = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"<!-- generated: (?P<command>brim[^\n]*?) -->\n.*?<!-- end generated -->", re.DOTALL)
WIDTH = "100"


def main() -> int:
    """Exit status: 0 where all is current (or now written), 1 where --check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="?", const="all", choices=["all", "help", "surface"], help="only compare")
    chosen = parser.parse_args()
    kind = chosen.check or "all"
    wanted: dict[Path, str] = {}
    if kind in ("all", "surface"):
        wanted[SURFACE] = json.dumps(public_surface(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if kind in ("all", "help"):
        wanted |= dict(documents())
    stale = {path: text for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    if not chosen.check:
        for path, text in stale.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    for path, text in stale.items():
        old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        name = str(path.relative_to(ROOT))
        print("\n".join(difflib.unified_diff(old, text.splitlines(), name, f"{name} (generated)", lineterm="", n=1)))
    if stale:
        print("Not current; run `make format` (scripts/generate_docs.py) and review the difference.", file=sys.stderr)
    return 1 if stale else 0


def documents() -> Iterator[tuple[Path, str]]:
    """Every page with generated blocks, as it should be; docs/cli.md as a whole."""
    for path in sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {CLI_PAGE}):
        if path.exists():
            text = path.read_text(encoding="utf-8")
            yield path, BLOCK.sub(lambda found: block(found["command"]), text)
    verbs = [
        [],
        ["run"],
        ["serve"],
        ["ps"],
        ["plan"],
        ["doctor"],
        ["bench"],
        *(["bench", name] for name in subcommands("bench")),
        ["version"],
    ]
    pages = [block(" ".join(["brim", *verb, "--help"])) for verb in verbs]
    yield CLI_PAGE, "# The command line\n\nGenerated from the code by `scripts/generate_docs.py`.\n\n" + "\n\n".join(pages) + "\n"


def block(command: str) -> str:
    """One generated block: the command and what it prints."""
    return f"<!-- generated: {command} -->\n```text\n$ {command}\n{output_of(command.split()[1:])}```\n<!-- end generated -->"


def output_of(arguments: list[str]) -> str:
    """What `brim ARGUMENTS` prints, at a fixed width."""
    from brim.cli.main import main as brim

    os.environ["COLUMNS"] = WIDTH
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        brim(arguments)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines()) + "\n"


def subcommands(name: str) -> list[str]:
    """The verbs below `brim NAME`, in order."""
    listed = output_of([name, "--help"]).split("Commands:\n")[1]
    return [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]


def public_surface() -> dict[str, Any]:
    """Everything a user may build on, by kind."""
    import brim
    from brim.config.resolve import _ALIASES, _NOT_SETTINGS, known_fields
    from brim.engine.sampling_params import SamplingParams

    settings = {name: f"{section}: {field.type}" for name, (section, field) in known_fields().items()}
    return {
        "exports": sorted(getattr(brim, "__all__", [])),
        "sampling_params": list(SamplingParams.__struct_fields__),
        "settings": settings,
        "environment": sorted(f"BRIM_{name.upper()}" for name in {*settings, *_ALIASES, *_NOT_SETTINGS}),
        "flags": {" ".join(verb): flags_of(list(verb)) for verb in verbs()},
        "http": http_surface(),
        "paths": http_paths(),
        "errors": sorted(name for name, kind in vars(brim.errors).items() if is_error(kind)),
    }


def is_error(kind: object) -> bool:
    """Whether it is one of Brim's exceptions."""
    from brim.errors import BrimError

    return isinstance(kind, type) and issubclass(kind, BrimError)


def verbs() -> list[tuple[str, ...]]:
    """Every verb with flags of its own."""
    return [("run",), ("serve",), ("ps",), ("plan",), ("doctor",), *(("bench", name) for name in subcommands("bench"))]


def flags_of(verb: list[str]) -> list[str]:
    """The long flags a verb's help lists."""
    lines = output_of([*verb, "--help"]).splitlines()
    return sorted({flag for line in lines if line.startswith("  -") for flag in re.findall(r"--[a-z][a-z-]+", line)})


def http_surface() -> dict[str, Any]:
    """Request and response types of the server with their fields."""
    try:
        from brim.server import openai_types
    except ImportError:
        return {}
    found = {}
    for name, kind in sorted(vars(openai_types).items()):
        if isinstance(kind, type) and kind.__module__ == openai_types.__name__ and not name.startswith("_"):
            found[name] = fields_of(kind)
    return {name: fields for name, fields in found.items() if fields}


def http_paths() -> list[str]:
    """Paths the server answers, as its routing names them."""
    app = ROOT / "src" / "brim" / "server" / "app.py"
    return sorted(set(re.findall(r'"(/[a-z0-9_/{}:]+)"', app.read_text(encoding="utf-8")))) if app.exists() else []


def fields_of(kind: type) -> list[str]:
    """Field names of a pydantic model, a msgspec struct or a dataclass."""
    if hasattr(kind, "model_fields"):
        return sorted(kind.model_fields)
    if hasattr(kind, "__struct_fields__"):
        return sorted(kind.__struct_fields__)
    return sorted(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else []


if __name__ == "__main__":
    sys.exit(main())
