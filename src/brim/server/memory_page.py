"""The memory page at `/`: one document that needs nothing else. Owns its assembly and the headers that keep it to itself.

The page holds no figures: it asks `/memory/live`, which wants the API key where the server has one.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from fastapi import Response

PAGE_PATH = "/"
_STYLE, _SCRIPT = "/* page.css */", "/* page.js */"  # where index.html takes them in


class MemoryPage:
    """Read once. The policy allows this very style and script by their digests, requests to this server, and nothing else."""

    def __init__(self) -> None:
        folder = files("brim.server") / "page"
        style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        document = (folder / "index.html").read_text(encoding="utf-8")
        self._body = document.replace(_STYLE, style).replace(_SCRIPT, script)
        self._headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def response(self) -> Response:
        """The whole page."""
        return Response(self._body, headers=self._headers, media_type="text/html")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
