"""Where does a dataset lie, and how is one of its files named there?

A location is a local path, `http://...`, `https://...`, `s3://BUCKET/PREFIX`, or `pipe:COMMAND` whose output is the file;
`{name}` in the command stands for the file's name.
"""

from __future__ import annotations

import re
import shlex
import urllib.parse
from pathlib import Path

from titans_pretrain.errors import UserError

REMOTE_SCHEMES = ("http", "https", "s3", "pipe")


def scheme_of(location: str | Path) -> str:
    """One of REMOTE_SCHEMES, or "" for a local path.

    Raises:
        UserError: a scheme that is not known, or a location that lacks a part.
    """
    text = str(location)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    scheme = match[1].lower() if match else ""
    if scheme == "pipe":
        if "{name}" not in text:
            raise UserError(
                f"{text!r} must hold {{name}}, which stands for the name of the file that it writes to stdout"
            )
        return scheme
    if "://" not in text:
        # Path("http://a") is "http:/a": somebody made a path of it on the way here.
        if scheme in REMOTE_SCHEMES and text[len(scheme) :].startswith(":/"):
            raise UserError(f"{text!r} is not a URL: {scheme}: is followed by two slashes")
        return ""
    if scheme not in REMOTE_SCHEMES:
        raise UserError(
            f"{text!r}: a dataset is a local path, or starts with http://, https://, s3:// or pipe:; for anything else use "
            "pipe:COMMAND with {name} for the file"
        )
    parts = urllib.parse.urlsplit(text)
    if not parts.netloc:
        raise UserError(f"{text!r} lacks the {'bucket' if scheme == 's3' else 'host'} after ://")
    if scheme != "s3" and "@" in parts.netloc:
        raise UserError(
            f"{text.split('://')[0]}://...@{parts.netloc.rsplit('@')[-1]}{parts.path}: a password in a URL ends up in logs and "
            "checkpoints; use pipe:curl with a .netrc file, for example 'pipe:curl -fsn https://host/set/{name}'"
        )
    return scheme


def url_of(location: str, name: str) -> str:
    """The URL of file `name`, or the command that writes it. A query (a signature, a token) stays at the end."""
    if location.startswith("pipe:"):
        return location.replace("{name}", shlex.quote(name))
    if location.startswith("s3:"):
        return f"{location.rstrip('/')}/{name}"
    parts = urllib.parse.urlsplit(location)
    return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"))


def shown(url: str) -> str:
    """`url` as a message may show it: without the query, which may be a secret."""
    return url.split("?", 1)[0] if url.startswith(("http:", "https:")) else url
