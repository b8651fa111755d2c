"""The line of every key, against what tomllib reads after that line is changed."""

import copy
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.toml_file import TomlFile, dotted, key_lines
from utils.errors import UserError

NAMES = st.text("ab_c.- é'", min_size=1, max_size=4)
SCALARS = st.integers(0, 9) | st.booleans() | st.text('ab"\\\n[]#= ', max_size=6)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=4) | st.lists(st.dictionaries(NAMES, inner, max_size=3), min_size=1, max_size=3)
    ),
    max_leaves=12,
).filter(lambda value: isinstance(value, dict))


def leaves(value, keys=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield keys
    for key, inner in items:
        yield from leaves(inner, (*keys, key))


def changed(document, keys, value):
    document = copy.deepcopy(document)
    table = document
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    return document


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(document=DOCUMENTS, multiline=st.booleans())
def test_every_key_is_on_its_line(document, multiline):
    """Give a line another value: tomllib then reads the document with that one key changed."""
    text = tomli_w.dumps(document, multiline_strings=multiline)
    lines = text.split("\n")
    found = key_lines(text)
    for keys in leaves(document):
        number = found[keys] - 1
        name, equals, value = lines[number].partition(" = ")
        assert equals, f"{keys} is not set on {lines[number]!r}"
        if not value.startswith(('"""', "[", "{")):  # a value of one line, of one key
            other = [*lines[:number], f"{name} = 'another value'", *lines[number + 1 :]]
            assert tomllib.loads("\n".join(other)) == changed(document, keys, "another value")


EXAMPLE = '''\
a = 1 # [x]
b.c = """
d = 2
[e]
"""

[optimizer]\t# a comment
"quoted.key" = 'x'
list = [
  1, # ]
  [2],
]
inline = {p = 1, q = [{z = 1}]}

[[directory]]
path = 'a'
[directory.inner]
k = 1
 [[directory]]
path = 'b'
[x."y z"]
[[x."y z".w]]
v = 1
'''


def test_an_example():
    wanted = {
        (): 1,
        ("a",): 1,
        ("b", "c"): 2,
        ("optimizer",): 7,
        ("optimizer", "quoted.key"): 8,
        ("optimizer", "list"): 9,
        ("optimizer", "list", 1, 0): 9,
        ("optimizer", "inline", "q", 0, "z"): 13,
        ("directory", 0): 15,
        ("directory", 0, "path"): 16,
        ("directory", 0, "inner", "k"): 18,
        ("directory", 1): 19,
        ("directory", 1, "path"): 20,
        ("x", "y z"): 21,
        ("x", "y z", "w", 0, "v"): 23,
    }
    found = key_lines(EXAMPLE)
    assert {keys: found[keys] for keys in wanted} == wanted
    assert key_lines(EXAMPLE.replace("\n", "\r\n")) == found


def test_a_key_that_is_not_there_is_placed_at_its_table(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(EXAMPLE)
    file = TomlFile.read(path)
    assert file.place(("directory", 1, "missing")) == f"{path}:19"
    assert file.place(("missing",)) == f"{path}:1"


def test_dotted_names():
    assert dotted(("directory", 1, "path")) == "directory[1].path"


def test_put_does_not_go_through_a_value(tmp_path):
    file = TomlFile(tmp_path, {"a": {"b": 1}}, {})
    with pytest.raises(UserError, match=r"here: a\.b is not a table, so it has no key c\.d"):
        file.put(("a", "b", "c", "d"), 1, "here")
