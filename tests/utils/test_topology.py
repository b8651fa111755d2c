"""Which launcher's variables become ranks, and where a rank stands."""

import os
from unittest import mock

import pytest
import torch

from utils.errors import UserError
from utils.topology import Topology, read_environment, replicas_for

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def read(environment: dict[str, str]) -> dict[str, str]:
    with mock.patch.dict(os.environ, environment, clear=True):
        read_environment()
        return dict(os.environ)


def test_srun():
    found = read(SLURM)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "1")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", str(20000 + 1234567 % 20000))


def test_torchrun_goes_before_slurm():
    found = read({**SLURM, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "2", "a")


def test_plain_python_is_one_process_also_inside_an_allocation():
    for environment in ({}, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}):
        found = read(environment)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
        assert 1024 < int(found["MASTER_PORT"]) < 65536


def test_stages_that_do_not_divide_the_processes():
    assert replicas_for(8, 4) == 2
    with pytest.raises(UserError, match=r"pipeline_stages = 3 does not divide the 8 processes .*; use 1, 2, 4, 8, or start"):
        replicas_for(8, 3)


def test_places():
    places = [Topology(rank, 6, 3, torch.device("cpu"), {}, {}, None) for rank in range(6)]
    assert [(place.stage, place.replica) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [place.writes_weights for place in places] == [True, False] * 3
