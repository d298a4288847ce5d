"""The launch scripts: syntax, shellcheck, and what they do in a made-up checkout with a made-up Python."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from paths import CHECKOUT
from required import do_without

from replication.config import load_run, load_suite

LIBRARY = "launch/job.sh"  # sourced, never called
SCRIPTS = [".ci/run", *sorted(str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "launch").glob("*.s*")
                              if p.suffix in (".sh", ".sbatch") and p.name != "job.sh")]  # fmt: skip
TOOLS = ("bash", "env", "dirname", "cat", "ls", "cp", "mkdir", "touch", "chmod", "tee")
TOOLS += ("sha256sum", "uname", "timeout", "getconf")

# Answers as Python, pip and uv would, and writes down what it was asked.
FAKE_PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "python $*" >>"$FAKE/log"
here=$(dirname "$0")
case "$*" in
  --version) echo "Python 3.11.99" ;;
  *version_info*) [[ ! -e $FAKE/old ]] ;;
  *"import ensurepip"*) [[ ! -e $FAKE/no-venv ]] ;;
  *"import torch"*) [[ -e $FAKE/torch ]] ;;
  "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install --quiet uv") [[ ! -e $FAKE/no-uv ]] ;;
  "-m pip uninstall"*) ;;
  "-m pip install"*)
    echo "pip is downloading" >&2
    [[ ! -e $FAKE/pip-fails ]] || exit 1
    for tool in replicate ruff mypy; do
      printf '%s\n' '#!/usr/bin/env bash' "echo \"$tool \$*\" | tee -a \"\$FAKE/log\"" >"$here/$tool"
      chmod +x "$here/$tool"
    done ;;
  "-m uv"*--dry-run*) [[ -e $FAKE/uv-plan ]] && cat "$FAKE/uv-plan" ;;
  "-m uv"*) [[ -e $FAKE/uv-breaks-torch ]] || touch "$FAKE/torch" ;;
  "-m pytest"*) printf '%s\n' "env $OMP_NUM_THREADS $DS_ACCELERATOR $PWD" >>"$FAKE/log"; echo "pytest's last line" ;;
  "-m replication "*) ;;
  "- "*) exec "$REAL_PYTHON" "$@" ;;
  *) exit 99 ;;
esac
"""


@dataclass
class Sandbox:
    """A copy of the scripts in a folder with spaces, and a PATH that holds only what the sandbox offers."""

    root: Path
    extra_env: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.root / "my check out"

    @property
    def venv(self) -> Path:
        return self.checkout / ".venv"

    def build(self, python: str | None = "python3.11") -> Sandbox:
        for folder in ("launch", ".ci"):
            shutil.copytree(CHECKOUT / folder, self.checkout / folder)
        shutil.copy(CHECKOUT / "pyproject.toml", self.checkout)
        (self.root / "bin").mkdir()
        (self.root / "elsewhere").mkdir()
        for tool in TOOLS:
            (self.root / "bin" / tool).symlink_to(str(shutil.which(tool)))
        if python:
            self.program(python, FAKE_PYTHON)
        return self

    def program(self, name: str, text: str = "#!/usr/bin/env bash\n") -> Path:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def state(self, name: str, text: str = "") -> None:
        """Put the fake programs in a mood; see FAKE_PYTHON."""
        (self.root / name).write_text(text)

    def run(self, script: str, *args: str, terminal: bool = False) -> subprocess.CompletedProcess[str]:
        """Call a script; on a terminal of its own, whose output is not looked at, or without one."""
        (self.root / "log").write_text("")
        env = {
            "PATH": str(self.root / "bin"),
            "HOME": str(self.root),
            "FAKE": str(self.root),
            "REAL_PYTHON": sys.executable,
        }
        outer, inner = pty.openpty() if terminal else (-1, -1)
        streams = {"stdin": inner, "stdout": inner, "stderr": inner} if terminal else {"capture_output": True}
        try:
            return subprocess.run(
                [str(self.checkout / script), *args],
                env={**env, **self.extra_env},
                cwd=self.root / "elsewhere",
                text=True,
                timeout=60,
                **streams,
            )
        finally:
            for end in (outer, inner):
                if end >= 0:
                    os.close(end)

    @property
    def log(self) -> list[str]:
        """What the fake programs were asked in the last run."""
        return (self.root / "log").read_text().splitlines()

    def asked(self, words: str) -> list[str]:
        return [line for line in self.log if words in line]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path).build()


