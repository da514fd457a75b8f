"""`brim bench`: measure this machine with this model. Owns the sub-verbs, their flags and the form of the result.

One table on stdout, or with --json one object; progress on stderr. The methods are `cli.measure`'s. Prefix caching is off
unless a flag turns it on: the prompts repeat, and a cache would be measured instead of the engine.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli import engine
from brim.cli.errors import EXIT_FAILED, guarded
from brim.cli.options import ENGINE_GROUPS, with_settings
from brim.cli.tables import print_table
from brim.errors import ConfigError
from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.llm import LLM

app = typer.Typer(help="Measure throughput, decode, prefill and start-up.", no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A local folder, a .gguf file, a hub id, or demo.")]
Models = Annotated[list[str] | None, typer.Option("--model", metavar="MODEL", help="A model to measure; may be repeated.")]
Shapes = Annotated[
    Path | None,
    typer.Option("--models", metavar="FOLDER", help="Measure each folder in it that has a config.json; random weights."),
]
Parts = Annotated[
    str | None,
    typer.Option("--parts", metavar="NAMES", help="Only these of start,decode,prefill,workload,long,beside,server."),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw a roofline of it too (needs matplotlib).")]
NumSeqs = Annotated[int, typer.Option(min=1, metavar="N", help="Requests of workload W (the whole is 256).")]
BatchSizes = Annotated[list[int], typer.Option("--batch-size", min=1, metavar="N", help="Sequences a step; may be repeated.")]
InputLen = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens of a prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Decode steps that are timed.")]
NumIters = Annotated[int, typer.Option(min=1, metavar="N", help="Repetitions; the median counts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write the JSON object to FILE too.")]

_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("ready_s", "start to ready", lambda x: f"{x:.2f} s"),
    ("first_token_s", "start to first token", lambda x: f"{x:.2f} s"),
    ("peak_rss_bytes", "peak memory of that process", format_bytes),
    ("prefill_ms", "prefill", lambda x: f"{x:.1f} ms"),
    ("decode_ms_per_token", "decode", lambda x: f"{x:.2f} ms"),
    ("bandwidth_bytes_per_s", "memory bandwidth measured", lambda x: f"{x / 1e9:.1f} GB/s"),
    ("decode_read_bytes", "bytes a decode step must read", format_bytes),
    ("limit_share", "share of the bandwidth limit", lambda x: f"{x:.1%}"),
    ("output_tokens_per_s", "throughput", lambda x: f"{x:,.1f} output tokens/s"),
    ("kv_tokens", "KV cache", lambda x: f"{x:,} tokens"),
)


@app.command()
@guarded
@with_settings(groups=ENGINE_GROUPS)
def throughput(
    *, model: Model, num_seqs: NumSeqs = 256, as_json: AsJson = False, output: Output = None, settings: dict[str, Any]
) -> None:
    """Output tokens per second.

    Workload W: 256 requests of 100-1024 random tokens and as many new ones, all submitted at once.
    """
    with _open(model, settings) as llm:
        result = _base(llm, model) | _throughput(llm, num_seqs)
    _finish(result, as_json, output)


@app.command()
@guarded
@with_settings(groups=ENGINE_GROUPS)
def decode(
    *,
    model: Model,
    batch_size: BatchSizes = [1],  # noqa: B006  (typer reads it, nothing writes to it)
    input_len: InputLen = 128,
    output_len: OutputLen = 256,
    num_iters: NumIters = 3,
    as_json: AsJson = False,
    output: Output = None,
    settings: dict[str, Any],
) -> None:
    """Milliseconds of a decode step.

    (time of 16 + N new tokens - time of 16) / N, and the share of the memory-bandwidth limit it reaches.
    """
    with _open(model, settings) as llm:
        result = _base(llm, model) | _decode(llm, batch_size, input_len, output_len, num_iters)
    result |= _limit(settings, result)
    _finish(result, as_json, output)


@app.command()
@guarded
@with_settings(groups=ENGINE_GROUPS)
def prefill(
    *,
    model: Model,
    input_len: InputLen = 128,
    num_iters: NumIters = 5,
    as_json: AsJson = False,
    output: Output = None,
    settings: dict[str, Any],
) -> None:
    """Milliseconds from a prompt to its first token."""
    with _open(model, settings) as llm:
        result = _base(llm, model) | _prefill(llm, input_len, num_iters)
    _finish(result, as_json, output)


@app.command()
@guarded
@with_settings(groups=ENGINE_GROUPS)
def startup(
    *, model: Model, num_iters: NumIters = 3, as_json: AsJson = False, output: Output = None, settings: dict[str, Any]
) -> None:
    """Seconds from exec to ready and to a token.

    Of a fresh process each time.
    """
    _finish(_startup(model, settings, num_iters), as_json, output)


@app.command()
@guarded
@with_settings(groups=ENGINE_GROUPS)
def suite(
    *,
    model: Models = None,
    models: Shapes = None,
    parts: Parts = None,
    plot: Plot = None,
    as_json: AsJson = False,
    output: Output = None,
    settings: dict[str, Any],
) -> None:
    """Every figure, with its physical limit, in one run.

    Starts, decode, prefill, a workload, long contexts, a server with its clients; sizes follow the device.

    Exit status 1 where a part failed.
    """
    from brim.cli import bench_suite

    subjects = bench_suite.subjects_of(model or [], models, settings, _say)

    def keep(record: dict[str, Any]) -> None:
        if output is not None:
            _write(output, record)

    record = bench_suite.run_suite(subjects, parts.split(",") if parts else bench_suite.PARTS, _say, keep)
    keep(record)
    if plot is not None:
        from brim.cli.bench_roofline import draw

        draw(record, plot)
    if as_json:
        print(json.dumps(record, indent=1, default=str))
    else:
        _print_suite(record)
    if bench_suite.failures_of(record):
        raise typer.Exit(EXIT_FAILED)


def _print_suite(record: dict[str, Any]) -> None:
    for name, found in record["models"].items():
        rows = [(f["name"], *_shown(f)) for f in found["figures"]]
        print_table(("MEASURED", name, "LIMIT", "SHARE"), rows, right={1, 2, 3}, stream=sys.stdout)
        print()
    limits, device = record["limits"], record["device"]
    print(f"{device.get('device')}: memory {limits['bandwidth_bytes_per_s'] / 1e9:,.1f} GB/s, "
          f"products {limits['matmul_flops'] / 1e12:,.1f} TFLOP/s; {record['total_s']:.0f} s in all")  # fmt: skip


def _shown(figure: dict[str, Any]) -> tuple[str, str, str]:
    forms: dict[str, Callable[[Any], str]] = {
        "ms": lambda x: f"{x:,.2f} ms", "s": lambda x: f"{x:.2f} s", "bytes": format_bytes, "tokens": lambda x: f"{x:,}",
        "tokens/s": lambda x: f"{x:,.1f}/s",
    }  # fmt: skip
    form = forms[figure["unit"]]
    limit, share = figure["limit"], figure["limit_share"]
    return form(figure["value"]), form(limit) if limit is not None else "", f"{share:.0%}" if share is not None else ""


def _open(model: str, settings: dict[str, Any]) -> LLM:
    return engine.open_llm(model, _bench_settings(settings))


def _bench_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {"enable_prefix_caching": False, **settings}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _empty(model: str, info: dict[str, Any]) -> dict[str, Any]:
    """What every result has: the measured fields (None where not measured here), then what they were measured on."""
    fields: dict[str, Any] = {key: None for key, _, _ in _ROWS}
    platform = info.get("device", {})
    return fields | {
        "kv_tokens": info.get("kv_tokens"),
        "model": model,
        "device": platform.get("device"),
        "versions": {"brim": version("brim"), **{key: platform[key] for key in ("torch", "python", "system") if key in platform}},
        "platform": platform,
        "dtype": info.get("dtype"),
        "kernels": info.get("kernels"),
        "num_threads": info.get("num_threads"),
        "command": shlex.join(["brim", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _base(llm: LLM, model: str) -> dict[str, Any]:
    return _empty(model, llm.info) | {"ready_s": llm.info.get("ready_s")}


def _throughput(llm: LLM, num_seqs: int) -> dict[str, Any]:
    from brim.cli.measure import measure_throughput
    from brim.cli.workloads import workload_w

    workload = workload_w(llm.info["vocab_size"], num_seqs)
    _say(f"workload W: {num_seqs} requests, {workload.num_prompt_tokens:,} prompt and {workload.num_output_tokens:,} new tokens")
    tokens_per_s, seconds = measure_throughput(llm, workload)
    return {"output_tokens_per_s": tokens_per_s, "throughput": {"num_seqs": num_seqs, "seconds": seconds,
            "prompt_tokens": workload.num_prompt_tokens, "output_tokens": workload.num_output_tokens}}  # fmt: skip


def _prefill(llm: LLM, input_len: int, num_iters: int) -> dict[str, Any]:
    from brim.cli.measure import measure_prefill

    prefill_ms = measure_prefill(llm, input_len=input_len, num_iters=num_iters, say=_say)
    return {"prefill_ms": prefill_ms, "prefill": {"input_len": input_len, "num_iters": num_iters}}


def _decode(llm: LLM, batch_sizes: list[int], input_len: int, output_len: int, num_iters: int) -> dict[str, Any]:
    """Without its limit, which is measured when the engine has given its memory back."""
    from brim.cli import measure

    weight_bytes = measure.weight_read_bytes(llm.info)
    first_position = input_len + measure.SHORT_DECODE_TOKENS
    sequence_bytes = measure.kv_read_bytes(llm.memory()["kv"], first_position, output_len)
    steps = []
    for batch_size in batch_sizes:
        ms = measure.measure_decode(
            llm, batch_size=batch_size, input_len=input_len, output_len=output_len, num_iters=num_iters, say=_say
        )
        read_bytes = weight_bytes + batch_size * sequence_bytes
        steps.append({"batch_size": batch_size, "ms_per_token": ms, "read_bytes": read_bytes,
                      "tokens_per_s": batch_size * 1000 / ms if ms > 0 else None})  # fmt: skip
    return {
        "decode_ms_per_token": steps[0]["ms_per_token"],
        "decode_read_bytes": steps[0]["read_bytes"],
        "decode": {"input_len": input_len, "output_len": output_len, "num_iters": num_iters, "by_batch": steps},
    }


def _limit(settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The bandwidth, and the share of it that each step of `result` reaches."""
    from brim.cli import measure

    limits = measure.measure_limits(str(settings.get("device", "auto")), measure.num_engine_threads(result))
    bandwidth = limits["bandwidth_bytes_per_s"]
    _say(f"memory bandwidth: {bandwidth / 1e9:.1f} GB/s")
    for step in result["decode"]["by_batch"]:
        seconds = step["ms_per_token"] / 1000
        step["limit_share"] = step["read_bytes"] / bandwidth / seconds if seconds > 0 else None
    return {"bandwidth_bytes_per_s": bandwidth, "limit_share": result["decode"]["by_batch"][0]["limit_share"]}


