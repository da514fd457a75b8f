"""The flags that verbs share, from one table, so that run, serve and bench cannot disagree.

Owns the flags' names (vLLM's where vLLM has them), help and grouping. A flag's text goes to `config.resolve` unparsed: what
a value may be is decided there once, for flags, environment and file alike. Defaults shown are read from `config.schema`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import typer

from brim.config.resolve import known_fields, resolve
from brim.config.schema import BrimConfig

Group = Literal["model", "memory", "scheduling", "device", "server"]
Kind = Literal["text", "switch", "list"]
Verb = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Flag:
    """One shared flag. `key` is the setting it gives to `resolve`; `names` is typer's declaration of it."""

    key: str
    names: str
    help: str
    group: Group
    metavar: str = "TEXT"
    kind: Kind = "text"
    default: str = ""  # shown where the schema's own default says too little


FLAGS: tuple[Flag, ...] = (
    Flag("tokenizer", "--tokenizer", "Folder, file or hub id of another tokenizer.", "model", "PATH|ID"),
    Flag("revision", "--revision", "Branch, tag or commit of a hub model.", "model"),
    Flag("load_format", "--load-format", "auto, safetensors, gguf, or dummy for random weights.", "model", "FORMAT"),
    Flag("dtype", "--dtype", "auto, bfloat16, float16 or float32.", "model"),
    Flag("quantization", "--quantization",
         "gguf: compute with a GGUF file's blocks as they are; none: make floats of them; auto: gguf where kernels can and no "
         "--dtype is given.", "model"),
    Flag("max_model_len", "--max-model-len", "Longest context in tokens, or auto: the longest that fits.", "model", "TOKENS|auto",
         default="the model's own limit; in host memory at most 4096"),
    Flag("chat_template", "--chat-template", "A Jinja chat template: a file, or the template itself.", "model", "FILE|TEXT"),
    Flag("seed", "--seed", "Seed of dummy weights and of requests without one.", "model", "N"),
    Flag("memory", "--memory", "The cap on all this process holds: a size (40GiB), a share (85%), max, or enough.", "memory",
         "SIZE|N%|max|enough", default="max; in host memory enough"),
    Flag("gpu_memory_utilization", "--gpu-memory-utilization", "Familiar spelling of --memory N%: 0.85 is 85%.", "memory",
         "FRACTION"),
    Flag("reserve", "--reserve", "What must stay free on the device.", "memory", "SIZE", default="the platform's"),
    Flag("block_size", "--block-size", "Tokens of a KV block, a power of two.", "memory", "TOKENS"),
    Flag("enable_prefix_caching", "--enable-prefix-caching/--no-enable-prefix-caching",
         "Keep and share the KV blocks of common prefixes.", "memory", kind="switch"),
    Flag("max_num_seqs", "--max-num-seqs", "Most sequences computed in one step.", "scheduling", "N", default="the platform's"),
    Flag("max_num_batched_tokens", "--max-num-batched-tokens", "Most tokens computed in one step.", "scheduling", "TOKENS",
         default="the platform's"),
    Flag("enable_chunked_prefill", "--enable-chunked-prefill/--no-enable-chunked-prefill",
         "Cut long prompts into chunks that share steps with decodes.", "scheduling", kind="switch"),
    Flag("device", "--device", "auto, cpu, cuda, rocm, xpu, or fake (scripted, for tests).", "device"),
    Flag("kernels", "--kernels", "auto, torch (the reference), native or triton.", "device"),
    Flag("num_threads", "--num-threads", "Threads that compute, on a CPU.", "device", "N", default="one a physical core"),
    Flag("graph_mode", "--graph-mode", "NONE, PIECEWISE, FULL, FULL_DECODE_ONLY or FULL_AND_PIECEWISE.", "device", "MODE",
         default="the fastest the device has"),
    Flag("enforce_eager", "--enforce-eager", "Capture no graphs; the same as --graph-mode NONE.", "device", kind="switch"),
    Flag("compile", "--compile", "Compile what lies between attention calls with torch.compile.", "device", kind="switch"),
    Flag("strict", "--strict", "Refuse to start where something asked for does not work, instead of doing without.", "device",
         kind="switch"),
    Flag("arena", "--arena", "auto, or static: do without reserving addresses and committing memory later.", "device"),
    Flag("served_model_name", "--served-model-name", "Name of the model in the API; may be repeated.", "server", "NAME", "list",
         default="the model as given"),
    Flag("host", "--host", "Address to listen on.", "server", "ADDRESS"),
    Flag("port", "--port", "Port to listen on; 0 picks a free one.", "server", "PORT"),
    Flag("api_key", "--api-key", "Key that clients must send; may be repeated.", "server", "KEY", "list", default="none: open"),
    Flag("max_body_bytes", "--max-body-bytes", "Largest request body accepted, in bytes.", "server", "BYTES"),
    Flag("drain_seconds", "--drain-seconds", "How long a stopping server lets requests finish.", "server", "SECONDS"),
    Flag("step_timeout_seconds", "--step-timeout-seconds",
         "An engine that gives no sign of life for so long, and ten times the worst step tried, is started again; 0: never.",
         "server", "SECONDS"),
    Flag("log_requests", "--log-requests/--no-log-requests", "Log one line a request on stderr.", "server", kind="switch"),
)  # fmt: skip

