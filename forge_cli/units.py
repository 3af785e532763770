"""Numbers for people: bytes, counts, durations."""

from __future__ import annotations

GIB = 1024**3
MIB = 1024**2


def format_bytes(size_bytes: float) -> str:
    """Formats bytes in binary units: ``1.50 GiB``, ``12.0 MiB``, ``3.1 KiB``, ``12 B``."""
    if abs(size_bytes) >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    if abs(size_bytes) >= 1024:
        return f"{size_bytes / 1024:.1f} KiB"
    return f"{int(size_bytes)} B"


def format_count(count: float) -> str:
    """Formats a count in short form: ``7.24 B``, ``41.9 M``, ``12.3 K``, ``512``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999.5 and more would be rounded up to 1000 of the smaller unit.
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return str(int(count))


def format_duration(duration_seconds: float) -> str:
    """Formats seconds as ``1:02:03``, ``2:03``, ``4.2 s`` or ``7 ms``."""
    if 0 < duration_seconds < 0.95:
        return f"{1000 * duration_seconds:.0f} ms"
    if duration_seconds < 60:
        return f"{duration_seconds:.1f} s"
    minutes, seconds = divmod(round(duration_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def count_of(count: int, one: str, many: str) -> str:
    """Writes a count with its words in the right number: ``1 row is``, ``2 rows are``."""
    return f"{count} {one if count == 1 else many}"
