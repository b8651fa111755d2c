"""How work is cut into pieces, and what a rank alone is told of them."""

import hashlib
from pathlib import Path

import pytest

from tests.utils.data.encode_worker import Bytes, Pooling
from utils.data.cache.keys import inputs_of
from utils.data.cache.sharing import MOST_ITEMS, Broken, Plan, Team, divided
from utils.data.media.files import DataFile
from utils.data.values import Bucket, Sample

BUCKETS = [Bucket(64, 64, 1), Bucket(64, 64, 9), Bucket(48, 96, 5)]


def samples(number: int) -> list[Sample]:
    return [
        Sample(
            f"{index}",
            DataFile(Path(f"{index}.mp4")),
            hashlib.blake2b(str(index).encode()).hexdigest(),
            f"caption {index}",
            BUCKETS[index % 3],
            fps=16.0,
        )
        for index in range(number)
    ]


@pytest.mark.parametrize("number", [1, 5, 100, 3000])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pieces_are_small_and_of_one_bucket_and_the_largest_come_first(number, world_size, batch_size):
    pooling = Pooling()
    inputs = inputs_of(samples(number), pooling)
    pieces = list(divided(inputs, pooling, 7, batch_size, world_size))
    assert sorted(key for piece in pieces for key in piece.keys) == sorted(inputs)
    assert {piece.encoder for piece in pieces} == {7}
    sizes = [{inputs[key].sample.bucket for key in piece.keys} for piece in pieces]
    assert all(len(buckets) == 1 for buckets in sizes)
    pixels = [bucket.width * bucket.height * bucket.frames for buckets in sizes for bucket in buckets]
    assert pixels == sorted(pixels, reverse=True)
    assert max(len(piece.keys) for piece in pieces) <= MOST_ITEMS + batch_size
    # So many that no rank waits for another's last one for more than a small part of the whole.
    if number >= 16 * world_size * batch_size:
        assert len(pieces) >= 16 * world_size / batch_size
    assert (
        sum(piece.cost for piece in pieces) == sum(pixels[place] * len(piece.keys) for place, piece in enumerate(pieces)) + number
    )


def test_captions_need_no_bucket():
    inputs = inputs_of(samples(3000), Bytes())
    pieces = list(divided(inputs, Bytes(), 0, 1, 1))
    assert [len(piece.keys) for piece in pieces] == [MOST_ITEMS] * (3000 // MOST_ITEMS) + [3000 % MOST_ITEMS]


def test_alone_everything_is_taken_in_order_and_counted():
    pooling, text = Pooling(), Bytes()
    wanted = [inputs_of(samples(5), pooling), inputs_of(samples(5), text)]
    pieces = [piece for place, encoder in enumerate([pooling, text]) for piece in divided(wanted[place], encoder, place, 2, 1)]
    team = Team(None)
    assert team.agree(lambda: Plan(pieces, [5, 5])).pieces == pieces
    taken = []
    while (piece := team.take()) is not None:
        taken.append(piece)
    assert taken == pieces
    assert team.take() is None
    assert team.done(0) == (0, 0.0)
    first = pieces[0]
    items, share = team.done(0, len(first.keys), first.cost)
    assert items == len(first.keys)
    assert share == first.cost / sum(piece.cost for piece in pieces if piece.encoder == 0)
    assert team.done(1) == (0, 0.0)
    assert team.broken() == []


def test_what_is_broken_goes_to_other_ranks_as_text():
    broken = Broken(DataFile(Path("/a/b.tar"), "c\n“d”.png", 512, 1000), "it does not decode", ("k1", "k2"))
    assert Broken.from_json(broken.to_json() | {"keys": ["k1", "k2"]}) == broken
