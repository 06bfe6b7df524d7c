"""Assets: the audio that clients have sent, kept until newer audio pushes it out."""

from collections import OrderedDict

from soundstage_gateway.audio_file import Recording


class Assets:
    """Recordings by name, at most `limit_bytes` of samples; the one that was used least recently goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[str, Recording] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """What the kept samples take."""
        return sum(recording.samples.nbytes for recording in self._kept.values())

    def find(self, name: str) -> Recording | None:
        """Return a recording and count it as used; None when it is not, or no longer, kept."""
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def keep(self, name: str, recording: Recording) -> None:
        """Keep a recording, whatever others have to go for it."""
        self._kept[name] = recording
        self._kept.move_to_end(name)
        while self.size_bytes > self._limit_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
