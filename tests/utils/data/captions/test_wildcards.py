"""Choices within captions: what they expand to, how often each option comes up, and what is refused."""

import re
from collections import Counter
from math import sqrt
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.captions.wildcards import MAX_DEPTH, parse, place_of, resolve, varies

# The text, what it becomes with the first options, and everything that it can become.
TABLE = [
    ("a car", "a car", {"a car"}),
    ("", "", {""}),
    ("a {red|blue} car", "a red car", {"a red car", "a blue car"}),
    ("{a|b}{c|d}", "ac", {"ac", "ad", "bc", "bd"}),
    ("{{rose|white} gold|platinum} ring", "rose gold ring", {"rose gold ring", "white gold ring", "platinum ring"}),
    ("{a{b|c}d{e|f}g|h}", "abdeg", {"abdeg", "abdfg", "acdeg", "acdfg", "h"}),
    ("a{| very} red car", "a red car", {"a red car", "a very red car"}),
    ("{only}", "only", {"only"}),
    ("{}", "", {""}),
    ("{|}", "", {""}),
    ("{ a | b }", " a ", {" a ", " b "}),
    ("{2::a|b}", "a", {"a", "b"}),
    ("{.5::a| 1.5::{b|c}}", "a", {"a", "b", "c"}),
    ("{a::b|c}", "a::b", {"a::b", "c"}),
    ("10::20", "10::20", {"10::20"}),
    (r"\{a\|b\}", "{a|b}", {"{a|b}"}),
    (r"{\{|\}|\|}", "{", {"{", "}", "|"}),
    ("|_| or ||", "|_| or ||", {"|_| or ||"}),
    (r"miku \(vocaloid\), {a|b}", r"miku \(vocaloid\), a", {rf"miku \(vocaloid\), {x}" for x in "ab"}),
    ("a {自行车|café}\nline", "a 自行车\nline", {"a 自行车\nline", "a café\nline"}),
]


@pytest.mark.parametrize(("text", "first", "every"), TABLE)
def test_the_table(text: str, first: str, every: set[str]):
    template, random = parse(text), Random(0)
    assert resolve(template, None) == first
    assert {resolve(template, random) for _ in range(200)} == every
    if len(every) > 1:
        assert varies(template)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {red|blue car", r"a { without its }, at sign 3; write \{ for the sign itself"),
        ("a red} car", r"a } without its {, at sign 6; write \} for the sign itself"),
        ("{a}}", "a } without its {, at sign 4"),
        ("{2$$a|b}", "a choice of several ($$), at sign 1"),
        ("x {a|1-2$$b}", "a choice of several ($$), at sign 3"),
        ("{a|0::b}", "a weight that is not above 0, up to 1e+09, at sign 1"),
        ("{" + "9" * 400 + "::a|b}", "a weight that is not above 0, up to 1e+09, at sign 1"),
        ("{" * 5000, f"more than {MAX_DEPTH} choices within each other, at sign {MAX_DEPTH + 1}"),
    ],
)
def test_what_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_the_deepest_choice():
    text = "{" * MAX_DEPTH + "a|b" + "}" * MAX_DEPTH
    assert {resolve(parse(text), Random(seed)) for seed in range(50)} == {"a", "b"}


def test_weights_are_frequencies():
    template, random, draws = parse("{2::a|5::b|c|{d|3::e}}"), Random(1), 20_000
    counts = Counter(resolve(template, random) for _ in range(draws))
    expected = {"a": 2 / 9, "b": 5 / 9, "c": 1 / 9, "d": 1 / 36, "e": 3 / 36}
    assert counts.keys() == expected.keys()
    for text, share in expected.items():
        # Five standard deviations of the binomial distribution.
        assert abs(counts[text] - draws * share) < 5 * sqrt(draws * share * (1 - share)), text


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
def test_every_quantile_has_a_place(weights: list[float], quantile: float):
    place = place_of(quantile, weights)
    assert 0 <= place < len(weights)
    below, whole = sum(weights[:place]), sum(weights)
    assert below / whole <= quantile + 1e-9
    assert (below + weights[place]) / whole >= quantile - 1e-9


@given(st.text(st.sampled_from("ab {}|\\:2"), max_size=40))
def test_any_text_is_read_or_refused(text: str):
    try:
        template = parse(text)
    except ValueError:
        return
    assert varies(template) or resolve(template, None) == resolve(template, Random(0))


@given(st.text(max_size=40))
def test_what_is_escaped_is_the_text(text: str):
    escaped = "".join("\\" + sign if sign in "{}|" else sign for sign in text)
    # A backslash before a sign of the text is one of the text.
    assert resolve(parse(escaped), None) == text
