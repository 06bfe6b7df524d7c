"""Keys: who may come in."""

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Final

import grpc
import structlog

from soundstage_runtime.errors import ServiceError, StartError

_log = structlog.get_logger()

_SCHEME: Final = "bearer "


class KeyMissingError(ServiceError):
    """The call has no key."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "KEY_MISSING"


class KeyUnknownError(ServiceError):
    """The call's key is none of ours."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "KEY_UNKNOWN"


class Keys:
    """The keys in a file, one a line, `#` before a comment; a file that changes is read again. Raises StartError.

    `own` is a key for calls that the process makes to itself.
    """

    def __init__(self, file: Path) -> None:
        self.own: Final = secrets.token_urlsafe()
        self._file = file
        self._digests: list[bytes] = []
        self._version = (0, 0)
        try:
            self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"the keys file {file} cannot be read: {error}") from error
        _log.info("keys_on", file=str(file), num_keys=len(self._digests))

    def check(self, authorization: str) -> None:
        """Take "Bearer {key}"; raises KeyMissingError or KeyUnknownError."""
        if not authorization:
            raise KeyMissingError("no key came with the call; send it as `authorization: Bearer KEY`")
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise KeyMissingError("authorization names another scheme; send `authorization: Bearer KEY`")
        self._refresh()
        digest = _digest(authorization[len(_SCHEME) :].strip())
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in (_digest(self.own), *self._digests)]
        if not any(matches):
            raise KeyUnknownError("the key is not known here; ask who runs this deployment for one")

    def _refresh(self) -> None:
        try:
            if self._stamp() != self._version:
                self._read()
                _log.info("keys_read_again", num_keys=len(self._digests))
        except (OSError, UnicodeDecodeError) as error:  # a file that is being replaced: the keys of before hold
            _log.warning("keys_unreadable", error=str(error))

    def _read(self) -> None:
        version = self._stamp()
        lines = (line.partition("#")[0].strip() for line in self._file.read_text().splitlines())
        self._digests = [_digest(line) for line in lines if line]
        self._version = version

    def _stamp(self) -> tuple[int, int]:
        stat = self._file.stat()
        return stat.st_mtime_ns, stat.st_size


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
