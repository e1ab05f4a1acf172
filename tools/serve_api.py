"""What does the server of tools/serve.py answer? OpenAI's completions endpoint, and sessions, as an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from titans_pretrain.errors import UserError
from titans_pretrain.inference.generate import Row
from titans_pretrain.inference.sampling import SamplingOptions
from titans_pretrain.inference.serving import Busy, End, Failure, Job, SessionError, Text, Worker

MAX_BODY = 32 << 20
"""Bytes of a request."""
MAX_CHOICES = 128
"""Texts of one request: prompts times n."""


class Refusal(Exception):
    """What a client got wrong, as OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ------------------------------------------------------------------------------------------------ what a client asks for


class Wanted(NamedTuple):
    """A request for completions, checked."""

    prompts: list[str | list[int]]
    n: int
    max_tokens: int
    sampling: SamplingOptions
    seed: int
    stop: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    session: str


# Fields of OpenAI's that this server does not do, and the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
KNOWN = {
    *("model", "prompt", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "echo", "stream"),
    *("stream_options", "session", "user"),
}


def parse(body: Any, served: str, max_tokens: int, vocabulary: int) -> Wanted:
    """The request in a JSON body.

    Raises:
        Refusal: a field of the wrong type or value, or one this server does not know.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the request must be a JSON object")
    for name, value in body.items():
        if name in NOT_DONE:
            if not any(value == nothing and type(value) is not bool for nothing in NOT_DONE[name]):
                raise Refusal(
                    400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter"
                )
        elif name not in KNOWN:
            raise Refusal(400, f"unknown field {name!r}", name, "unknown_parameter")
    given = {name: value for name, value in body.items() if value is not None}

    def number(name: str, default: Any, low: float, high: float, whole: bool = True) -> Any:
        value = given.get(name, default)
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            kind = "an integer" if whole else "a number"
            raise Refusal(400, f"{name} must be {kind} from {low} to {high}, not {value!r}", name)
        return value

    def flag(source: dict[str, Any], name: str) -> bool:
        value = source.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(400, f"{name} must be true or false, not {value!r}", name)
        return value

    if given.get("model") != served:
        raise Refusal(
            404, f"there is no model {given.get('model')!r}; this server has {served!r}", "model", "model_not_found"
        )
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(x, str) and x for x in stop):
        raise Refusal(400, f"stop must be a text or a list of up to 4 texts, none empty, not {stop!r}", "stop")
    stream_options = given.get("stream_options", {})
    if not isinstance(stream_options, dict) or stream_options.keys() - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, f"stream_options may hold include_usage, not {stream_options!r}", "stream_options")
    if flag(stream_options, "include_obfuscation"):
        raise Refusal(
            400, "stream_options.include_obfuscation is not supported", "stream_options", "unsupported_parameter"
        )
    session = given.get("session", "")
    if not isinstance(session, str) or len(session) > 200 or ("session" in given and not session):
        raise Refusal(400, "session must be a text of 1 to 200 characters", "session")
    prompts = prompts_of(given.get("prompt", ""), vocabulary)
    n = number("n", 1, 1, MAX_CHOICES)
    if len(prompts) * n > MAX_CHOICES:
        raise Refusal(400, f"{len(prompts)} prompts times n = {n} is more than {MAX_CHOICES} texts", "n")
    if session and len(prompts) * n > 1:
        raise Refusal(400, "a session goes on with one text: give one prompt and n = 1", "session")
    echo = flag(given, "echo")
    if echo and not isinstance(prompts[0], str):
        raise Refusal(400, "echo needs prompts of text, not of token ids", "echo")
    return Wanted(
        prompts=prompts,
        n=n,
        max_tokens=number("max_tokens", 16, 0, max_tokens),
        sampling=SamplingOptions(
            number("temperature", 1.0, 0, 2, whole=False),
            number("top_k", 0, 0, 2**31),
            number("top_p", 1.0, 1e-9, 1, whole=False),
        ),
        seed=number("seed", secrets.randbits(62), 0, 2**62),
        stop=tuple(stop),
        echo=echo,
        stream=flag(given, "stream"),
        include_usage=flag(stream_options, "include_usage"),
        session=session,
    )


def prompts_of(prompt: Any, vocabulary: int) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""

    def ids(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) > 0
            and all(type(token) is int and 0 <= token < vocabulary for token in value)
        )

    if isinstance(prompt, str) or ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(x, str) for x in prompt) or all(map(ids, prompt))):
        return prompt
    raise Refusal(
        400, f"prompt must be a text, a list of token ids below {vocabulary}, or a list of one of these kinds", "prompt"
    )


# -------------------------------------------------------------------------------------------------------- the application


def build_app(worker: Worker, name: str, token: str, max_tokens: int) -> FastAPI:
    """The ASGI application. token "": whoever can reach it may use it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    described = {"id": name, "object": "model", "created": started, "owned_by": "titans_pretrain"}

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body, error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(refusal.body, error.status_code)

    def check_token(request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise Refusal(401, "the bearer token (API key) is missing or wrong", code="invalid_api_key")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_token(request)
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        check_token(request)
        if model != name:
            raise Refusal(404, f"there is no model {model!r}; this server has {name!r}", "model", "model_not_found")
        return described

    @app.delete("/v1/sessions/{session:path}")
    async def delete_session(request: Request, session: str) -> dict[str, Any]:
        check_token(request)
        try:
            return {"id": session, "object": "session", "deleted": worker.sessions.delete(session)}
        except SessionError as error:
            raise Refusal(409, str(error), "session", error.code) from error

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        check_token(request)
        wanted = parse(await read_json(request), name, max_tokens, worker.tokenizer.vocab_size)
        answer = Answer(wanted, name, worker.tokenizer.eos_id, worker.tokenizer.vocab_size)
        try:
            worker.submit(answer.jobs)
        except SessionError as error:
            raise Refusal(409, str(error), "session", error.code) from error
        except Busy as error:
            raise Refusal(429, str(error), code="overloaded") from error
        except UserError as error:
            raise Refusal(400, str(error), "prompt") from error
        if wanted.stream:
            return StreamingResponse(
                answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return JSONResponse(await answer.whole(request.is_disconnected))

    return app


async def read_json(request: Request) -> Any:
    """The body. A web page can send no JSON to a server of another origin without asking, and it is not allowed here."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the content type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(413, f"the request is longer than {MAX_BODY} bytes")
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the request is not JSON: {error}") from error


class Answer:
    """The choices of one request as they come."""

    def __init__(self, wanted: Wanted, model: str, eos_id: int, num_tokens: int) -> None:
        self.wanted = wanted
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Text | End | Failure]] = asyncio.Queue()

        def emitter(index: int) -> Callable[[Text | End | Failure], None]:
            def emit(event: Text | End | Failure) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return emit

        self.prompts = [prompt for prompt in wanted.prompts for _ in range(wanted.n)]
        self.jobs = [
            Job(
                prompt,
                Row(wanted.max_tokens, wanted.sampling, wanted.seed + index, eos_id, num_tokens),
                emitter(index),
                wanted.stop,
                wanted.session,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        self._ends: dict[int, End] = {}

    async def events(self) -> AsyncIterator[tuple[int, Text | End]]:
        """(choice, text or end), until all have ended. Whoever leaves early stops the writing."""
        try:
            while len(self._ends) < len(self.jobs):
                index, event = await self._events.get()
                if isinstance(event, Failure):
                    raise Refusal(500, event.message)
                if isinstance(event, End):
                    self._ends[index] = event
                yield index, event
        finally:
            for job in self.jobs:
                job.cancel()

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            if self.wanted.echo:
                for index, prompt in enumerate(self.prompts):
                    yield self._event([choice(index, str(prompt), None)])
            async for index, event in self.events():
                if isinstance(event, Text):
                    yield self._event([choice(index, event.text, None)])
                else:
                    yield self._event([choice(index, "", event.reason)], session=True)
            if self.wanted.include_usage:
                yield self._event([], usage=self._usage())
            yield "data: [DONE]\n\n"
        except Refusal as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            self.cancel()

    async def whole(self, gone: Callable[[], Any]) -> dict[str, Any]:
        """The response that is not streamed. `gone` says whether the client has left."""
        texts = [str(prompt) if self.wanted.echo else "" for prompt in self.prompts]

        async def collect() -> None:
            async for index, event in self.events():
                if isinstance(event, Text):
                    texts[index] += event.text

        task = asyncio.ensure_future(collect())
        try:
            while not (await asyncio.wait({task}, timeout=0.25))[0]:
                if await gone():
                    break
            if task.done():
                task.result()
        finally:
            self.cancel()
            task.cancel()
        choices = [
            choice(index, text, self._ends[index].reason) for index, text in enumerate(texts) if index in self._ends
        ]
        return {**self.head, "choices": choices, "usage": self._usage(), **self._session()}

    def _event(self, choices: list[dict[str, Any]], usage: Any = None, session: bool = False) -> str:
        more = {"usage": usage} if self.wanted.include_usage else {}
        line = {**self.head, "choices": choices, **more, **(self._session() if session else {})}
        return f"data: {json.dumps(line, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, int]:
        prompt = sum(end.prompt_tokens for i, end in self._ends.items() if i % self.wanted.n == 0)
        written = sum(end.written for end in self._ends.values())
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _session(self) -> dict[str, Any]:
        if not self.wanted.session or 0 not in self._ends:
            return {}
        return {"session": {"id": self.wanted.session, "tokens": self._ends[0].session_tokens}}


def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
