"""The chat template: from messages to the text a model was trained on. Owns finding, compiling and rendering it.

What a template may use and how long it may take is `template_sandbox`'s.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes

from brim.errors import InvalidParameter, RequestError, TokenizerError
from brim.formats.gguf import GGUFFile
from brim.formats.model_files import ModelFiles
from brim.text.json_tokenizer import read_json_object
from brim.text.template_sandbox import BoundedEnvironment, RenderBudget, TemplateLimit, TemplateRefusal

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_RESERVED = frozenset(["messages", "tools", "documents", "add_generation_prompt", *_SPECIAL_TOKENS])
_MAX_SOURCE_CHARACTERS = 1_000_000
_TOOL_TEMPLATE = "tool_use"


class ChatTemplate:
    """A compiled template. Thread-safe: renderings happen one after the other."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, tool_source: str | None = None) -> None:
        """special_tokens: `bos_token` and the like, as text. tool_source: the template for requests with tools, if another.

        Raises TokenizerError for a template that is not valid Jinja.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._lock = threading.Lock()
        self._environment = BoundedEnvironment()
        self._template = _compile(self._environment, source)
        self._tool_template = self._template if tool_source is None else _compile(self._environment, tool_source)
        self._takes_parts = _takes_parts(self._environment, source)

    @classmethod
    def from_files(cls, files: ModelFiles, gguf: GGUFFile | None = None, override: str | None = None) -> ChatTemplate | None:
        """The template of a resolved model, or of --chat-template; None where there is none. `gguf`: the open file, if any.

        Raises TokenizerError.
        """
        path = files.tokenizer_path
        metadata: Mapping[str, Any] | None = None
        if gguf is not None and gguf.path == path:
            metadata = gguf.metadata
        elif path is not None and path.suffix == ".gguf":
            with contextlib.closing(GGUFFile.open(path)) as opened:
                metadata = opened.metadata
        config = read_json_object(files.tokenizer_config_path)
        return cls.from_sources(
            override=override, template_path=files.chat_template_path, tokenizer_config=config, gguf_metadata=metadata
        )

    @classmethod
    def from_sources(
        cls,
        *,
        override: str | None = None,
        template_path: Path | None = None,
        tokenizer_config: Mapping[str, Any] | None = None,
        gguf_metadata: Mapping[str, Any] | None = None,
    ) -> ChatTemplate | None:
        """The first there is of: override (a file or the template itself), chat_template.jinja, tokenizer_config.json's
        `chat_template` (a string, or a list of named ones), the GGUF header's `tokenizer.chat_template`.

        Raises TokenizerError for a source that cannot be read or compiled.
        """
        config, metadata = tokenizer_config or {}, gguf_metadata or {}
        tokens = _special_tokens(config, metadata)
        if override is not None:
            return cls(_override_source(override), tokens)
        if template_path is not None:
            return cls(_read_source(template_path), tokens)
        declared = config.get("chat_template")
        if declared is None:
            declared = metadata.get("tokenizer.chat_template")
        if declared is None:
            return None
        source, tool_source = _named_sources(declared)
        return cls(source, tokens, tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, special tokens written out (so encode it with add_special_tokens=False).

        extra: further variables for the template (`chat_template_kwargs`). A message's content is a string, None, or a list of
        text parts, which becomes one string of lines unless the template takes lists.
        Raises InvalidParameter for messages of the wrong form, RequestError where the template refuses or fails.
        """
        variables = {
            **self._special_tokens,
            **_checked_extra(extra),
            "messages": [self._message(message, at) for at, message in enumerate(messages)],
            "tools": _plain(list(tools), "tools") if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._tool_template if tools else self._template
        with self._lock:
            return self._rendered(template, variables)

    def _rendered(self, template: Template, variables: dict[str, Any]) -> str:
        budget = self._environment.budget = RenderBudget()
        parts: list[str] = []
        num_characters = 0
        try:
            budget.weight(variables)
            for part in template.generate(variables):
                num_characters += len(part)
                budget.allow(num_characters)
                parts.append(part)
        except TemplateLimit as error:
            raise RequestError(f"The chat template was stopped: {error}; give another with --chat-template.") from error
        except TemplateRefusal as error:
            raise RequestError(f"The chat template refuses these messages: {error}", param="messages") from error
        except RecursionError as error:
            raise RequestError("The chat template calls itself without end; give another with --chat-template.") from error
        except Exception as error:  # templates are programs: any exception can come out of one
            reason = f"{type(error).__name__}: {error}"[:500]
            raise RequestError(f"The chat template failed on these messages ({reason}).", param="messages") from error
        return "".join(parts)

    def _message(self, message: Mapping[str, Any], at: int) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidParameter(f"Message {at} is not an object with a role; give role and content.", param="messages")
        plain: dict[str, Any] = _plain(message, f"message {at}")
        content = plain.get("content")
        if isinstance(content, list):
            texts = [_part_text(part, at) for part in content]
            as_parts = [{"type": "text", "text": text} for text in texts]
            plain["content"] = as_parts if self._takes_parts else "\n".join(texts)
        elif content is not None and not isinstance(content, str):
            raise InvalidParameter(f"Message {at}: content must be a string or a list of text parts.", param="messages")
        elif self._takes_parts and isinstance(content, str):
            plain["content"] = [{"type": "text", "text": content}]
        return plain


def _compile(environment: BoundedEnvironment, source: str) -> Template:
    if len(source) > _MAX_SOURCE_CHARACTERS:
        raise TokenizerError(f"The chat template has {len(source):,} characters; give another with --chat-template.")
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError, TypeError) as error:
        line = f" (line {error.lineno})" if isinstance(error, TemplateError) and hasattr(error, "lineno") else ""
        reason = str(error)[:300] or type(error).__name__
        raise TokenizerError(f"The chat template is not valid{line}: {reason}; give another with --chat-template.") from error


