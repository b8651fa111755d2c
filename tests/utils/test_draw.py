"""Draws are functions of their place."""

import subprocess
import sys

import torch

from utils.draw import Draw, seed_from


def test_the_same_place_gives_the_same_bits_and_another_place_others():
    draw = Draw(seed=1, epoch=2)
    first = draw.normal("a", "noise", (3, 4))
    torch.manual_seed(99)
    torch.rand(10)
    assert torch.equal(draw.normal("a", "noise", (3, 4)), first)
    others = [
        draw.normal("b", "noise", (3, 4)),
        draw.normal("a", "other", (3, 4)),
        Draw(1, 3).normal("a", "noise", (3, 4)),
        Draw(2, 2).normal("a", "noise", (3, 4)),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_parts_are_kept_apart():
    assert seed_from("ab", "c") != seed_from("a", "bc")
    assert seed_from(1, 23) != seed_from(12, 3)


def test_another_process_draws_the_same():
    code = "from utils.draw import Draw; print(Draw(7, 1).normal('x', 'noise', (2,)).tolist(), Draw(7, 1).quantile('x', 't'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == f"{Draw(7, 1).normal('x', 'noise', (2,)).tolist()} {Draw(7, 1).quantile('x', 't')}"


def test_noise_is_standard_normal_and_quantiles_are_uniform():
    draw = Draw(0, 0)
    noise = draw.normal("a", "noise", (200, 200))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    places = torch.tensor([draw.quantile(str(index), "timestep") for index in range(4000)])
    assert abs(float(places.mean()) - 0.5) < 0.02
    assert 0 < float(places.min()) < 0.01
    assert Draw(0, 0, fixed_time=0.3).quantile("any", "timestep") == 0.3
