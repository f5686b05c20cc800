"""What can be wrong with the machines of a job, found before DeepSpeed's launcher stumbles over it."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?$")
_WHEREVER = "--force_multi"  # DeepSpeed would start the ranks of a single machine here, whichever that is
_LOGIN = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_LOGIN_SECONDS = 30
# DeepSpeed's launchers: the program of each, and by what its version is known
_LAUNCHERS = {
    "pdsh": ("pdsh", ()),
    "slurm": ("srun", ()),
    "openmpi": ("mpirun", ("Open MPI", "OpenRTE")),
    "mpich": ("mpirun", ("MPICH", "HYDRA")),
    "impi": ("mpirun", ("Intel", "HYDRA")),
}


def check_cluster(launcher: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's options, mended; and the machines that it logs in to, which is what pdsh alone does.

    Raises:
        UserError: a machine cannot be reached, or a file about them cannot be read.
    """
    options = dict(word.partition("=")[::2] for word in launcher)
    if "--hostfile" not in options:
        return launcher, []
    slots = read_hostfile(Path(options["--hostfile"]))
    hosts = list(slots)
    check_environment_files()
    if "--no_ssh" in options:
        check_node_rank(options.get("--node_rank", ""), len(hosts))
        return launcher, []
    name = options.get("--launcher", "pdsh").lower()
    check_launcher(name, options, slots)
    if name == "slurm":
        check_allocation(hosts)
    if name != "pdsh":
        return _without_logins(name, launcher, options, slots), []
    if "--include" not in options and "--exclude" not in options:
        port = ["-p", options["--ssh_port"]] if "--ssh_port" in options else []
        check_logins(hosts[: int(options.get("--num_nodes", len(hosts)))], port)
    return [*launcher, _WHEREVER], hosts


def read_hostfile(path: Path) -> dict[str, int]:
    """The machines of a hostfile, one `NAME slots=GPUS` a line, and their GPUs.

    Raises:
        UserError: there is no such file, or DeepSpeed would not read it.
    """
    if not path.is_file():
        raise UserError(f"there is no hostfile {path}: a line for each machine, such as `node1 slots=8`")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        found = _LINE.match(line.strip())
        if found is None:
            raise UserError(
                f"{path}, line {number}: {line.strip()!r} is not `NAME slots=GPUS`, such as `node1 slots=8`"
            )
        if found.group(1) in hosts:
            raise UserError(f"{path}, line {number}: {found.group(1)} stands there twice")
        hosts[found.group(1)] = int(found.group(2))
    if not hosts:
        raise UserError(f"{path} names no machine: a line for each, such as `node1 slots=8`")
    return hosts


def check_node_rank(given: str, machines: int) -> None:
    """Refuse a machine's number that DeepSpeed would fail an assertion for.

    Raises:
        UserError: it is missing, or not that of a machine of the hostfile.
    """
    if not given.isdigit() or int(given) >= machines:
        raise UserError(
            f"--no_ssh starts the ranks of this machine alone, and needs its line in the hostfile as --node_rank, from "
            f"0 to {machines - 1}; given: {given or 'none'}"
        )


def check_launcher(name: str, options: Mapping[str, str], slots: Mapping[str, int]) -> None:
    """Refuse what DeepSpeed's launcher of this name cannot do, or would do wrong.

    Args:
        name: of `--launcher`.
        options: of DeepSpeed, with their values.
        slots: of `read_hostfile`.

    Raises:
        UserError: with what to use instead.
    """
    if name not in _LAUNCHERS:
        instead = " ".join(_LAUNCHERS)
        raise UserError(f"--launcher {name} is not one that this project works with: {instead}; or srun, or torchrun")
    program, words = _LAUNCHERS[name]
    if shutil.which(program) is None:
        raise UserError(f"--launcher {name} needs {program} on this machine, and there is none in PATH")
    if name == "pdsh":
        return
    if words and not any(word in (said := _version_of(program)) for word in words):
        first = said.split("\n")[0]
        raise UserError(f"--launcher {name} needs the mpirun of {words[0]}, but the one in PATH is {first!r}")
    if narrowing := [key for key in ("--include", "--exclude", "--num_nodes", "--num_gpus") if key in options]:
        raise UserError(
            f"--launcher {name} takes no {narrowing[0]}: give a hostfile of the machines and slots that the job shall "
            "have, or use --launcher pdsh"
        )
    if name == "slurm" and {"--master_addr", "--master_port"} & set(options):
        raise UserError(
            "--launcher slurm takes neither --master_addr nor --master_port: srun says where rank 0 is, and its job's "
            "number makes the port. MASTER_ADDR and MASTER_PORT in the environment say otherwise."
        )
    if name != "openmpi" and len(set(slots.values())) > 1:
        raise UserError(
            f"--launcher {name} needs as many slots on each machine, but the hostfile has "
            f"{sorted(set(slots.values()))}: make them equal, or use --launcher pdsh or openmpi"
        )


