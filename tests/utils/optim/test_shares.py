"""How parameters are divided over replicas."""

from hypothesis import given
from hypothesis import strategies as st

from utils.optim.shares import divide

SIZES = st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.integers(1, 50), max_size=30)


@given(SIZES, st.integers(1, 5))
def test_each_name_has_one_owner_and_the_shares_are_even(sizes, replicas):
    shares = divide(sizes, replicas)
    assert len(shares) == replicas
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    filled = [sum(sizes[name] for name in names) for names in shares]
    # The fullest has less than the emptiest before its last and smallest name came.
    assert max(filled) - min(filled) <= max(sizes.values(), default=0)


@given(SIZES, st.integers(1, 5))
def test_the_order_of_the_names_does_not_matter(sizes, replicas):
    assert divide(dict(reversed(sizes.items())), replicas) == divide(sizes, replicas)