# ---------------------------------------------------------------- the text of the scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_accepts_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(CHECKOUT / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_can_be_called_and_stops_at_errors(script: str) -> None:
    path = CHECKOUT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        reason = "shellcheck is not installed (Debian, Ubuntu: apt-get install shellcheck)"
        do_without("shellcheck", reason)
    done = subprocess.run(["shellcheck", "-x", LIBRARY, *SCRIPTS], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_script_names_an_index_or_repeats_the_torch_range() -> None:
    for script in SCRIPTS:
        text = (CHECKOUT / script).read_text()
        assert "://" not in text
        assert "torch>=" not in text


# ---------------------------------------------------------------- install.sh: finding a Python


def test_no_python_at_all(tmp_path: Path) -> None:
    done = Sandbox(tmp_path).build(python=None).run("launch/install.sh")
    assert done.returncode == 2
    assert "no Python 3.11 or newer among: python3.13 python3.12 python3.11 python3;" in done.stderr
    assert "REPLICATION_PYTHON" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_is_too_old_is_passed_over(sandbox: Sandbox) -> None:
    sandbox.state("old")
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 2
    assert "no Python 3.11 or newer" in done.stderr


def test_a_python_without_venv(sandbox: Sandbox) -> None:
    sandbox.state("no-venv")
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 2
    assert done.stderr == (
        "install: python3.11 has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)\n"
    )


def test_a_placeholder_that_fails_is_passed_over(sandbox: Sandbox) -> None:
    sandbox.program("python3.13", "#!/usr/bin/env bash\nexit 127\n")
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 0, done.stderr
    assert sandbox.venv.is_dir()


def test_a_python_and_an_environment_of_ones_own(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path).build(python=None)
    own = sandbox.program("my own python", FAKE_PYTHON)
    sandbox.extra_env = {"REPLICATION_PYTHON": str(own), "REPLICATION_VENV": "my env"}
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / "my env" / "bin" / "replicate").is_file()
    assert not sandbox.venv.exists()


def test_a_folder_of_other_files_is_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.extra_env = {"REPLICATION_VENV": str(tmp_path / "thesis")}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("precious")
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 2
    assert "REPLICATION_VENV" in done.stderr
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1"]


# ---------------------------------------------------------------- install.sh: what it installs, and when


def test_the_download_is_announced_before_it_starts(sandbox: Sandbox) -> None:
    done = sandbox.run("launch/install.sh", "test", "judge")
    assert done.returncode == 0, done.stderr
    assert 0 <= done.stderr.index("downloading about 480 MB") < done.stderr.index("pip is downloading")
    assert sandbox.asked("--editable")[0].endswith(f"--editable {sandbox.checkout}[test,judge]")


def test_a_second_call_does_nothing(sandbox: Sandbox) -> None:
    sandbox.run("launch/install.sh")
    done = sandbox.run("launch/install.sh")
    assert (done.returncode, done.stderr, sandbox.log) == (0, "", [])


def test_an_environment_with_extras_serves_the_call_without(sandbox: Sandbox) -> None:
    sandbox.run("launch/install.sh", "test")
    sandbox.run("launch/install.sh")
    assert sandbox.log == []
    sandbox.run("launch/install.sh", "test")
    assert sandbox.log == []
    sandbox.run("launch/install.sh", "judge")
    assert sandbox.asked("[judge]")


def test_a_changed_pyproject_installs_again(sandbox: Sandbox) -> None:
    sandbox.run("launch/install.sh")
    with open(sandbox.checkout / "pyproject.toml", "a") as file:
        file.write("\n# changed\n")
    sandbox.run("launch/install.sh")
    assert sandbox.asked("--editable")
    assert not sandbox.asked("-m venv")


