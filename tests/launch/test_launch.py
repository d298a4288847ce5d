"""The launch scripts: syntax, shellcheck, and what they do in a made-up checkout with a made-up Python."""

from __future__ import annotations

import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from paths import CHECKOUT
from required import do_without

from replication.config import load_run, load_suite

LIBRARY = "launch/job.sh"  # sourced, never called
SCRIPTS = [".ci/run", *sorted(str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "launch").rglob("*.s*")
                              if p.suffix in (".sh", ".sbatch") and p.name != "job.sh")]  # fmt: skip
TOOLS = ("bash", "env", "dirname", "cat", "ls", "cp", "mkdir", "touch", "chmod", "tee")
TOOLS += ("sha256sum", "uname", "timeout", "grep", "sed")

# Answers as Python, pip and uv would, and writes down what it was asked.
FAKE_PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "python $*" >>"$FAKE/log"
here=$(dirname "$0")
bring_tools() {
  for tool in replicate ruff mypy; do
    printf '%s\n' '#!/usr/bin/env bash' "echo \"$tool \$*\" | tee -a \"\$FAKE/log\"" >"$here/$tool"
    chmod +x "$here/$tool"
  done
}
case "$*" in
  --version | "-P --version") echo "Python 3.11.99" ;;
  *version_info*) [[ ! -e $FAKE/old ]] ;;
  *"import ensurepip"*) [[ ! -e $FAKE/no-venv ]] ;;
  *"import torch"*) [[ -e $FAKE/torch ]] ;;
  "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install --quiet uv") [[ ! -e $FAKE/no-uv ]] ;;
  "-m pip uninstall"*) ;;
  "-m pip install --quiet --no-deps torch=="*) touch "$FAKE/torch" ;;
  "-m pip install"*)
    echo "pip is downloading" >&2
    [[ ! -e $FAKE/pip-fails ]] || exit 1
    bring_tools ;;
  "-m uv --version") exit 1 ;;
  "-m uv"*--dry-run*) [[ -e $FAKE/uv-plan ]] && cat "$FAKE/uv-plan" ;;
  "-m uv"*--editable*)
    echo "uv is downloading" >&2
    [[ ! -e $FAKE/lock-fails ]] || exit 1
    bring_tools ;;
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
        path.unlink(missing_ok=True)  # a link to the real tool
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
    assert 0 <= done.stderr.index("downloading about 480 MB") < done.stderr.index("uv is downloading")
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
    sandbox.state("lock-fails")
    sandbox.state("pip-fails")
    assert sandbox.run("launch/install.sh").returncode != 0
    (sandbox.root / "pip-fails").unlink()
    assert sandbox.run("launch/install.sh").returncode == 0
    assert sandbox.asked("--editable")


# ---------------------------------------------------------------- install.sh: the locked versions


@pytest.mark.parametrize("gpu", [False, True])
def test_the_locked_versions_are_installed(sandbox: Sandbox, gpu: bool) -> None:
    if gpu:
        sandbox.program("nvidia-smi")
    done = sandbox.run("launch/install.sh", "judge")
    assert done.returncode == 0, done.stderr
    (command,) = sandbox.asked("--editable")
    lock = sandbox.checkout / "launch" / "requirements" / ("cuda.txt" if gpu else "cpu.txt")
    assert f"--constraint {lock} --editable {sandbox.checkout}[judge]" in command and command.startswith("python -m uv")
    with open(lock, "a") as file:
        file.write("# renewed\n")
    sandbox.run("launch/install.sh", "judge")
    assert sandbox.asked("--editable")


def test_without_the_locked_versions_pip_takes_the_ranges_and_one_line_says_so(sandbox: Sandbox) -> None:
    sandbox.state("lock-fails")
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not install the locked versions; going on with the newest in the ranges") == 1
    assert "--constraint" in sandbox.asked("--editable")[0] and "-m pip install" in sandbox.asked("--editable")[1]


