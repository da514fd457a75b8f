"""From what the user wrote after `--model` to files on disk. Owns that search; opens none of the files.

`demo`, a folder, a .gguf file, a config.json (dummy weights), or a Hugging Face Hub id (`owner/name`, or
`owner/name/file.gguf`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brim.errors import ModelNotFound, UnsupportedModel
from brim.formats.cache_folder import cache_folder
from brim.formats.demo_model import demo_model
from brim.formats.gguf import GGUFFile
from brim.formats.safetensors_file import INDEX_NAME, open_safetensors
from brim.formats.weight_file import WeightSource

ModelKind = Literal["gguf", "safetensors", "config_only"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_HUB_ID = 96  # the Hub's own limit
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+\.gguf)")
_HUB_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template*"]
_HUB_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_*"]
_NOT_THE_MODEL = ("consolidated", "adapter_")
_WHAT_A_MODEL_IS = "give 'demo', a folder with config.json, a .gguf file, a config.json, or a Hub id like owner/name"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The files of one model; a path is None where the model has no such file.

    kind `gguf`: one file is weights, config, tokenizer and template. kind `config_only`: a bare config.json, for dummy weights.
    `weight_paths` is the index file alone where there is one.
    """

    name: str
    kind: ModelKind
    weight_paths: tuple[Path, ...]
    config_path: Path | None = None
    generation_config_path: Path | None = None
    tokenizer_path: Path | None = None  # a tokenizer.json or a .gguf
    tokenizer_config_path: Path | None = None
    chat_template_path: Path | None = None  # a chat_template.jinja; others lie in tokenizer_config_path or the .gguf

    def with_tokenizer(self, path: Path) -> ModelFiles:
        """The same model with the tokenizer and chat template of `path`: a folder, a tokenizer.json or a .gguf file.

        Raises ModelNotFound where there is no tokenizer.
        """
        if path.suffix == ".gguf" and path.is_file():
            return dataclasses.replace(self, tokenizer_path=path, tokenizer_config_path=None, chat_template_path=None)
        folder = path.parent if path.is_file() else path
        tokenizer = _existing(folder / "tokenizer.json")
        if tokenizer is None:
            raise ModelNotFound(f"There is no tokenizer.json in {folder}; give a folder that has one, or a .gguf file.")
        return dataclasses.replace(
            self,
            tokenizer_path=tokenizer,
            tokenizer_config_path=_existing(folder / "tokenizer_config.json"),
            chat_template_path=_existing(folder / "chat_template.jinja"),
        )


def resolve_model(
    model: str, revision: str | None = None, cache_dir: Path | None = None, *, with_weights: bool = True
) -> ModelFiles:
    """The files of `model`. `revision` is a Hub branch, tag or commit; `cache_dir` replaces the user's cache folder.

    with_weights False: of a Hub folder only what is small is downloaded; a .safetensors file stands for its folder.

    Raises ModelNotFound with what to do where there is no such model, UnsupportedModel for weights in other formats.
    """
    if model == "demo":
        return _gguf_files(demo_model((cache_dir or cache_folder()) / "models"), "demo")
    path = Path(model).expanduser() if "\0" not in model else Path()
    if _exists(path) and model:
        is_part = path.suffix == ".safetensors" and not with_weights
        return _local_files(path.parent if is_part else path)
    is_path = model.startswith(("/", ".", "~", "\\")) or "\\" in model
    in_hub = _HUB_GGUF.fullmatch(model)
    if in_hub and not is_path and ".." not in model:
        return _gguf_files(_download_file(in_hub[1], in_hub[2], revision), model)
    is_hub_id = _HUB_ID.fullmatch(model) and ".." not in model and len(model) <= _MAX_HUB_ID and not is_path
    if not is_hub_id or model.endswith((".gguf", ".json")):
        raise ModelNotFound(f"There is no model at '{model[:200]}'; {_WHAT_A_MODEL_IS}.")
    return dataclasses.replace(_folder_files(_download_folder(model, revision, with_weights)), name=model)


