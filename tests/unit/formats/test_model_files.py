"""Finding a model: what is accepted, and that every miss says what to do."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from brim.errors import BrokenModel, ModelNotFound, UnsupportedModel
from brim.formats.cache_folder import cache_folder
from brim.formats.demo_model import demo_model
from brim.formats.model_files import open_weights, resolve_model

Write = Callable[[str, bytes], Path]
_PACKAGE = "brim_test_demo_parts"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the demo model's package, in two parts."""
    chunks = [tmp_path / "part0", tmp_path / "part1"]
    chunks[0].write_bytes(b"GGUF")
    chunks[1].write_bytes(b"rest")
    module = types.ModuleType(_PACKAGE)
    module.chunk_paths = lambda: chunks  # type: ignore[attr-defined]
    module.EXPECTED_SHA256 = hashlib.sha256(b"GGUFrest").hexdigest()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, _PACKAGE, module)
    return chunks


def test_demo_is_joined_once(tmp_path: Path, parts: list[Path]) -> None:
    folder = tmp_path / "cache" / "models"
    path = demo_model(folder, _PACKAGE)
    assert path.read_bytes() == b"GGUFrest"
    parts[0].unlink()  # a second start needs neither parts nor package
    assert demo_model(folder, "brim_test_no_such_package") == path
    assert sorted(file.suffix for file in folder.iterdir()) == [".gguf", ".json"]


def test_changed_demo_is_joined_again(tmp_path: Path, parts: list[Path]) -> None:
    folder = tmp_path / "models"
    demo_model(folder, _PACKAGE).write_bytes(b"short")
    assert demo_model(folder, _PACKAGE).read_bytes() == b"GGUFrest"
    (folder / "gemma-3-270m-q4_k_m.gguf.stamp.json").write_text("not json")
    assert demo_model(folder, _PACKAGE).read_bytes() == b"GGUFrest"


def test_demo_failures_say_what_to_do(tmp_path: Path, parts: list[Path]) -> None:
    with pytest.raises(ModelNotFound, match=r"pip install 'brim\[demo\]'"):
        demo_model(tmp_path / "a", "brim_test_no_such_package")
    parts[1].write_bytes(b"REST")
    with pytest.raises(BrokenModel, match="damaged"):
        demo_model(tmp_path / "b", _PACKAGE)
    assert list((tmp_path / "b").iterdir()) == []
    parts[1].unlink()
    with pytest.raises(BrokenModel, match="lacks"):
        demo_model(tmp_path / "c", _PACKAGE)
    with pytest.raises(ModelNotFound, match="BRIM_CACHE_DIR"):
        demo_model(parts[0] / "not-a-folder", _PACKAGE)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/brim")
    monkeypatch.setenv("BRIM_CACHE_DIR", "/y")
    assert cache_folder() == Path("/y")


def test_gguf_file(write: Write, good_gguf: bytes) -> None:
    path = write("tiny.gguf", good_gguf)
    files = resolve_model(str(path))
    assert (files.kind, files.name, files.weight_paths, files.tokenizer_path) == ("gguf", "tiny", (path,), path)
    weights = open_weights(files)
    assert weights is not None and weights.names() == ["f", "q"]
    assert resolve_model(str(path.parent)).weight_paths == (path,)
    write("other.gguf", good_gguf)
    with pytest.raises(ModelNotFound, match="2 GGUF files"):
        resolve_model(str(path.parent))


def test_folders(tmp_path: Path, write: Write) -> None:
    config = write("config.json", b"{}")
    for given in (tmp_path, config):
        files = resolve_model(str(given))
        assert (files.kind, files.config_path, files.tokenizer_path) == ("config_only", config, None)
        assert open_weights(files) is None
    tokenizer = write("tokenizer.json", b"{}")
    single = write("model.safetensors", b"")
    template = write("chat_template.jinja", b"")
    files = resolve_model(str(tmp_path))
    assert (files.kind, files.weight_paths, files.tokenizer_path) == ("safetensors", (single,), tokenizer)
    assert files.chat_template_path == template
    index = write("model.safetensors.index.json", b"{}")
    assert resolve_model(str(tmp_path)).weight_paths == (index,)


def test_bare_config_under_another_name(write: Write) -> None:
    path = write("llama-8b.json", b"{}")
    files = resolve_model(str(path))
    assert (files.kind, files.name, files.config_path) == ("config_only", "llama-8b", path)


def test_tokenizer_from_elsewhere(tmp_path: Path, write: Write, good_gguf: bytes) -> None:
    files = resolve_model(str(write("tiny.gguf", good_gguf)))
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        files.with_tokenizer(tmp_path)
    tokenizer = write("tokenizer.json", b"{}")
    assert files.with_tokenizer(tmp_path).tokenizer_path == tokenizer
    assert files.with_tokenizer(tokenizer).tokenizer_path == tokenizer


def test_pickled_weights_are_refused(tmp_path: Path, write: Write) -> None:
    write("config.json", b"{}")
    write("pytorch_model.bin", b"")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such", "x.gguf", "./y", "a b", "", "a/b/c", "~nobody/x", "../../x", "a\0b", "x" * 5000])
def test_no_such_model(name: str) -> None:
    with pytest.raises(ModelNotFound, match="give 'demo'"):
        resolve_model(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args: object, **_kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for name in ("owner/model", "owner/model/file-q4.gguf"):
        with pytest.raises(ModelNotFound, match="cannot be reached"):
            resolve_model(name)


def test_hub_model_is_named_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text("{}")
    asked: dict[str, object] = {}

    def download(repo: str, **kwargs: object) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/model", revision="v1").name == "owner/model"
    assert (asked["repo"], asked["revision"]) == ("owner/model", "v1")
