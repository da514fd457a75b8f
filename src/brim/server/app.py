"""The HTTP application: paths to handlers. Owns routing and the small answers; completions and chat have files of their own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from brim.config.schema import BrimConfig
from brim.errors import BrimError, InvalidParameter, RequestError
from brim.server.api_errors import JSON, ApiError, answer_error
from brim.server.chat import ChatCompletions
from brim.server.completions import Completions
from brim.server.engine_account import EngineAccount
from brim.server.gate import KeyGate, RequestLog
from brim.server.live import LiveServer, LiveView, live_response
from brim.server.memory_page import MemoryPage
from brim.server.metrics import CONTENT_TYPE, ServerMetrics
from brim.server.openai_types import IGNORED, DetokenizeRequest, TokenizeRequest
from brim.server.prompts import Prompts
from brim.server.request_body import parse_body, read_body
from brim.server.seams import EngineClient, ServerFront

Handler = Callable[[Request, bytes], Awaitable[Response]]


def create_app(engine: EngineClient, front: ServerFront, config: BrimConfig, *, extra_keys: Iterable[str] = ()) -> FastAPI:
    """The app over an engine client. extra_keys: accepted beside config.server.api_keys where there are any."""
    app = FastAPI(title="Brim", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind in (BrimError, ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    _Routes(engine, front, config).install(app)
    if config.server.api_keys:
        app.add_middleware(KeyGate, keys=(*config.server.api_keys, *extra_keys))
    if config.server.log_requests:
        app.add_middleware(RequestLog)
    return app


class _Routes:
    """The handlers of one app."""

    def __init__(self, engine: EngineClient, front: ServerFront, config: BrimConfig) -> None:
        self._engine = engine
        self._front = front
        self._max_body_bytes = config.server.max_body_bytes
        self._created_s = int(time.time())
        account = EngineAccount(engine)
        self._metrics = ServerMetrics(engine, account)
        self._page = MemoryPage()
        server = LiveServer(front.model_names, takes_chat=front.chat_template is not None)
        self._live = LiveView(engine, server, account, self._metrics)
        self._prompts = Prompts(front, lambda: engine.info)
        self._completions = Completions(engine, front, self._prompts, self._metrics)
        self._chat = ChatCompletions(engine, front, self._prompts, self._metrics)

    def install(self, app: FastAPI) -> None:
        """Put them on their paths."""
        posts: dict[str, Handler] = {
            "/v1/completions": self._completions.answer,
            "/v1/chat/completions": self._chat.answer,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        for path, handler in posts.items():
            app.add_api_route(path, self._reading(handler), methods=["POST"], response_model=None)
        gets: dict[str, Callable[..., Awaitable[Response]]] = {
            "/": self._memory_page,
            "/health": self._health,
            "/version": self._version,
            "/metrics": self._show_metrics,
            "/memory": self._memory,
            "/memory/live": self._memory_live,
            "/memory/certificate": self._live.certificate,
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
        }
        for path, get in gets.items():
            app.add_api_route(path, get, methods=["GET"], response_model=None)

    def _reading(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def read_and_answer(request: Request) -> Response:
            return await handler(request, await read_body(request, self._max_body_bytes))

        return read_and_answer

    # -- the server itself

    async def _health(self) -> Response:
        if not self._engine.is_healthy:
            raise ApiError(503, self._engine.reason, kind="service_unavailable", code="engine_unavailable")
        return _json({"status": "ok"})

    async def _version(self) -> Response:
        return _json({"version": version("brim")})

    async def _show_metrics(self) -> Response:
        return Response(await self._metrics.page(), media_type=CONTENT_TYPE)

    async def _memory(self) -> Response:
        return _json(await self._engine.memory())

    async def _memory_page(self) -> Response:
        return self._page.response()

    async def _memory_live(self) -> Response:
        return live_response(await self._live.document())

    async def _models(self) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self._front.model_names]})

    async def _model(self, name: str) -> Response:
        return _json(self._card(self._prompts.check_model(name)))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "brim",
            "root": self._engine.info.get("model", name),
            "parent": None,
            "max_model_len": self._engine.info.get("max_model_len"),
        }

    # -- tokens

    async def _tokenize(self, request: Request, raw: bytes) -> Response:
        body = parse_body(raw, TokenizeRequest, refused={}, ignored=IGNORED)
        self._prompts.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidParameter("Give either 'prompt' or 'messages'.", param="prompt")
        if body.messages is not None:
            ids = await self._prompts.encode_chat(body.messages, {"add_generation_prompt": body.add_generation_prompt})
        else:
            ids = await self._prompts.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        tokenizer = self._front.tokenizer
        strings = [tokenizer.id_to_piece(i) or "" for i in ids] if body.return_token_strs and tokenizer is not None else None
        most = self._engine.info.get("max_model_len")
        return _json({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    async def _detokenize(self, request: Request, raw: bytes) -> Response:
        body = parse_body(raw, DetokenizeRequest, refused={}, ignored=IGNORED)
        self._prompts.check_model(body.model)
        if self._front.tokenizer is None:
            raise RequestError("This model has no tokenizer.", param="tokens")
        ids = self._prompts.checked(body.tokens, "tokens")
        return _json({"prompt": self._front.tokenizer.decode(ids, skip_special_tokens=False)})


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)
