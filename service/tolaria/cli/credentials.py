"""`tolaria certs` and `tolaria token`: the files that a protected service and its clients need."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.errors import CredentialsError

if TYPE_CHECKING:
    from tolaria.security.issuing import Issuer
    from tolaria.security.tokens import Token

RENEW_DAYS = 30
_DAYS_MAX = 3650

RoleName = StrEnum("RoleName", ["VIEWER", "OPERATOR", "ADMIN"])

Folder = Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the files are; made if it is missing.")]
CaFolder = Annotated[
    Path | None, typer.Option("--ca-dir", metavar="DIR", help="Where ca.key is (default: where the files are).")
]
TokenFile = Annotated[Path, typer.Option("--file", metavar="FILE", help="The file that server.tokens names.")]
TokenName = Annotated[str, typer.Argument(metavar="NAME", help="Appears in log, journal and metrics.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Days = Annotated[int, typer.Option(min=1, max=_DAYS_MAX, help="Days until the certificate expires.")]

certs_app = typer.Typer(help="Make a private CA and certificates for TLS.", no_args_is_help=True)
token_app = typer.Typer(help="Make, list and revoke the tokens of operators.", no_args_is_help=True)


@certs_app.command("init")
def init_certs(
    *,
    folder: Folder,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="A name or address of the server, besides those of loopback."),
    ] = None,
    days: Days = 365,
    ca_folder: CaFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make what is missing of ca.pem, ca.key, server.pem and server.key.

    A server certificate that lacks a host, or expires within 30 days, is made anew; a running service takes it
    without a restart. ca.key signs further certificates: with --ca-dir it is kept away from the service.
    """
    from tolaria.security import issuing
    from tolaria.security.certificates import now_utc

    now = now_utc()
    _make_folder(folder)
    issuer = _issuer(folder, ca_folder, now)
    wanted = [*(hosts or []), *issuing.LOCAL_HOSTS]
    path = folder / "server.pem"
    if issuing.lasts(path, wanted, now + timedelta(days=min(RENEW_DAYS, days - 1))):
        said = [f"{path} is there, and valid for {', '.join(wanted)}"]
        _say(_made(folder, path, made=False), said, as_json=as_json)
        return
    issuer.issue(folder, "server", hosts=wanted, days=days, now=now)
    said = [
        f"made {path} for {', '.join(wanted)}: set server.tls_cert={path} server.tls_key={folder / 'server.key'}",
        f"clients verify it with TOLARIA_TLS_CA={folder / 'ca.pem'}",
    ]
    _say(_made(folder, path), said, as_json=as_json)


@certs_app.command("client")
def client_cert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the client; appears in log and journal.")],
    *,
    folder: Folder,
    days: Days = 365,
    ca_folder: CaFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make NAME.pem and NAME.key for a client of a service with server.tls_client_ca (mutual TLS)."""
    from tolaria.security.certificates import now_utc
    from tolaria.security.tokens import NAME

    if not NAME.fullmatch(name) or name in {"ca", "server"}:
        raise typer.BadParameter("a name has 1 to 64 letters, digits and . _ @ -, and is neither ca nor server")
    now = now_utc()
    _make_folder(folder)
    path = _issuer(folder, ca_folder, now).issue(folder, name, hosts=(), days=days, now=now)
    said = [
        f"made {path}: clients set TOLARIA_TLS_CERT={path} TOLARIA_TLS_KEY={folder / name}.key",
        f"the service requires such certificates with server.tls_client_ca={folder / 'ca.pem'}",
    ]
    _say(_made(folder, path), said, as_json=as_json)


@token_app.command("new")
def new(
    name: TokenName,
    *,
    role: Annotated[RoleName, typer.Option(help="viewer: reads; operator: also acts; admin: also ends runs.")],
    file: TokenFile,
    days: Annotated[
        int | None, typer.Option(min=1, max=_DAYS_MAX, help="Days until it expires (default: it does not).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the token to this file instead of printing it.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Do nothing if there is a token of this name already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a token and add its digest to the file; the token itself is shown once and stored nowhere else.

    A running service takes the changed file within seconds.
    """
    from tolaria.security import issuing, tokens
    from tolaria.security.certificates import now_utc

    if any(entry.name == name for entry in _entries(file)):
        if keep:
            document = {"name": name, "file": str(file), "made": False}
            _say(document, [f"{file} has a token {name} already"], as_json=as_json)
            return
        raise CredentialsError("--file", str(file), f"there is a token {name} already; revoke it first")
    text = tokens.new_token()
    expires = None if days is None else now_utc() + timedelta(days=days)
    table = tokens.as_table(name, tokens.Role[role.name], text, expires)
    content = file.read_text(encoding="utf-8") if file.exists() else ""
    if out is not None:  # before the digest: a token that cannot be written must not be valid
        _make_folder(out.parent)
        issuing.write_private(out, f"{text}\n".encode())
    _make_folder(file.parent)
    issuing.write_private(file, f"{content.rstrip()}\n\n{table}".lstrip().encode())
    document = {"name": name, "file": str(file), "made": True}
    if out is None:
        _say(document | {"token": text}, [text], as_json=as_json, data=True)
    else:
        said = [f"made {out}: clients set TOLARIA_TOKEN_FILE={out}"]
        _say(document | {"token_file": str(out)}, said, as_json=as_json)


