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
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.inference.export import load_export
from titans_pretrain.inference.serving import Sessions, Worker
from tools.generate import choose_device

TOKEN_VARIABLE = "TITANS_SERVE_TOKEN"


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
        import uvicorn

        from tools.serve_api import build_app
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
