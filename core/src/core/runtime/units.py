"""Numbers as people read them: bytes, times, rates."""

KIB = 2**10


def size_text(n_bytes: float) -> str:
    """Bytes in the largest unit of which there is at least one: 868 bytes, 12.02 MiB, 1,228.80 TiB."""
    value, unit = float(n_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < KIB:
            break
        value, unit = value / KIB, larger
    return f"{value:,.0f} bytes" if unit == "bytes" else f"{value:,.2f} {unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 2 h 05 min, 3 min 07 s, 12 s."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    if h:
        return f"{h} h {m:02} min"
    return f"{m} min {s:02} s" if m else f"{s} s"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them: 2:05:00, 3:07, 0:12."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def rate(per_second: float) -> str:
    """A number to three digits: 853, 11.9k, 1.23M."""
    value, unit = float(per_second), ""
    for larger in ("k", "M", "G"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    decimals = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{unit}"
