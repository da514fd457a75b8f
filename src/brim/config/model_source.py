"""A model's files, read as far as planning needs: its spec, its end-of-sequence ids and its open weights. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.config.model_spec import ModelSpec, spec_from_gguf, spec_from_hf_config
from brim.config.schema import ModelConfig
from brim.errors import BrokenModel, ModelNotFound, UnsupportedModel
from brim.formats.gguf import GGUFFile
from brim.formats.model_files import ModelFiles, open_weights, resolve_model
from brim.formats.weight_file import WeightSource

_ROPE_TENSOR = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """weights None: dummy weights were asked for. eos_token_ids: the config's and the generation config's together."""

    files: ModelFiles
    spec: ModelSpec
    weights: WeightSource | None
    eos_token_ids: tuple[int, ...]

    def close(self) -> None:
        """Unmap the weight files."""
        if self.weights is not None:
            self.weights.close()


def open_model(config: ModelConfig, files: ModelFiles | None = None) -> ModelSource:
    """Find and open the model; nothing large is read. files: where it was found already.

    Raises ModelNotFound, BrokenModel or UnsupportedModel with what to do.
    """
    files = files or resolve_model(config.model, config.revision)
    dummy = config.load_format == "dummy"
    if not dummy and files.kind == "config_only":
        spec_from_hf_config(_read_json(files.config_path))  # what cannot run with any weights is said first
        raise ModelNotFound(f"'{config.model}' has a config.json but no weights; add --load-format dummy for random weights.")
    if config.load_format in ("gguf", "safetensors") and files.kind != config.load_format:
        raise ModelNotFound(f"'{config.model}' holds {files.kind} files, not {config.load_format}; drop --load-format.")
    weights = None if dummy and files.kind != "gguf" else open_weights(files)
    if isinstance(weights, GGUFFile):
        shapes = {name: weights.info(name).shape for name in weights.names()}
        spec = spec_from_gguf(weights.metadata, shapes, _rope_divisors(weights))
    else:
        spec = spec_from_hf_config(_read_json(files.config_path))
    eos = dict.fromkeys((*spec.eos_token_ids, *_generation_eos(files.generation_config_path)))
    return ModelSource(files, spec, None if dummy else weights, tuple(eos))


def _rope_divisors(weights: GGUFFile) -> list[float]:
    """The values of `rope_freqs.weight`, where the file has it."""
    if _ROPE_TENSOR not in weights.tensors:
        return []
    if weights.info(_ROPE_TENSOR).ggml_type.name != "F32":
        raise UnsupportedModel(f"Tensor '{_ROPE_TENSOR}' is not stored as F32; convert the file again.")
    with weights.tensor_bytes(_ROPE_TENSOR) as view:
        return [float(value) for value in view.cast("f")]


def _generation_eos(path: Path | None) -> tuple[int, ...]:
    value = _read_json(path).get("eos_token_id") if path is not None else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BrokenModel(f"{path}: 'eos_token_id' is {value!r}, not a token id or a list of them.")
    return tuple(ids)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        raise ModelNotFound("The model has no config.json; download it again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenModel(f"{path} cannot be read as JSON ({error}); download the model again.") from error
    if not isinstance(data, dict):
        raise BrokenModel(f"{path} is not a JSON object; download the model again.")
    return data
