"""Pages of other places do nothing with a port on this machine; clients that are no browsers, and our page, do."""

import pytest
from starlette.datastructures import Headers

from soundstage_gateway.http.names import HostUnknownError, Names, OriginForeignError
from soundstage_runtime.errors import ServiceError

from .conftest import Deploy
from .web import REQUEST, client, create


@pytest.mark.parametrize(
    ("bound", "method", "headers", "error"),
    [
        ("127.0.0.1", "GET", {}, None),
        ("127.0.0.1", "GET", {"host": "localhost:50080"}, None),
        ("127.0.0.1", "GET", {"host": "LOCALHOST"}, None),
        ("127.0.0.1", "GET", {"host": "[::1]:50080"}, None),
        ("::1", "GET", {"host": "[::1]"}, None),
        ("127.0.0.2", "GET", {"host": "127.0.0.2:1"}, None),
        ("localhost", "GET", {"host": "127.0.0.1:50080"}, None),
        ("127.0.0.1", "GET", {"host": "music.example"}, None),
        ("127.0.0.1", "GET", {"host": "evil.example:50080"}, HostUnknownError),
        ("127.0.0.1", "GET", {"host": "127.0.0.1.evil.example"}, HostUnknownError),
        ("127.0.0.1", "GET", {"host": "[::1].evil.example"}, HostUnknownError),
        ("0.0.0.0", "GET", {"host": "evil.example"}, None),
        ("127.0.0.1", "GET", {"host": "localhost:1", "origin": "http://evil.example"}, None),
        ("127.0.0.1", "POST", {"host": "localhost:1", "origin": "http://localhost:1"}, None),
        ("127.0.0.1", "POST", {"host": "localhost:1", "origin": "https://music.example"}, None),
        ("127.0.0.1", "POST", {"host": "localhost:1", "origin": "http://localhost:2"}, OriginForeignError),
        ("127.0.0.1", "POST", {"host": "localhost:1", "origin": "http://evil.example"}, OriginForeignError),
        ("127.0.0.1", "DELETE", {"host": "localhost:1", "origin": "null"}, OriginForeignError),
        ("0.0.0.0", "POST", {"host": "here:1", "origin": "http://evil.example"}, OriginForeignError),
        ("0.0.0.0", "POST", {"host": "here:1", "origin": "http://here:1"}, None),
    ],
)
def test_a_name_is_known_or_refused(
    bound: str, method: str, headers: dict[str, str], error: type[ServiceError] | None
) -> None:
    names = Names(bound, ["music.example"])
    if error is None:
        names.check(method, Headers(headers))
    else:
        with pytest.raises(error):
            names.check(method, Headers(headers))


async def test_a_page_from_elsewhere_neither_reads_nor_writes(deploy: Deploy) -> None:
    foreign = {"Origin": "http://evil.example"}
    async with deploy() as deployment, client(deployment) as http:
        path = await create(http)
        answers = [
            await http.get(path, headers={"Host": "evil.example"}),
            await http.get("/", headers={"Host": "evil.example"}),
            await http.post("/v1/songs", json=REQUEST, headers=foreign),
            await http.post(f"{path}/cancel", headers=foreign),
            await http.delete(path, headers=foreign),
        ]
        own = await http.post("/v1/songs", json=REQUEST, headers={"Origin": deployment.http})
        listed = (await http.get("/v1/songs")).json()["songs"]
    assert [answer.status_code for answer in answers] == [403] * 5
    assert own.status_code == 201
    assert len(listed) == 2


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", None])
async def test_a_song_is_asked_for_in_json_that_says_so(deploy: Deploy, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.post("/v1/songs", content=b'{"caption": "a"}', headers=headers)
        right = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert (await http.post("/v1/songs", content=b'{"caption": "a"}', headers=right)).status_code == 201
    assert (answer.status_code, answer.json()["error"]["reason"]) == (415, "BODY_TYPE_UNKNOWN")
    assert "--json" in answer.json()["error"]["message"]


async def test_answers_are_what_they_say_and_the_page_asks_nobody_else(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        answers = [await http.get(path) for path in ("/", "/static/page.js", "/v1/songs", "/nowhere", "/metrics")]
    assert {answer.headers["x-content-type-options"] for answer in answers} == {"nosniff"}
    assert answers[0].headers["content-security-policy"].startswith("default-src 'self'")


async def test_every_answer_has_the_id_that_the_log_has(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await create(http)
        answers = [await http.get(where) for where in (path, f"{path}/audio.wav", f"{path}/events", "/", "/healthz")]
        named = await http.get("/nowhere", headers={"X-Request-Id": "mine"})
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert all(ids)
    assert (named.headers["x-request-id"], named.json()["error"]["requestId"]) == ("mine", "mine")
