"""Metrics for Prometheus: what is in flight, how long things take, what is refused."""

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from soundstage.music.v1.song_service_pb2 import Song, SongState, StageTiming
from soundstage_gateway.stages import NAMES
from soundstage_runtime.admission import Admission
from soundstage_runtime.interceptor import Ended

_CALL_S: Final = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_WAIT_S: Final = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 600)


class Metrics:
    """What one gateway has counted; every label has few values, whatever clients send."""

    def __init__(self, admissions: Sequence[Admission] = ()) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Admissions(admissions))
        self._rpcs = Histogram(
            "soundstage_rpc_seconds", "gRPC calls", ("method", "code"), registry=self._registry, buckets=_CALL_S
        )
        self._requests = Histogram(
            "soundstage_http_seconds",
            "HTTP requests",
            ("route", "method", "status"),
            registry=self._registry,
            buckets=_CALL_S,
        )
        self._sent = Counter("soundstage_sent_bytes", "bytes of answers", ("door",), registry=self._registry)
        self._songs = Counter("soundstage_songs", "songs that have ended", ("state",), registry=self._registry)
        self._stages = Histogram(
            "soundstage_stage_seconds",
            "a variant's time in a stage",
            ("stage",),
            registry=self._registry,
            buckets=_WAIT_S,
        )
        self._first_audio = Histogram(
            "soundstage_first_audio_seconds",
            "from the song's acceptance to the first audio of a listener who waited for it",
            registry=self._registry,
            buckets=_WAIT_S,
        )

    def count_call(self, ended: Ended) -> None:
        """Count a gRPC call."""
        self._rpcs.labels(ended.method, ended.outcome).observe(ended.duration_s)
        self._sent.labels("grpc").inc(ended.sent_bytes)

    def count_request(self, route: str, method: str, status: int, *, duration_s: float, sent_bytes: int) -> None:
        """Count an HTTP request."""
        self._requests.labels(route, method, str(status)).observe(duration_s)
        self._sent.labels("http").inc(sent_bytes)

    def count_song(self, song: Song) -> None:
        """Count a song that has ended."""
        self._songs.labels(SongState.Name(song.state).removeprefix("SONG_STATE_").lower()).inc()
        for variant in song.variants:
            for timing in variant.timings:
                self.count_stage(timing)

    def count_stage(self, timing: StageTiming) -> None:
        """Count a variant's time in a stage."""
        self._stages.labels(NAMES[timing.stage]).observe(timing.duration_s)

    def count_first_audio(self, wait_s: float) -> None:
        """Count how long a listener waited."""
        self._first_audio.observe(wait_s)

    def write(self) -> bytes:
        """Write all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Admissions(Collector):
    """Reads the admissions when it is asked."""

    def __init__(self, admissions: Sequence[Admission]) -> None:
        self._admissions = admissions

    def collect(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily("soundstage_in_flight", "places taken", labels=["what"])
        places = GaugeMetricFamily("soundstage_places", "places there are", labels=["what"])
        refused = CounterMetricFamily("soundstage_refused", "requests for places refused", labels=["what"])
        for admission in self._admissions:
            in_flight.add_metric([admission.what], admission.in_flight)
            places.add_metric([admission.what], admission.limit)
            refused.add_metric([admission.what], admission.num_refused)
        yield from (in_flight, places, refused)