@token_app.command("list")
def list_tokens(*, file: TokenFile, as_json: AsJson = False) -> None:
    """List names, roles and expiry."""
    from tolaria.security.certificates import now_utc

    if not file.exists():
        raise CredentialsError("--file", str(file), "there is no such file")
    now, said, document = now_utc(), [], []
    for entry in _entries(file):
        expiry, expired = "does not expire", False
        if entry.expires is not None:
            expired = entry.expires <= now
            expiry = f"{'expired' if expired else 'expires'} {entry.expires:%Y-%m-%d %H:%M} UTC"
        role, expires = entry.role.name.lower(), None if entry.expires is None else entry.expires.isoformat()
        said.append(f"{entry.name:<20} {role:<9} {expiry}")
        document.append({"name": entry.name, "role": role, "expires": expires, "expired": expired})
    _say(document, said, as_json=as_json, data=True)


@token_app.command("revoke")
def revoke(name: TokenName, *, file: TokenFile, as_json: AsJson = False) -> None:
    """Remove a token from the file; a running service refuses it within seconds."""
    from tolaria.security import issuing, tokens

    entries = _entries(file)
    left = [entry for entry in entries if entry.name != name]
    if len(left) == len(entries):
        raise CredentialsError("--file", str(file), f"there is no token {name}")
    if not left:
        raise CredentialsError("--file", str(file), f"{name} is the only token; a service needs at least one")
    issuing.write_private(file, "\n".join(tokens.table_of(entry) for entry in left).encode())
    _say({"name": name, "file": str(file), "revoked": True}, [f"revoked {name}"], as_json=as_json)


def _made(folder: Path, path: Path, *, made: bool = True) -> dict[str, object]:
    """Returns a certificate as a document."""
    return {"made": made, "cert": str(path), "key": str(path.with_suffix(".key")), "ca": str(folder / "ca.pem")}


def _say(document: object, lines: Sequence[str], *, as_json: bool, data: bool = False) -> None:
    """Prints what a command has done: `data` and JSON on standard output, sentences for people on standard error."""
    for line in [json.dumps(document, indent=2)] if as_json else lines:
        typer.echo(line, err=not (as_json or data))


def _entries(file: Path) -> tuple[Token, ...]:
    from tolaria.security.tokens import Tokens

    return Tokens.read(str(file))[0].entries if file.exists() else ()


def _issuer(folder: Path, ca_folder: Path | None, now: datetime) -> Issuer:
    """Returns the CA, and puts its certificate beside those that it signs."""
    from tolaria.security import issuing

    if ca_folder is None:
        return issuing.Issuer.open(folder, now)
    _make_folder(ca_folder)
    issuer = issuing.Issuer.open(ca_folder, now)
    issuing.write_public(folder / "ca.pem", issuer.certificate_pem)
    return issuer


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CredentialsError("--dir", str(folder), error.strerror or str(error)) from None
