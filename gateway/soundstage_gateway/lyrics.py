"""Lyrics in time: lines as an LRC file."""

from collections.abc import Iterable

from soundstage.type.v1.score_pb2 import LyricLine


def write_lrc(lines: Iterable[LyricLine]) -> str:
    """Write lines as an LRC file, one `[mm:ss.xx]text` each."""
    return "".join(f"[{_write_time(line.start_s)}]{line.text}\n" for line in lines)


def _write_time(seconds: float) -> str:
    hundredths = round(seconds * 100)  # rounded first, or 59.999 s would be 60.00 s of a minute
    return f"{hundredths // 6000:02}:{hundredths // 100 % 60:02}.{hundredths % 100:02}"