def test_an_installation_that_failed_is_taken_up_again(sandbox: Sandbox) -> None:
    sandbox.state("pip-fails")
    assert sandbox.run("launch/install.sh").returncode != 0
    (sandbox.root / "pip-fails").unlink()
    assert sandbox.run("launch/install.sh").returncode == 0
    assert sandbox.asked("--editable")


# ---------------------------------------------------------------- install.sh: the CPU build of torch


def test_the_cpu_build_comes_through_uv_in_pyprojects_range(sandbox: Sandbox) -> None:
    sandbox.state("uv-plan", " + torch==2.13.0+cpu\n")
    done = sandbox.run("launch/install.sh")
    planned, installed = sandbox.asked("-m uv pip install")
    assert "--torch-backend=cpu" in planned and "--torch-backend=cpu" in installed
    assert installed.split()[-1] in (CHECKOUT / "pyproject.toml").read_text()
    assert installed.split()[-1].startswith("torch>=")
    assert "plain pip" not in done.stderr


@pytest.mark.parametrize("mood", ["no-uv", "no-plan", "cuda-plan", "uv-breaks-torch"])
def test_where_uv_has_no_cpu_build_pip_goes_on(sandbox: Sandbox, mood: str) -> None:
    plans = {"cuda-plan": " + torch==2.13.0\n + nvidia-cublas==13.1\n", "uv-breaks-torch": " + torch==2.13.0+cpu\n"}
    if mood in plans:
        sandbox.state("uv-plan", plans[mood])
    sandbox.state(mood)
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 0
    assert done.stderr.count("going on with plain pip") == 1
    assert sandbox.asked("--editable")
    real_installs = [line for line in sandbox.asked("-m uv pip install") if "--dry-run" not in line]
    assert len(real_installs) == (mood == "uv-breaks-torch")
    assert bool(sandbox.asked("pip uninstall")) == (mood == "uv-breaks-torch")


def test_with_an_nvidia_driver_uv_is_not_asked(sandbox: Sandbox) -> None:
    sandbox.program("nvidia-smi")
    done = sandbox.run("launch/install.sh")
    assert "about 3 GB" in done.stderr
    assert not sandbox.asked("-m uv") and not sandbox.asked("--quiet uv")


# ---------------------------------------------------------------- quickstart.sh, test.sh and .ci/run


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_quickstart_help_installs_nothing(sandbox: Sandbox, flag: str) -> None:
    done = sandbox.run("launch/quickstart.sh", flag)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: launch/quickstart.sh [--out DIR] [--no-serve]")
    assert sandbox.log == []


@pytest.mark.parametrize("args", [["--oot", "x"], ["--out"], ["--out="], ["--out", ""], ["extra"]])
def test_quickstart_refuses_other_arguments_in_one_line(sandbox: Sandbox, args: list[str]) -> None:
    done = sandbox.run("launch/quickstart.sh", *args)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr
    assert sandbox.log == []


@pytest.mark.parametrize(
    ("args", "out"), [([], "./out/quickstart"), (["--out", "my results"], "my results"), (["--out=a b"], "a b")]
)
def test_quickstart_runs_the_suite_and_says_how_to_judge(sandbox: Sandbox, args: list[str], out: str) -> None:
    done = sandbox.run("launch/quickstart.sh", *args)
    assert done.returncode == 0, done.stderr
    jobs = min(2, os.cpu_count() or 1)
    registered, run, prepared, how = done.stdout.splitlines()[-4:]
    assert registered == f"replicate preregistration register ablation_2x2 --out {out}"
    assert run == f"replicate grid run ablation_2x2 --out {out} --jobs {jobs}"
    assert prepared == f"replicate judge prepare {out}"
    assert f"replicate judge serve {shlex.quote(out)}".replace("'", "") in how.replace("\\", "")
    assert not sandbox.asked("judge serve")


def test_quickstart_makes_a_panel_once_and_opens_its_page_on_a_terminal(sandbox: Sandbox) -> None:
    database = sandbox.root / "judged" / "judging" / "judging.sqlite"
    database.parent.mkdir(parents=True)
    database.touch()
    words = ["launch/quickstart.sh", "--out", str(sandbox.root / "judged")]
    done = sandbox.run(*words, terminal=True)
    assert done.returncode == 0
    assert not sandbox.asked("judge prepare") and sandbox.log[-1].startswith("replicate judge serve ")
    assert sandbox.run(*words, "--no-serve", terminal=True).returncode == 0
    assert not sandbox.asked("judge serve")