def test_newest_versions_are_asked_for(sandbox: Sandbox) -> None:
    sandbox.run("launch/install.sh")
    sandbox.extra_env["REPLICATION_NEWEST"] = "1"
    done = sandbox.run("launch/install.sh")
    assert done.returncode == 0 and "locked" not in done.stderr
    (command,) = sandbox.asked("--editable")
    assert "-m pip install" in command and "--constraint" not in command


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_lock_has_hashes_and_names_no_index(kind: str) -> None:
    text = (CHECKOUT / "launch" / "requirements" / f"{kind}.txt").read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    lines = text.replace("\\\n", " ").splitlines()[1:]
    locked = {re.split(r"[=<> ]", line)[0]: line for line in lines}
    assert all(re.match(r"[\w-]+==\S+ ; [^#]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = [x for name in ("judge", "test", "export") for x in project["optional-dependencies"][name]]
    for wanted in map(Requirement, [*project["dependencies"], *extras]):
        name = wanted.name.lower()
        if name == "replication" or (name == "torch" and kind == "cpu"):
            continue
        version = re.search(r"==(\S+)", locked.get(name, ""))
        assert version and wanted.specifier.contains(version[1]), f"{name}: launch/requirements/lock.sh renews the lock"
    assert ("torch" in locked) == (kind == "cuda")


def test_the_malicious_releases_are_in_no_range() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (lightning,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lightning")
    assert [v for v in ("2.6.1", "2.6.2", "2.6.3", "2.6.4") if v in lightning.specifier] == ["2.6.1", "2.6.4"]


def test_in_a_wheel_nothing_is_installed(sandbox: Sandbox) -> None:
    """The scripts then lie in .../lib/python3.x/site-packages/replication/launch of the environment."""
    package = sandbox.root / "env" / "lib" / "python3.11" / "site-packages" / "replication"
    shutil.copytree(CHECKOUT / "launch", package / "launch")
    (sandbox.root / "env" / "bin").mkdir()
    (sandbox.root / "env" / "bin" / "replicate").write_text('#!/usr/bin/env bash\necho "replicate $*"\n')
    (sandbox.root / "env" / "bin" / "replicate").chmod(0o755)
    done = sandbox.run(str(package / "launch" / "local.sh"), "--out", "x")
    assert (done.stdout, done.stderr, sandbox.log) == ("replicate train --out x\n", "", [])


# ---------------------------------------------------------------- install.sh: the CPU build of torch


@pytest.mark.parametrize("newest", [False, True])
def test_the_cpu_build_comes_through_uv_as_locked_or_in_pyprojects_range(sandbox: Sandbox, newest: bool) -> None:
    sandbox.state("uv-plan", " + torch==2.13.0+cpu\n")
    sandbox.extra_env |= {"REPLICATION_NEWEST": "1"} if newest else {}
    done = sandbox.run("launch/install.sh")
    planned, installed = sandbox.asked("--torch-backend=cpu")
    assert installed.split()[-1] == planned.split()[-1]
    source = CHECKOUT / ("pyproject.toml" if newest else "launch/requirements/cuda.txt")
    assert installed.split()[-1] in source.read_text()
    assert installed.split()[-1].startswith("torch>=" if newest else "torch==")
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
    real_installs = [line for line in sandbox.asked("--torch-backend=cpu") if "--dry-run" not in line]
    assert len(real_installs) == (mood == "uv-breaks-torch")
    assert bool(sandbox.asked("pip uninstall")) == (mood == "uv-breaks-torch")


def test_with_an_nvidia_driver_uv_is_not_asked(sandbox: Sandbox) -> None:
    sandbox.program("nvidia-smi")
    done = sandbox.run("launch/install.sh")
    assert "about 3 GB" in done.stderr
    assert not sandbox.asked("--torch-backend") and not sandbox.asked("--no-deps")


# ---------------------------------------------------------------- quickstart.sh, test.sh and .ci/run


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_quickstart_help_installs_nothing(sandbox: Sandbox, flag: str) -> None:
    done = sandbox.run("launch/quickstart.sh", flag)
    assert done.returncode == 0
    assert "launch/quickstart.sh [--out DIR] [--no-serve]" in done.stdout
    assert sandbox.log == []


def test_quickstart_sets_up_and_is_the_verb(sandbox: Sandbox) -> None:
    done = sandbox.run("launch/quickstart.sh", "--out", "my results", "--no-serve")
    assert done.stdout.splitlines()[-1] == "replicate quickstart --out my results --no-serve"
    assert sandbox.asked("--editable")[0].endswith("[judge]")


def test_local_sh_is_replicate_train_and_on_several_machines_torchrun(sandbox: Sandbox) -> None:
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


def test_test_sh_takes_another_python(sandbox: Sandbox) -> None:
    done = sandbox.run("launch/test.sh", "--python", "3.14", "tests/config")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "neither uv nor the PATH has Python '3.14'; `uv python install 3.14` brings it" in done.stderr
    sandbox.program("python3.14", FAKE_PYTHON)
    done = sandbox.run("launch/test.sh", "--python", "3.14", "tests/config")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "pytest's last line"
    assert (sandbox.root / "elsewhere" / ".venv-3.14").is_dir() and not sandbox.venv.exists()
    assert sandbox.asked("-m pytest tests/config")
    sandbox.program("uv", f'#!/usr/bin/env bash\necho "uv $*" >>"$FAKE/log"; echo "{sandbox.root}/bin/python3.14"\n')
    assert sandbox.run("launch/test.sh", "--python", "3.14").returncode == 0
    assert sandbox.log[0] == "uv python find 3.14"


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
