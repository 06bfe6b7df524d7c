"""Golden messages: JSON that people read, beside the bytes that Python makes of it. Run, it writes the bytes anew."""

from pathlib import Path

from google.protobuf.descriptor_pool import Default
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from soundstage.music.v1 import song_service_pb2
from soundstage.type.v1 import tensor_pb2

FILES = (
    song_service_pb2,
    tensor_pb2,
    status_pb2,
    error_details_pb2,
)  # what they declare is known once they are imported
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def empty(name: str) -> Message:
    """Return an empty message of the type that a golden message's name begins with: "{type}.{case}"."""
    return GetMessageClass(Default().FindMessageTypeByName(name.rpartition(".")[0]))()


def read_json(path: Path) -> Message:
    """Read a golden message; raises google.protobuf.json_format.ParseError if the contract has not such fields."""
    return Parse(path.read_text(encoding="utf-8"), empty(path.stem))


def read_bytes(path: Path) -> Message:
    """Read a golden message from the wire."""
    message = empty(path.stem)
    message.ParseFromString(path.read_bytes())
    return message


def encode(message: Message) -> bytes:
    """Write a message, the entries of its maps in order."""
    return message.SerializeToString(deterministic=True)


if __name__ == "__main__":
    for name in NAMES:
        (GOLDEN / f"{name}.binpb").write_bytes(encode(read_json(GOLDEN / f"{name}.json")))
