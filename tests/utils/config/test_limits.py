"""Times in the config: how they are written, and what is refused."""

import pytest
from pydantic import ValidationError

from utils.config.schema import LimitsConfig, seconds_in


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("3h50m", 13800), ("1d", 86400), ("1d 2h 3m 4s", 93784), (" 10m ", 600), ("120m", 7200)]
)
def test_times(text, seconds):
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5m3h", "3 hours", "-1h", "0s", "1.5h"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match='write days, hours, minutes and seconds, in this order, like "3h50m" or "90s"'):
        seconds_in(text)


def test_a_limit_leaves_room_for_saving():
    assert LimitsConfig(time="61s").time == "61s"
    with pytest.raises(ValidationError, match="it must be above 60 s, which are kept free at its end for saving"):
        LimitsConfig(time="60s")
    with pytest.raises(ValidationError, match="is no time"):
        LimitsConfig(hang_timeout="soon")
