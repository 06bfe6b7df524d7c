"""What HTTP requests say, as messages of the contract; and messages as JSON."""

import json
import re
from typing import Any, Final, TypeVar, cast

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from starlette.requests import Request

from soundstage_gateway.http.errors import BodyTypeError
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.request_stream import patient
from soundstage_runtime.validation import Checks

MAX_JSON_BYTES: Final = 1 << 20
NO_CALL: Final = cast(Any, None)  # the servicers are called without gRPC, and look at nothing of the call
_IDLE_TIMEOUT_S: Final = 30.0
_KEY: Final = "key"
_JSON: Final = "application/json"
_WHOLE: Final = re.compile("[0-9]{1,18}")
_MAX_UINT32: Final = (1 << 32) - 1
_NUMBER: Final = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")

M = TypeVar("M", bound=Message)


async def read_message(request: Request, kind: type[M]) -> M:
    """Read a body as a message in protobuf's JSON; raises BodyTypeError, InvalidRequestError."""
    told = request.headers.get("content-type", "")
    if told.partition(";")[0].strip().lower() != _JSON:
        raise BodyTypeError(f"Content-Type is {told[:80]!r}; send {_JSON}, as curl does with --json in place of -d")
    body = bytearray()
    async for piece in patient(request.stream(), timeout_s=_IDLE_TIMEOUT_S):
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise refusal("body", f"is more than {MAX_JSON_BYTES} bytes; a request for a song is shorter")
    try:
        found = json.loads(bytes(body))
        if not isinstance(found, dict):
            raise refusal("body", f"is no JSON object; send a {kind.DESCRIPTOR.name} in protobuf's JSON")
        json.dumps(found, ensure_ascii=False).encode()  # protobuf takes no half of a surrogate pair, nor says so
        return ParseDict(cast("dict[str, Any]", found), kind())
    except ParseError as error:
        raise refusal("body", f"is no {kind.DESCRIPTOR.name}: {str(error).splitlines()[0][:300]}") from error
    except UnicodeEncodeError as error:
        raise refusal("body", f"has \\u{ord(error.object[error.start]):04x}, half of a surrogate pair") from error
    except RecursionError as error:
        raise refusal("body", "is nested too deep; a request is a few levels deep") from error
    except ValueError as error:  # of json and of UTF-8
        raise refusal("body", f"is no JSON: {error}") from error


def write_message(message: Message) -> dict[str, Any]:
    """Write a message in protobuf's JSON."""
    return MessageToDict(message)


def refusal(field: str, description: str) -> InvalidRequestError:
    """Return the error for one bad field."""
    return InvalidRequestError([Violation(field=field, description=description)])


class Query:
    """A request's query, read name by name. What is bad goes to `checks`, and so does what nobody has asked for."""

    def __init__(self, request: Request) -> None:
        self.checks = Checks()
        self._left: dict[str, str] = {}
        self._known: list[str] = []
        for name, value in request.query_params.multi_items():
            if name in self._left:
                self.checks.refuse(name[:40], "is there twice; give it once")
            self._left[name] = value
        self._left.pop(_KEY, None)

    def text(self, name: str) -> str | None:
        """Return a value as it is; None when it is not there."""
        self._known.append(name)
        return self._left.pop(name, None)

    def whole(self, name: str, low: int = 0, high: int = _MAX_UINT32) -> int | None:
        """Return a whole number in [low, high]."""
        value = self.text(name)
        if value is not None and not (_WHOLE.fullmatch(value) and low <= int(value) <= high):
            self.checks.refuse(name, f"is {value[:40]!r}; must be a whole number from {low} to {high}")
            return None
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """Return a number."""
        value = self.text(name)
        if value is not None and not _NUMBER.fullmatch(value):
            self.checks.refuse(name, f"is {value[:40]!r}; must be a number")
            return None
        return None if value is None else float(value)

    def finish(self) -> None:
        """Raise InvalidRequestError if anything was bad, or is left."""
        for name in self._left:
            known = ", ".join(self._known) or "this takes none"
            self.checks.refuse(name[:40] or "query", f"is not known; known are: {known}")
        self.checks.finish()
