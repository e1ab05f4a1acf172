"""How can programs talk to an exported model? An HTTP server with OpenAI's completions endpoint, for a trial.

    python tools/serve.py OUT --port 8000
    python -c 'import openai; c = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-");
               print(c.completions.create(model="OUT", prompt="Once upon", max_tokens=50).choices[0].text)'

POST /v1/completions, GET /v1/models, DELETE /v1/sessions/ID. Needs: pip install 'titans_pretrain[serve]'.

It listens on this machine only. Whoever lets it listen elsewhere gives it a token (--token-file, or the environment variable
TITANS_SERVE_TOKEN), which clients send as their API key; encryption is a reverse proxy's task.

Requests are written together, one forward a token for all (--batch). With "session": "NAME" in the body (the openai client's
extra_body) the model goes on from all that session has read and written before, at the cost of the new text alone; the
server keeps --max-sessions of them, in memory. What the server does not support it refuses.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.generate import Row
from titans_pretrain.inference.sampling import SamplingOptions
from titans_pretrain.inference.serving import Busy, End, Failure, Job, SessionError, Sessions, Text, Worker
from tools.generate import choose_device

TOKEN_VARIABLE = "TITANS_SERVE_TOKEN"
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


def build_app(worker: Worker, name: str, token: str, max_tokens: int) -> Any:
    """The ASGI application. token "": whoever can reach it may use it."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException

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


async def read_json(request: Any) -> Any:
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


# ------------------------------------------------------------------------------------------------------------ the command


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve an exported model with OpenAI's completions endpoint.")
    parser.add_argument("model", metavar="OUT", type=Path, help="folder written by tools/convert_checkpoint.py export")
    parser.add_argument("--name", default="", help="the model's name for clients (default: the folder's)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed (default 8000)")
    parser.add_argument("--token-file", type=Path, help=f"file with the bearer token; or set {TOKEN_VARIABLE}")
    parser.add_argument(
        "--without-token", action="store_true", help="listen beyond this machine though there is no token"
    )
    parser.add_argument("--batch", type=int, default=8, help="texts written together (default 8)")
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="texts that may wait; more are refused (default 256)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=65536, help="most tokens a request may ask for (default 65536)"
    )
    parser.add_argument("--max-sessions", type=int, default=16, help="session states kept (default 16; 0: none)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: CUDA where there is one"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default 0: torch's choice)")
    options = parser.parse_args(arguments)

    for name, low, high in (
        ("port", 0, 65535),
        ("batch", 1, 4096),
        ("max_waiting", 1, 10**6),
        ("max_tokens", 1, 10**9),
        ("max_sessions", 0, 10**6),
        ("threads", 0, 4096),
    ):
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(options, name)}")
    token = read_token(options.token_file)
    if not token and not options.without_token and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} can be reached from other machines and there is no token: give --token-file or set "
            f"{TOKEN_VARIABLE}, or say --without-token"
        )
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'titans_pretrain[serve]'") from error
    if options.threads:
        torch.set_num_threads(options.threads)
    export = load_export(options.model, choose_device(options.device))
    worker = Worker(
        export.model,
        export.tokenizer,
        batch=options.batch,
        waiting=options.max_waiting,
        piece=export.info.config.data.seq_len,
        sessions=Sessions(options.max_sessions),
    )
    name = options.name or options.model.resolve().name
    listener = listen(options.host, options.port)
    app = build_app(worker, name, token, options.max_tokens)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        worker.close()


def read_token(path: Path | None) -> str:
    """From the file, else the environment; "" where there is neither."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --token-file {path}: {getattr(error, 'strerror', error)}") from error
    if not token:
        raise UserError(f"--token-file {path} is empty")
    return token


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


if __name__ == "__main__":
    main()