def open_weights(files: ModelFiles) -> WeightSource | None:
    """The model's weights, open; None for a bare config.json."""
    if files.kind == "gguf":
        return GGUFFile.open(files.weight_paths[0])
    return open_safetensors(files.weight_paths) if files.weight_paths else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder one may not enter
        return False


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _local_files(path: Path) -> ModelFiles:
    if path.is_dir():
        return _folder_files(path)
    if path.suffix == ".gguf":
        return _gguf_files(path, path.stem)
    if path.suffix == ".json":
        files = _folder_files(path.parent) if path.name == "config.json" else _bare_config(path)
        return dataclasses.replace(files, config_path=path)
    raise ModelNotFound(f"{path} is not a model; {_WHAT_A_MODEL_IS}.")


def _gguf_files(path: Path, name: str) -> ModelFiles:
    return ModelFiles(name=name, kind="gguf", weight_paths=(path,), tokenizer_path=path)


def _bare_config(path: Path) -> ModelFiles:
    return ModelFiles(name=path.stem, kind="config_only", weight_paths=(), config_path=path)


def _folder_files(folder: Path) -> ModelFiles:
    """A folder as `save_pretrained` writes it, or one that holds a single GGUF file."""
    config = _existing(folder / "config.json")
    if config is None:
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1:
            return _gguf_files(ggufs[0], ggufs[0].stem)
        if ggufs:
            raise ModelNotFound(f"{folder} holds {len(ggufs)} GGUF files; name one, for example {ggufs[0]}.")
        raise ModelNotFound(f"{folder} has no config.json; {_WHAT_A_MODEL_IS}.")
    weights = _safetensors_of(folder)
    if not weights and any(folder.glob("pytorch_model*.bin")):
        raise UnsupportedModel(f"{folder} has pickled weights (pytorch_model.bin) only; convert the model to safetensors first.")
    return ModelFiles(
        name=folder.resolve().name,
        kind="safetensors" if weights else "config_only",
        weight_paths=weights,
        config_path=config,
        generation_config_path=_existing(folder / "generation_config.json"),
        tokenizer_path=_existing(folder / "tokenizer.json"),
        tokenizer_config_path=_existing(folder / "tokenizer_config.json"),
        chat_template_path=_existing(folder / "chat_template.jinja"),
    )


def _safetensors_of(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX_NAME).is_file():
        return (folder / INDEX_NAME,)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    return tuple(path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(_NOT_THE_MODEL))


def _download_folder(repo: str, revision: str | None, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_HUB_FILES, *_HUB_WEIGHTS] if with_weights else _HUB_FILES
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_HUB_IGNORED))
    except Exception as error:  # the boundary to a library with several error trees
        raise _hub_error(repo, revision, error) from error


def _download_file(repo: str, file_name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file_name, revision=revision))
    except Exception as error:  # the boundary to a library with several error trees
        raise _hub_error(f"{repo}/{file_name}", revision, error) from error


def _hub_error(model: str, revision: str | None, error: Exception) -> ModelNotFound:
    """One sentence for each way the Hub says no. Class names, because the library moves its classes between modules."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    what = f"'{model}'" + (f" at revision '{revision}'" if revision else "")
    if "GatedRepoError" in kinds:
        return ModelNotFound(f"{what} on the Hugging Face Hub needs permission; accept its terms there, then run: hf auth login")
    if "RevisionNotFoundError" in kinds:
        return ModelNotFound(f"'{model}' has no revision '{revision}' on the Hugging Face Hub; leave out --revision or check it.")
    if "RepositoryNotFoundError" in kinds:
        return ModelNotFound(
            f"There is no folder or file '{model}', and the Hugging Face Hub has no such public model; check the name, or run "
            "hf auth login for a private one."
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return ModelNotFound(f"{what} is not on the Hugging Face Hub; check the file name.")
    return ModelNotFound(
        f"{what} is neither a local file or folder nor in the local Hub cache, and the Hugging Face Hub cannot be reached "
        f"({type(error).__name__}); check the path, connect, or download the model first."
    )
