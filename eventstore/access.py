"""Who a process is to NATS, and how it knows that it speaks with the right server.

What a server may ask for: a user with a password, a token, a key (NKEY) or a credentials file (a
JWT with its key); beside that TLS, with a client certificate if it wants one. Where any TLS file is
given TLS is insisted on: a server without it is not spoken to. Password and credentials are read
from their files at every connect, so that changed ones need no restart.
"""

import base64
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from eventstore.errors import LogUnavailable

INBOX_PREFIX = "_INBOX"
"""Of the subjects on which a client gets its answers, unless told otherwise."""
GUIDE = "docs/operations.md"
_JWT = re.compile(rb"BEGIN NATS USER JWT-*\s+(\S+)")
_SEED = re.compile(rb"BEGIN USER NKEY SEED-*\s+(\S+)")


class Access(Struct, frozen=True, kw_only=True):
    """Raises LogUnavailable for a combination that cannot be meant."""

    user: str | None = None
    password: str | None = None
    password_file: Path | None = None
    token: str | None = None
    nkey: str | None = None
    """The seed, which begins with SU."""
    credentials_file: Path | None = None
    tls_ca: Path | None = None
    """PEM. None: the CAs that this machine trusts."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    inbox_prefix: str = INBOX_PREFIX

    def __post_init__(self) -> None:
        ways = {
            "a user": self.user,
            "a token": self.token,
            "an nkey": self.nkey,
            "a credentials file": self.credentials_file,
        }
        given = [way for way, value in ways.items() if value is not None]
        if len(given) > 1:
            raise LogUnavailable(f"NATS: {' and '.join(given)} are given", "one of them")
        passwords = [each for each in (self.password, self.password_file) if each is not None]
        if len(passwords) > 1:
            raise LogUnavailable("NATS: a password and a password file are given", "one of them")
        if (self.user is None) == bool(passwords):
            raise LogUnavailable(
                "NATS: a user and a password go together",
                "NATS_AUTH_USERNAME with NATS_AUTH_PASSWORD or --nats-password-file",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise LogUnavailable(
                "NATS: a client certificate and its key go together",
                "--nats-tls-cert with --nats-tls-key",
            )

    def __repr__(self) -> str:
        return f"Access({self.who})"

    @property
    def who(self) -> str:
        """For people, without secrets."""
        if self.user is not None:
            return f"user {self.user}"
        if self.token is not None:
            return "the bearer of this token"
        if self.nkey is not None:
            return "the bearer of this nkey"
        if self.credentials_file is not None:
            return f"the bearer of {self.credentials_file}"
        return "a client that names no user"

    def or_from_url(self, urls: Sequence[str]) -> Self:
        """With the user or token that an address holds, if none is said otherwise.

        The client library would use it for that address alone, and be refused by the other servers
        of the cluster, whose addresses it learns from the first.
        """
        ways = (self.user, self.token, self.nkey, self.credentials_file)
        if any(way is not None for way in ways):
            return self
        for url in urls:
            parts = urlsplit(url if "//" in url else f"nats://{url}")
            if parts.username and parts.password is not None:
                user, password = unquote(parts.username), unquote(parts.password)
                return replace(self, user=user, password=password)
            if parts.username:
                return replace(self, token=unquote(parts.username))
        return self

    def check(self) -> None:
        """Raises LogUnavailable for files and keys that cannot be used, while somebody looks on."""
        try:
            self.read_password()
            if self.nkey is not None or self.credentials_file is not None:
                self.sign("")
        except OSError as error:
            raise _unusable(self.password_file or self.credentials_file or "nkey", error) from error

    def read_password(self) -> str:
        """Raises OSError."""
        if self.password_file is None:
            return self.password or ""
        return self.password_file.read_bytes().decode(errors="replace").strip("\r\n")

    def read_jwt(self) -> bytes:
        """Of the credentials file. Raises OSError."""
        return self._credentials(_JWT)

    def sign(self, nonce: str) -> bytes:
        """A server's nonce, signed with the key, as base64. Raises OSError."""
        import nkeys  # here, because few need it

        seed = self.nkey.strip().encode() if self.nkey is not None else self._credentials(_SEED)
        try:
            signature: Any = nkeys.from_seed(bytearray(seed)).sign(nonce.encode())
        except (nkeys.NkeysError, ValueError) as error:
            raise OSError("it holds no key of a NATS user") from error
        return base64.b64encode(signature)

    def _credentials(self, part: re.Pattern[bytes]) -> bytes:
        found = part.search(self.credentials_file.read_bytes() if self.credentials_file else b"")
        if found is None:
            raise OSError("it is no credentials file of a NATS user")
        return found[1]

    def tls_context(self) -> ssl.SSLContext | None:
        """None where no TLS file is given: then the server decides. Raises LogUnavailable."""
        if self.tls_ca is None and self.tls_cert is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
        except OSError as error:  # ssl.SSLError is one
            raise _unusable(self.tls_ca, error) from error
        if self.tls_cert is not None and self.tls_key is not None:
            try:
                context.load_cert_chain(self.tls_cert, self.tls_key)
            except OSError as error:
                raise _unusable(f"{self.tls_cert} with {self.tls_key}", error) from error
        return context


def _unusable(what: object, error: OSError) -> LogUnavailable:
    return LogUnavailable(
        f"NATS: {what} cannot be used: {error.strerror or error}", "another, or mend that one"
    )


def explain(error: Exception, access: Access) -> tuple[str, str] | None:
    """What a server's refusal means and what to do about it; None where it is no refusal."""
    text = str(error).lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {error.verify_message}",
            "--nats-tls-ca with the CA that signed it, and a name that it is made out to",
        )
    if "certificate required" in text or "bad certificate" in text:
        return "it wants a client certificate", "--nats-tls-cert and --nats-tls-key"
    if "authorization violation" in text or "authentication" in text:
        return (
            f"it does not admit {access.who}",
            "NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, NATS_AUTH_TOKEN or "
            f"--nats-credentials-file, as the server knows them ({GUIDE})",
        )
    if "does not offer tls" in text:
        return "it offers no TLS", "a server with TLS, or none of the --nats-tls options"
    return None