def _startup(model: str, settings: dict[str, Any], num_iters: int) -> dict[str, Any]:
    from brim.cli.measure import measure_startup
    from brim.cli.options import build_config

    build_config(model, settings)
    results = []
    for index in range(num_iters):
        results.append(measure_startup(model, _bench_settings(settings)))
        _say(f"start {index + 1} of {num_iters}: ready {results[-1].ready_s:.2f} s, token {results[-1].first_token_s:.2f} s")
    return _empty(model, results[-1].info) | {
        "ready_s": statistics.median(r.ready_s for r in results),
        "first_token_s": statistics.median(r.first_token_s for r in results),
        "peak_rss_bytes": max(r.peak_rss_bytes for r in results),
        "startup": {"ready_s": [r.ready_s for r in results], "first_token_s": [r.first_token_s for r in results]},
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}.") from error


def _finish(result: dict[str, Any], as_json: bool, output: Path | None) -> None:
    if output is not None:
        _write(output, result)
    if as_json:
        print(json.dumps(result, indent=1, default=str))
        return
    rows = [(label, form(result[key])) for key, label, form in _ROWS if result[key] is not None]
    for step in result.get("decode", {}).get("by_batch", [])[1:]:
        share = f", {step['limit_share']:.1%} of the limit" if step["limit_share"] else ""
        rows.append((f"decode at batch {step['batch_size']}", f"{step['ms_per_token']:.2f} ms{share}"))
    rows += [("device", str(result["device"])), ("versions", _versions(result["versions"])), ("command", result["command"])]
    print_table(("MEASURED", result["model"]), rows, stream=sys.stdout)


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else str(versions)
