"""The server's certificate, and its successor once it has been renewed on disk."""

import asyncio
import hashlib
import logging
import ssl
from pathlib import Path
from typing import NoReturn, TypeAlias

LOOK_S = 2.0
"""How often the files are looked at. A change is taken up once two looks saw the same."""

Seen: TypeAlias = tuple[tuple[int, int, int], ...]

_log = logging.getLogger(__name__)


class BadCertificate(Exception):
    """Why no TLS can be spoken with these files, in one line that names one."""


class Certificate:
    """`context` is for listening. Each handshake gets the pair that was loaded last.

    A new pair gets a context of its own, which is complete or is thrown away: so a file that is
    half written, or a key that is not yet the certificate's, never replaces what works.
    """

    def __init__(self, cert_path: Path, key_path: Path) -> None:
        """Both are PEM; the certificate may be followed by its chain. Raises BadCertificate."""
        self._cert_path = cert_path
        self._key_path = key_path
        self._loaded = self._seen = self._look()
        self._current = self.context = _context(cert_path, key_path)
        self.context.sni_callback = self._choose  # also called for a client that names no server

    def _choose(
        self, handshake: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        handshake.context = self._current

    async def follow(self, look_s: float = LOOK_S) -> NoReturn:
        """Take up what the files become, until cancelled. What does not work is logged, once."""
        while True:
            await asyncio.sleep(look_s)
            self.refresh()

    def refresh(self) -> None:
        """One look at the files. Cost: two `stat`, and reading both files after a change."""
        seen, before = self._look(), self._seen
        self._seen = seen
        if seen != before or seen == self._loaded:
            return
        self._loaded = seen
        try:
            self._current = _context(self._cert_path, self._key_path)
        except BadCertificate as error:
            _log.error("the renewed certificate is no good, the one before stays: %s", error)
        else:
            _log.info("certificate renewed sha256=%s", _fingerprint(self._cert_path))

    def _look(self) -> Seen:
        """A file that is missing is told apart from each that is there."""
        found = []
        for path in (self._cert_path, self._key_path):
            try:
                status = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)


def _context(cert_path: Path, key_path: Path) -> ssl.SSLContext:
    for path in (cert_path, key_path):
        try:
            path.read_bytes()
        except OSError as error:
            raise BadCertificate(f"can't read {path}: {error.strerror or error}") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password of ours, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert_path, key_path, password="")
    except OSError as error:  # ssl.SSLError is one
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise BadCertificate(f"{key_path} is not the key of {cert_path}") from error
        raise BadCertificate(
            f"{cert_path} and {key_path} are not a certificate and its key, unencrypted, in PEM"
        ) from error
    return context


def _fingerprint(cert_path: Path) -> str:
    """Of the first certificate in the file; empty if it has gone again."""
    try:
        first, end, _ = cert_path.read_text(encoding="ascii").partition(ssl.PEM_FOOTER)
    except (OSError, UnicodeDecodeError):
        return ""
    _, begin, body = first.partition(ssl.PEM_HEADER)
    if not (begin and end):
        return ""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(begin + body + end)).hexdigest()