def _takes_parts(environment: BoundedEnvironment, source: str) -> bool:
    """Whether the template loops over a message's content and never asks if it is a string: then it wants lists only."""
    tree = environment.parse(source)
    loops = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))
    asks = any(test.name == "string" for test in tree.find_all(nodes.Test))
    return loops and not asks


def _is_content(node: nodes.Node) -> bool:
    """message.content or message['content']"""
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _part_text(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text", "refusal", None) or not isinstance(text, str):
        what = f"a part of type '{kind}'" if kind else "a part without text"
        raise InvalidParameter(f"Message {at} has {what}; Brim takes text parts only.", param="messages")
    return text


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of dicts, lists, strings, numbers and None alone, so that a template gets no other object's methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth < 64 and isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if depth < 64 and isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    reason = "is nested too deep" if isinstance(value, (Mapping, list, tuple)) else f"holds a {type(value).__name__}"
    raise InvalidParameter(f"What was given as {where} {reason}; give plain JSON values.", param=where.split()[0])


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    for name in extra or {}:
        if name in _RESERVED:
            raise InvalidParameter(f"chat_template_kwargs may not set '{name}'; leave it out.", param="chat_template_kwargs")
    plain: dict[str, Any] = _plain(extra or {}, "chat_template_kwargs")
    return plain


def _special_tokens(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, as text: strings or {content} in tokenizer_config.json, ids in a GGUF header."""
    tokens: dict[str, str] = {}
    pieces = metadata.get("tokenizer.ggml.tokens")
    for role, key in _GGUF_IDS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(pieces, list) and type(token_id) is int and 0 <= token_id < len(pieces):
            tokens[role] = pieces[token_id]
    for role in _SPECIAL_TOKENS:
        token = config.get(role)
        content = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(content, str):
            tokens[role] = content
    return tokens


def _override_source(override: str) -> str:
    """--chat-template: a template (it has braces) or a file's path."""
    if "{{" in override or "{%" in override:
        return override
    return _read_source(Path(override).expanduser())


def _read_source(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"The chat template {path} cannot be read ({error}); give a file or the template itself.") from error


def _named_sources(declared: Any) -> tuple[str, str | None]:
    """The default template and the one for tools, of a string, a list of {name, template}, or a mapping."""
    if isinstance(declared, str):
        return declared, None
    if isinstance(declared, list) and all(isinstance(entry, Mapping) for entry in declared):
        declared = {entry.get("name"): entry.get("template") for entry in declared}
    if not isinstance(declared, Mapping) or not all(isinstance(source, str) for source in declared.values()) or not declared:
        raise TokenizerError(
            "The model's chat_template is neither text nor a list of named texts; give one with --chat-template."
        )
    default = declared.get("default", next(iter(declared.values())))
    return default, declared.get(_TOOL_TEMPLATE)
