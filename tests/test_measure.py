"""The table in tests/README.md: every variant, every number."""

from tests.measure import MISSING, QUANTITIES, README, rows, table, variants

ADVICE = "run: python -m tests.measure"


def test_every_variant_is_in_the_readme_with_every_number():
    written = rows(README.read_text())
    assert list(written) == variants(), ADVICE
    for variant, cells in written.items():
        assert len(cells) == len(QUANTITIES), ADVICE
        assert MISSING not in cells, f"{variant}: {ADVICE}"


def test_the_table_shows_what_was_measured():
    first, *others = variants()
    lines = table({first: {"loss": 2.34e-8, "stages": 0, "full": 3, "keys": 120}}).splitlines()
    assert lines[2] == f"| `{first}` | 2e-08 | — | same bits | — | 120 | — | — | 3 different |"
    assert len(lines) == 2 + 1 + len(others)
