"""Numbers as people read them."""

import pytest

from core.runtime.units import clock, duration, rate, size_text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s"), (7505, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (187, "3:07"), (7505, "2:05:05")])
def test_clocks(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.00 KiB"),
        (12.5 * 2**20, "12.50 MiB"),
        (3 * 2**50, "3,072.00 TiB"),
    ],
)
def test_sizes(n_bytes, text):
    assert size_text(n_bytes) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(0, "0"), (853.2, "853"), (999.4, "999"), (999.6, "1.00k"), (9_996, "10.0k"), (11_855, "11.9k"), (123_456, "123k")]
    + [(1_234_567, "1.23M"), (2.5e9, "2.50G")],
)
def test_rates_have_three_digits(per_second, text):
    assert rate(per_second) == text
