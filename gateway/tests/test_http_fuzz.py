"""Whatever comes in by HTTP gets an answer, and none of them is a bug of ours."""

import asyncio
import json
from urllib.parse import quote

import httpx2
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Deploy, Stuck
from .web import JSON, client, create

NAMES = (
    "variant sample_rate_hz channels bit_rate_bps gain_db peak_dbfs fade_in_s fade_out_s max_buffer_s sample_format "
    "download bins page_size page_token key"
).split()
PATHS = ("audio.wav", "audio.mp3", "audio.webm", "waveform", "lyrics", "hls/index.m3u8", "hls/init.mp4", "events", "")
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "1", "2", "48000", "24000", "s16", "f32", "nan", "-inf", "1e400", "0x10", "١"]),
    st.text(max_size=20),
)
QUERIES = st.lists(st.tuples(st.one_of(st.sampled_from(NAMES), st.text(max_size=8)), VALUES), max_size=4)
HEADERS = st.dictionaries(
    st.sampled_from(["range", "if-range", "if-none-match", "last-event-id", "authorization", "idempotency-key"]),
    st.one_of(
        st.sampled_from(
            ["bytes=0-", "bytes=5-1", "bytes=-0", "bytes=0-1,3-4", "bytes=x", '"', "*", "99999999999999999999"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(str.strip),
    ),
    max_size=2,
)
TEXTS = st.one_of(st.text(max_size=20), st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
JSONS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
FIELDS = st.sampled_from(
    "caption lyrics instrumental metadata planner diffusion output variants seeds codes task source references "
    "adapters detach model durationS bpm".split()
)
BODIES = st.one_of(
    st.binary(max_size=100),
    st.dictionaries(FIELDS | TEXTS, st.one_of(JSONS, st.dictionaries(FIELDS, JSONS, max_size=3)), max_size=4).map(
        lambda found: json.dumps(found).encode()
    ),
)


def check(answer: httpx2.Response) -> None:
    assert answer.status_code in (200, 201, 206, 304, 400, 401, 404, 410, 416, 429), answer.text
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert answer.json()["error"]["message"]


async def test_no_query_is_a_bug(deploy: Deploy) -> None:
    examples: list[tuple[str, list[tuple[str, str]], dict[str, str]]] = []

    @settings(max_examples=120, database=None)
    @given(st.sampled_from(PATHS), QUERIES, HEADERS)
    def gather(path: str, query: list[tuple[str, str]], headers: dict[str, str]) -> None:
        examples.append((path, query, headers))

    gather()
    async with deploy() as deployment, client(deployment) as http:
        song = await create(http, metadata={"durationS": 1})
        await http.get(f"{song}/audio.wav")
        for path, query, headers in examples:
            written = "&".join(f"{_quote(name)}={_quote(value)}" for name, value in query)
            async with asyncio.timeout(10):
                check(await http.get(f"{song}/{path}".rstrip("/") + f"?{written}", headers=headers))
        assert deployment.listeners.in_flight == 0


async def test_no_body_is_a_bug(deploy: Deploy) -> None:
    examples: list[bytes] = []

    @settings(max_examples=120, database=None)
    @given(BODIES)
    def gather(body: bytes) -> None:
        examples.append(body)

    gather()
    async with deploy(Stuck("dit"), max_songs=2) as deployment, client(deployment) as http:
        for body in examples:
            async with asyncio.timeout(10):
                check(await http.post("/v1/songs", content=body, headers=JSON))


def _quote(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"))
