"""The process of some streaming clients, each one request of the `openai` package. Not a verb.

Owns what the clients of a server see: when tokens came, and that all came. After one token to warm up it says "ready", waits
for a line on stdin, runs all its requests at once and prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from importlib.metadata import version
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient


async def stream_one(client: AsyncOpenAI, model: str, request: dict[str, Any]) -> dict[str, Any]:
    """One request: the monotonic times of its first and last token, frames with text, tokens by the server's own count."""
    first_at, last_at, num_frames, num_tokens = 0.0, 0.0, 0, 0
    stream = await client.completions.create(
        model=model,
        prompt=request["prompt"],
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        seed=request["seed"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices:
            last_at = time.monotonic()
            first_at = first_at or last_at
            num_frames += 1
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
    return {"first_at": first_at, "last_at": last_at, "num_frames": num_frames, "num_tokens": num_tokens}


async def run(task: dict[str, Any]) -> dict[str, Any]:
    """All requests of this process at once."""
    http = DefaultAsyncHttpxClient(timeout=600, trust_env=False)
    async with AsyncOpenAI(base_url=task["url"], api_key="none", http_client=http, max_retries=0) as client:
        await stream_one(client, task["model"], {**task["requests"][0], "max_tokens": 1})  # what the package makes at first use
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started = time.monotonic()
        results = await asyncio.gather(*(stream_one(client, task["model"], request) for request in task["requests"]))
    return {"started_at": started, "results": results, "client": f"openai {version('openai')}"}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.stdin.readline())))))
