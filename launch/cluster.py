"""What can be wrong with the machines of a job, found before DeepSpeed's launcher stumbles over it."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?$")
_LOGIN = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_LOGIN_SECONDS = 30


def check_cluster(launcher: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's options, mended; and the machines that it logs in to, which is what pdsh alone does.

    Raises:
        UserError: a machine cannot be reached, or a file about them cannot be read.
    """
    options = dict(word.partition("=")[::2] for word in launcher)
    if "--hostfile" not in options:
        return launcher, []
    hosts = read_hostfile(Path(options["--hostfile"]))
    check_environment_files()
    if "--no_ssh" in options:
        return launcher, []
    if options.get("--launcher", "pdsh") != "pdsh":
        # DeepSpeed would log in to the first machine to ask for its address; srun and mpirun need no such thing
        more = [] if "--master_addr" in options else [f"--master_addr={hosts[0]}"]
        return [*launcher, "--no_ssh_check", *more], []
    if "--include" not in options and "--exclude" not in options:
        port = ["-p", options["--ssh_port"]] if "--ssh_port" in options else []
        check_logins(hosts[: int(options.get("--num_nodes", len(hosts)))], port)
    return launcher, hosts


def read_hostfile(path: Path) -> list[str]:
    """The machines of a hostfile, one `NAME slots=GPUS` a line.

    Raises:
        UserError: there is no such file, or DeepSpeed would not read it.
    """
    if not path.is_file():
        raise UserError(f"there is no hostfile {path}: a line for each machine, such as `node1 slots=8`")
    hosts: list[str] = []
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
        hosts.append(found.group(1))
    if not hosts:
        raise UserError(f"{path} names no machine: a line for each, such as `node1 slots=8`")
    return hosts


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
