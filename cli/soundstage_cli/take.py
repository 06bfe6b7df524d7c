"""What came of a song on its way, and when."""

from dataclasses import dataclass, field

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, Completed, GenerateSongResponse


@dataclass(slots=True)
class Timeline:
    """Seconds from the call to what happened in one variant."""

    planned_s: float = 0.0
    denoised_s: float = 0.0
    header_s: float = 0.0
    first_audio_s: float = 0.0
    last_audio_s: float = 0.0

    def note(self, event: GenerateSongResponse, now_s: float) -> None:
        """Take an event's time."""
        if event.HasField("plan") or (event.HasField("progress") and event.progress.stage == STAGE_LM):
            self.planned_s = now_s
        elif event.HasField("progress") and event.progress.stage == STAGE_DIT:
            self.denoised_s = now_s
        elif event.HasField("audio_header"):
            self.header_s = now_s
        elif event.HasField("audio_chunk"):
            self.first_audio_s = self.first_audio_s or now_s
            self.last_audio_s = now_s

    @property
    def decode_share(self) -> float:
        """The part of the decode time that passed before the first audio, 0 to 1."""
        return (self.first_audio_s - self.header_s) / max(self.last_audio_s - self.header_s, 1e-9)


@dataclass(slots=True)
class Take:
    """A timeline and a Completed for every variant."""

    timelines: dict[int, Timeline] = field(default_factory=dict[int, Timeline])
    completed: dict[int, Completed] = field(default_factory=dict[int, Completed])

    def note(self, event: GenerateSongResponse, now_s: float) -> None:
        """Take an event, so many seconds after the call."""
        self.timelines.setdefault(event.variant, Timeline()).note(event, now_s)
        if event.HasField("completed"):
            self.completed[event.variant] = event.completed
