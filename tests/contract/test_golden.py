"""The bytes on the wire stay what they are, and are the same in every language."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, GenerateSongResponse, Song, StreamAudioResponse

from .wire import GOLDEN, NAMES, encode, read_bytes, read_json

CLIENTS = Path(__file__).parents[2] / "clients"
ROUNDTRIPS = {
    "node": ["node", str(CLIENTS / "node/roundtrip.mjs")],
    "go": [str(CLIENTS / "go/build/roundtrip")],
    "cpp": [str(CLIENTS / "cpp/build/roundtrip")],
}


@pytest.mark.parametrize("name", NAMES)
def test_python_writes_the_golden_bytes(name: str) -> None:
    message = read_json(GOLDEN / f"{name}.json")
    golden = GOLDEN / f"{name}.binpb"
    assert golden.exists(), f"{name} has no bytes yet: run 'make golden' and commit"
    changed = f"{name} is no longer what clients send; if they are all to change, run 'make golden' and commit"
    assert encode(message) == golden.read_bytes(), changed


@pytest.mark.parametrize("name", NAMES)
def test_python_reads_the_golden_bytes(name: str) -> None:
    message = read_bytes(GOLDEN / f"{name}.binpb")
    assert message == read_json(GOLDEN / f"{name}.json")
    assert len(UnknownFieldSet(message)) == 0
    assert encode(message) == (GOLDEN / f"{name}.binpb").read_bytes()


def fields_of(kind: Descriptor, seen: set[str]) -> Iterator[str]:
    """The full names of all fields that a message may hold, however deep."""
    if kind.full_name in seen or not kind.full_name.startswith("soundstage."):
        return
    seen.add(kind.full_name)
    for field in kind.fields:
        yield field.full_name
        if field.message_type is not None:
            yield from fields_of(field.message_type, seen)


def set_fields_of(message: Message) -> Iterator[str]:
    """The full names of all fields that are set in a message, however deep."""
    for field, value in message.ListFields():
        yield field.full_name
        kind = field.message_type
        if kind is not None and not kind.GetOptions().map_entry:
            for inner in value if field.is_repeated else [value]:
                yield from set_fields_of(inner)


def test_every_field_of_a_song_is_in_a_golden_message() -> None:
    seen: set[str] = set()
    roots = (GenerateSongRequest, GenerateSongResponse, StreamAudioResponse, Song)
    wanted = {field for root in roots for field in fields_of(root.DESCRIPTOR, seen)}
    found = {field for name in NAMES for field in set_fields_of(read_json(GOLDEN / f"{name}.json"))}
    assert wanted - found == set(), "write them into a file of tests/contract/golden and run 'make golden'"


@pytest.mark.parametrize("language", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ROUNDTRIPS])
def test_other_languages_read_and_write_the_same(language: str, tmp_path: Path) -> None:
    if language != "node":
        subprocess.run(["make", "--silent", "--directory", str(CLIENTS / language), "build/roundtrip"], check=True)
    files = [str(GOLDEN / f"{name}.binpb") for name in NAMES]
    done = subprocess.run([*ROUNDTRIPS[language], str(tmp_path), *files], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        message = read_json(GOLDEN / f"{name}.json")
        assert read_json(tmp_path / f"{name}.json") == message, f"{language} saw something else in {name}"
        assert read_bytes(tmp_path / f"{name}.binpb") == message, f"{language} wrote something else of {name}"