def test_quickstart_ends_where_the_grid_fails(sandbox: Sandbox) -> None:
    sandbox.run("launch/quickstart.sh")
    (sandbox.venv / "bin" / "replicate").write_text("#!/usr/bin/env bash\n[[ $1 != grid ]] || exit 3\n")
    done = sandbox.run("launch/quickstart.sh")
    assert done.returncode == 3 and "judging" not in done.stdout


def test_quickstart_registers_no_plan_in_a_folder_that_has_begun(sandbox: Sandbox) -> None:
    begun = sandbox.root / "begun"
    begun.mkdir()
    (begun / "suite.yaml").touch()
    done = sandbox.run("launch/quickstart.sh", "--out", str(begun))
    assert done.returncode == 0, done.stderr
    assert not sandbox.asked("replicate preregistration") and sandbox.asked("replicate grid run")


def test_local_sh_is_replicate_train_and_on_several_machines_torchrun(sandbox: Sandbox) -> None:
    sandbox.program("sed")
    done = sandbox.run("launch/local.sh", "--config", "arms/both.yaml", "--out", "a b")
    assert done.stdout.splitlines()[-1] == "replicate train --config arms/both.yaml --out a b"
    sandbox.extra_env |= {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    done = sandbox.run("launch/local.sh", "--out", "x")
    assert done.returncode == 2
    assert "NNODES is 4: set NODE_RANK (from 0), MASTER_ADDR (the first machine) and DEVICES" in done.stderr
    torchrun = sandbox.venv / "bin" / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\necho "torchrun $*"\n')
    torchrun.chmod(0o755)
    sandbox.extra_env |= {"DEVICES": "8"}
    assert sandbox.run("launch/local.sh", "--out", "x").stdout.splitlines()[-1] == (
        "torchrun --nnodes=4 --node-rank=1 --nproc-per-node=8 --master-addr=first --master-port=29500 "
        "-m replication train --out x"
    )
    with socket.create_server(("127.0.0.1", 0)) as busy:
        sandbox.extra_env |= {"NODE_RANK": "0", "MASTER_PORT": str(busy.getsockname()[1])}
        done = sandbox.run("launch/local.sh", "--out", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "MASTER_PORT: another program listens at" in done.stderr


@pytest.mark.parametrize(
    ("args", "seeds"), [([], "--seeds 1,2,3,4,5,6,7,8 "), (["--seeds", "7,9", "--dry-run"], "--seeds 7,9 --dry-run ")]
)
def test_ablation_submits_the_grid(sandbox: Sandbox, args: list[str], seeds: str) -> None:
    done = sandbox.run("launch/ablation_2x2.sh", "my site.env", "node_8gpu_zero2", *args, "--out", "x")
    assert done.returncode == 0, done.stderr
    expected = f"replicate grid submit ablation_2x2 --site my site.env --cluster node_8gpu_zero2 {seeds}--out x"
    assert done.stdout.splitlines()[-1] == expected
    command = "replicate preregistration register ablation_2x2 --unless-begun --cluster node_8gpu_zero2"
    registered = [f"{command} {seeds}--out x"]
    assert sandbox.asked("replicate preregistration") == ([] if "--dry-run" in args else registered)


def test_ablation_without_its_two_arguments_says_how_to_call_it(sandbox: Sandbox) -> None:
    done = sandbox.run("launch/ablation_2x2.sh", "site.env")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: launch/ablation_2x2.sh SITE CLUSTER")
    assert sandbox.log == []


@pytest.mark.parametrize("small", [True, False])
def test_gpu_check_asks_for_what_exists(sandbox: Sandbox, small: bool) -> None:
    """Every command of every part, as both kinds of machine would run it: the keys and files in them are real."""
    for tool in ("python", "sed"):
        sandbox.program(tool, FAKE_PYTHON if tool == "python" else "#!/usr/bin/env bash\n")
    if not small:
        sandbox.program("nvidia-smi")
    done = sandbox.run("launch/gpu_check.sh", *(["--small"] if small else []), "all", "a b")
    assert done.returncode == 0, done.stderr
    commands = [line.split() for line in sandbox.log if line.startswith("replicate")]
    verbs = [" ".join(words[1:3]) for words in commands]
    assert [verbs.count(v) for v in ("bench head", "bench step", "grid run")] == [2, 6, 2]
    for words in commands:
        layers = [value for word, value in pairwise(words) if word == "--config"]
        if "grid" in words:
            suite = load_suite(words[3])
            layers = [*suite.layers, f"arms/{suite.arms[0]}.yaml"]
        load_run(layers, [word for word in words if word.startswith("--") and "." in word and "=" in word])


def test_gpu_check_takes_an_environment_that_has_everything(sandbox: Sandbox) -> None:
    """A machine that is lent for an hour may reach no package index."""
    other = sandbox.root / "an environment"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").write_text(FAKE_PYTHON)
    (other / "bin" / "python").chmod(0o755)
    sandbox.state("torch")
    sandbox.extra_env["REPLICATION_VENV"] = str(other)
    done = sandbox.run("launch/gpu_check.sh", "--small", "rates", "x")
    assert done.returncode == 0, done.stderr
    assert not sandbox.asked("pip") and not sandbox.venv.exists()
    assert len(sandbox.asked("-m replication bench rates --config model/tiny.yaml")) == 1


def test_gpu_check_without_a_gpu_or_with_another_part_is_one_line(sandbox: Sandbox) -> None:
    for args, words in (
        (["step"], "nvidia-smi finds no GPU; --small tries"),
        (["steps"], "no part 'steps'; the parts"),
    ):
        done = sandbox.run("launch/gpu_check.sh", *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert words in done.stderr and sandbox.log == []


def test_test_sh_lints_types_and_ends_with_pytest(sandbox: Sandbox) -> None:
    done = sandbox.run("launch/test.sh", "tests/test_config.py", "-k", "two words")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "pytest's last line"
    after = sandbox.log[sandbox.log.index("ruff check .") :]
    assert after == [
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "python -m pytest tests/test_config.py -k two words",
        f"env 1 cpu {sandbox.checkout}",
    ]
    assert sandbox.asked("[test]")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as .ci/run does to install packages")
def test_ci_installs_what_is_missing_and_ends_with_pytest(sandbox: Sandbox) -> None:
    sandbox.program("apt-get", '#!/usr/bin/env bash\nprintf "%s\\n" "apt-get $*" >>"$FAKE/log"\n')
    for tool in ("g++", "git", "slurmctld", "slurmdbd", "mariadbd", "munged", "chromium", "postgres"):
        sandbox.program(tool)
    done = sandbox.run(".ci/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "pytest's last line"
    assert [line.split()[-1] for line in sandbox.asked("apt-get")] == ["-qq", "shellcheck"]
    sandbox.program("shellcheck")
    sandbox.run(".ci/run")
    assert sandbox.asked("apt-get") == []


@pytest.mark.parametrize(
    "site, set_by_the_user, expected",
    [
        ("", {}, "/tmp/replication-{uid}/inductor /tmp/replication-{uid}/triton"),
        ("SITE_SCRATCH={scratch}", {}, "{scratch}/replication-7/inductor {scratch}/replication-7/triton"),
        ("", {"TRITON_CACHE_DIR": "/mine"}, "/tmp/replication-{uid}/inductor /mine"),
    ],
)
def test_compilers_keep_their_caches_on_the_nodes_own_disk(tmp_path, site, set_by_the_user, expected):
    """On a disk that nodes share they race. What the user set stays."""
    words = {"uid": os.getuid(), "scratch": tmp_path}
    (tmp_path / "site.env").write_text(f"SITE_MASTER_ADDR=127.0.0.1\n{site.format(**words)}\n")
    script = "srun() { :; }; source launch/job.sh; set_up_nodes; echo $TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR"
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_SUBMIT_DIR": str(CHECKOUT)}
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True,
        env=clean | job | {"REPLICATION_SITE": str(tmp_path / "site.env")} | set_by_the_user,
    )  # fmt: skip
    assert done.stdout.split() == expected.format(**words).split()
