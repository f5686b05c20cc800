"""Ranks that srun and mpirun start: what their variables mean."""

import pytest

from data_prep.errors import UserError
from launch.starters import check_alone, rank_variables

OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
SLURM |= {"SLURM_JOB_ID": "77", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **OMPI, **SLURM},  # a launcher inside of srun has said it
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"},  # a batch script, which starts others
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_what_is_alone_or_has_its_rank_is_left_alone(environment):
    assert rank_variables(environment) == {}


def test_one_of_several_tasks_starts_no_job_of_its_own():
    with pytest.raises(UserError, match="task 9 of 16 of srun .* without --num_gpus=2 they are the ranks of one job"):
        check_alone(["--num_gpus=2"], {**SLURM, "SLURM_STEP_NODELIST": "a,b"})
    check_alone(["--hostfile=h", "--no_ssh", "--node_rank=1"], {**SLURM, "SLURM_STEP_NODELIST": "a,b"})
    check_alone([], {**SLURM, "SLURM_STEP_NODELIST": "a,b"})
    check_alone(["--num_gpus=2"], {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"})


def test_mpirun_on_one_machine():
    found = rank_variables({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "a"})
    assert found.pop("MASTER_PORT").isdigit()
    assert found == dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1")


def test_mpirun_on_several_machines_needs_the_address_of_rank_0():
    several = {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="rank 1 of 2, on several machines.* -x MASTER_ADDR=HOST"):
        rank_variables(several)
    assert rank_variables({**several, "MASTER_ADDR": "a1", "MASTER_PORT": "5"})["MASTER_ADDR"] == "a1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[001-002]", "node001"),
        ("a12,b13", "a12"),
        ("gpu[07,09-11]", "gpu07"),
        ("x-[1-2]-y", "x-1"),
        ("one", "one"),
    ],
)
def test_srun(nodes, first):
    found = rank_variables({**SLURM, "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_SIZE"]) == ("9", "16", "1", "8")
    assert found["MASTER_ADDR"] == first


def test_all_ranks_of_a_job_find_the_same_port_and_the_next_job_another():
    steps = [
        {**SLURM, "SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_ID": job}
        for job in "112"
    ]
    ports = [rank_variables({**step, "SLURM_PROCID": str(n)})["MASTER_PORT"] for n, step in enumerate(steps)]
    assert ports[0] == ports[1] != ports[2]
