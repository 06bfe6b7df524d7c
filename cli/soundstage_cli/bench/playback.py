"""What a listener hears who plays a song at the rate of time, from its first piece on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Playback:
    """How long one listener waited: before the first sound, and for every time the music ran dry."""

    first_audio_s: float
    gaps_s: Sequence[float]

    @property
    def worst_wait_s(self) -> float:
        """The longest wait for sound, the first one included."""
        return max((self.first_audio_s, *self.gaps_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Audience:
    """What many listeners heard. `waited_s` is all their waiting together, `underrun_s` that part after the first."""

    listeners: int
    first_audio_p50_s: float
    first_audio_p95_s: float
    first_audio_p99_s: float
    underruns: int
    underrun_s: float
    worst_gap_s: float
    worst_wait_s: float
    waited_s: float


def play(begun_s: float, arrivals: Sequence[tuple[float, float]]) -> Playback:
    """Play pieces that came at a time, on the clock of `begun_s`, and last so many seconds; there must be one."""
    dry_s = arrivals[0][0]
    gaps_s: list[float] = []
    for came_s, length_s in arrivals:
        if came_s > dry_s:
            gaps_s.append(came_s - dry_s)
        dry_s = max(dry_s, came_s) + length_s
    return Playback(first_audio_s=arrivals[0][0] - begun_s, gaps_s=gaps_s)


def gather(playbacks: Sequence[Playback]) -> Audience:
    """Sum up what listeners heard."""
    firsts = [playback.first_audio_s for playback in playbacks]
    gaps = [gap for playback in playbacks for gap in playback.gaps_s]
    p50, p95, p99 = (float(np.percentile(firsts, share)) for share in (50, 95, 99))
    return Audience(
        listeners=len(playbacks),
        first_audio_p50_s=p50,
        first_audio_p95_s=p95,
        first_audio_p99_s=p99,
        underruns=len(gaps),
        underrun_s=sum(gaps),
        worst_gap_s=max(gaps, default=0.0),
        worst_wait_s=max(playback.worst_wait_s for playback in playbacks),
        waited_s=sum(firsts) + sum(gaps),
    )


def find_load(starts_s: Sequence[float], song_s: float, speed: float) -> float:
    """Return the most that listeners have played, up to any time, of what was decoded till then at `speed`.

    Each plays a song of `song_s` from its start on. Above 1 no order of decoding could keep all of them from waiting.
    """
    starts = np.asarray(starts_s)
    times = np.concatenate([starts + song_s, starts[1:]])
    times = times[times > starts[0]]
    played = np.clip(times[:, None] - starts, 0, song_s).sum(axis=1)
    return float((played / (speed * (times - starts[0]))).max())


def spread_starts(starts: Sequence[float], song_s: float, speed: float, load: float) -> list[float]:
    """Stretch a pattern of starts until the load is just `load`, if it is more when all start at once."""
    # Stretched by the longest, no two songs would play at once.
    gaps = [later - earlier for earlier, later in pairwise(starts) if later > earlier]
    shortest, longest = 0.0, song_s / min(gaps, default=1.0)
    for _ in range(60):
        middle = (shortest + longest) / 2
        is_more = find_load([start * middle for start in starts], song_s, speed) > load
        shortest, longest = (middle, longest) if is_more else (shortest, middle)
    return [start * longest for start in starts]


def draw_starts(count: int, *, is_poisson: bool, seed: int) -> list[float]:
    """Draw when listeners come, at one a unit of time: at random, or evenly."""
    gaps = np.random.default_rng(seed).exponential(size=count) if is_poisson else np.ones(count)
    return [float(start) for start in np.cumsum(gaps) - gaps[0]]
