"""Names: whom a request may call, and whose page may send it. A browser sends any page's requests to any port."""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

import grpc
from starlette.datastructures import Headers

from soundstage_runtime.errors import ServiceError

_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_READING: Final = ("GET", "HEAD")


class HostUnknownError(ServiceError):
    """The request calls another host, as a page's does whose own name leads here."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "HOST_UNKNOWN"


class OriginForeignError(ServiceError):
    """A page from elsewhere wants to change something."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ORIGIN_FOREIGN"


class Names:
    """The names of a port that is bound to `host`, besides its own those that a proxy gives it.

    What is bound to this machine alone trusts whoever reaches it, so it looks that no page does.
    """

    def __init__(self, host: str, names: Sequence[str] = ()) -> None:
        self._given = frozenset(name.lower() for name in names)
        self._known = self._given | {*_LOOPBACK, host.lower()} if _is_loopback(host) else None

    def check(self, method: str, headers: Headers) -> None:
        """Raise HostUnknownError or OriginForeignError."""
        host = headers.get("host", "").lower()
        if host and self._known is not None and _without_port(host) not in self._known:
            raise HostUnknownError(f"Host is {host[:80]!r}, which is not known here; --http-names tells of more names")
        origin = headers.get("origin", "").lower()
        if not origin or method in _READING:
            return
        from_host = origin.partition("://")[2]
        if from_host != host and _without_port(from_host) not in self._given:
            raise OriginForeignError(f"Origin is {origin[:80]!r}; pages from elsewhere may not change anything here")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _without_port(host: str) -> str:
    end = host.rfind(":")
    return host if end <= host.rfind("]") else host[:end]
