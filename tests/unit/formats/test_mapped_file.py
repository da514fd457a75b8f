"""What may be mapped: regular files with something in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brim.errors import ModelNotFound
from brim.formats.mapped_file import MappedFile


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    os.mkfifo(path)
    with pytest.raises(ModelNotFound, match="not a regular file"):
        MappedFile(path)