def _version_of(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True)
    return said.stdout + said.stderr


def check_allocation(hosts: Sequence[str]) -> None:
    """Refuse machines that Slurm does not have, or not in the allocation in which this runs.

    Raises:
        UserError: with those that it has; or Slurm does not answer.
    """
    allocated = os.environ.get("SLURM_JOB_NODELIST")
    question = ["scontrol", "show", "hostnames", allocated] if allocated else ["sinfo", "-h", "--Node", "-o", "%N"]
    said = subprocess.run(question, capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"--launcher slurm needs Slurm, which says: {said.stderr.strip()}")
    known = said.stdout.split()
    if strangers := [host for host in hosts if host not in known]:
        where = "this allocation of Slurm" if allocated else "Slurm"
        raise UserError(
            f"the hostfile names {', '.join(strangers[:5])}, but {where} has {', '.join(sorted(set(known))[:5])}: "
            "write its nodes there, or use srun bash launch/distill.sh, which needs no hostfile"
        )


def _without_logins(name: str, launcher: list[str], options: Mapping[str, str], slots: Mapping[str, int]) -> list[str]:
    """DeepSpeed would log in to the first machine to ask for its address; srun and mpirun need no such thing.

    It would let srun choose the nodes, too.
    """
    address, port = options.get("--master_addr", next(iter(slots))), options.get("--master_port", "29500")
    kept = [word for word in launcher if not word.startswith(("--master_addr=", "--launcher_args="))]
    words = options.get("--launcher_args", "")
    if name == "openmpi":  # which DeepSpeed does not tell it
        words += f" -x MASTER_ADDR={address} -x MASTER_PORT={port}"
    if name == "slurm":
        tasks = next(iter(slots.values()))
        words = f"--nodelist={','.join(slots)} --nodes={len(slots)} --ntasks-per-node={tasks} {words}"
    more = [f"--launcher_args={words.strip()}"] if words else []
    return [*kept, "--no_ssh_check", _WHEREVER, f"--master_addr={address}", *more]


def check_environment_files() -> None:
    """Refuse a file of variables for other machines that DeepSpeed would not read.

    Raises:
        UserError: a line is not `NAME=value`.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in {Path.home() / name, Path(name)}:
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if not re.match(r"\s*\w+=", line):
                    raise UserError(
                        f"{path.absolute()}, line {number}: {line!r} is not NAME=value, and DeepSpeed reads no blank "
                        "lines and no comments there"
                    )


def check_logins(hosts: Sequence[str], options: Sequence[str] = ()) -> None:
    """Log in to every machine as DeepSpeed will, all at once.

    Raises:
        UserError: with the machines that do not let this user in, and why.
    """
    trials = {
        host: subprocess.Popen(
            [*_LOGIN, *options, host, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    problems = []
    for host, trial in trials.items():
        try:
            said = trial.communicate(timeout=_LOGIN_SECONDS)[1].strip().splitlines()
        except subprocess.TimeoutExpired:
            trial.kill()
            said = [f"no answer within {_LOGIN_SECONDS} s"]
        if trial.returncode != 0:
            problems.append(f"{host}: {said[-1] if said else f'ssh ended with code {trial.returncode}'}")
    if problems:
        raise UserError(
            f"cannot log in to {len(problems)} of {len(hosts)} machines without a password "
            f"({'; '.join(problems[:5])}). Each must let this user in by ssh with a key, and its own must be known."
        )