ENGINE_GROUPS: tuple[Group, ...] = ("model", "memory", "scheduling", "device")
ALL_GROUPS: tuple[Group, ...] = (*ENGINE_GROUPS, "server")
_ALIAS_OF = {"gpu_memory_utilization": "memory", "reserve": "reserve_bytes", "api_key": "api_keys"}


def with_settings(*, groups: Iterable[Group], without: Iterable[str] = ()) -> Callable[[Verb], Verb]:
    """Give a verb the shared flags of `groups` (less the keys in `without`), plus --config.

    The verb takes them as one keyword argument `settings`: key -> text as typed, only what was given; "config" among them.
    """
    chosen = [flag for flag in FLAGS if flag.group in set(groups) and flag.key not in set(without)]

    def decorate(verb: Verb) -> Verb:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "settings"]
        shared = [_parameter(flag) for flag in chosen] + [_config_parameter()]

        @functools.wraps(verb)
        def wrapper(*args: Any, **values: Any) -> None:
            settings = {p.name: values.pop(p.name) for p in shared}
            verb(*args, **values, settings={key: value for key, value in settings.items() if value not in (None, [])})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def build_config(model: str | None, settings: dict[str, Any]) -> BrimConfig:
    """The configuration from flags, this process's environment and the file of --config (or BRIM_CONFIG).

    Raises ConfigError, naming the setting, for anything that is not right.
    """
    flags = {"model": model, **settings}
    config_file = flags.pop("config", None) or os.environ.get("BRIM_CONFIG") or None
    return resolve(flags, os.environ, config_file)


def settings_of(config: BrimConfig) -> dict[str, Any]:
    """The values of `config` that somebody chose, by name, as `LLM(model, **settings)` takes them (the model itself left out)."""
    chosen = {}
    for name, (section, _) in known_fields().items():
        if name != "model" and section != "server" and config.sources.get(name, "default") != "default":
            chosen[name] = getattr(getattr(config, section), name)
    return chosen


def _parameter(flag: Flag) -> inspect.Parameter:
    text = f"{flag.help}{_shown_default(flag)}"
    kind: Any = {"text": str | None, "switch": bool | None, "list": list[str] | None}[flag.kind]
    metavar = flag.metavar if flag.kind != "switch" else None
    option = typer.Option(flag.names, help=text, metavar=metavar, show_default=False)
    return inspect.Parameter(flag.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help="A TOML file of settings; flags and BRIM_* variables win over it.", metavar="FILE")
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


def _shown_default(flag: Flag) -> str:
    if flag.default:
        return f" Default: {flag.default}."
    schema_default = known_fields()[_ALIAS_OF.get(flag.key, flag.key)][1].default
    if schema_default is MISSING or schema_default in (None, False, ()):
        return ""
    if schema_default is True:
        return " Default: on."
    return f" Default: {schema_default}."
