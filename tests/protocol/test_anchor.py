"""The anchor: a time-stamping authority that openssl makes in a folder answers our request; what is said of that."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import Synthetic, build_suite, edit_manifest

from replication.cli.main import main
from replication.config import AnalysisConfig, SuiteConfig, load_suite
from replication.protocol.anchor import anchor_sentence, stem, write_requests
from replication.protocol.deviations import check_plan
from replication.protocol.preregistration import plan_stamp, read_plan, register
from replication.runs.layout import SuiteDir

CONFIG = """
[tsa]
default_tsa = a
[a]
serial = {folder}/serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
accuracy = secs:1
tsa_name = yes
ess_cert_id_alg = sha256
[ca]
basicConstraints = critical,CA:true
[signer]
extendedKeyUsage = critical,timeStamping
"""


def openssl(*words: object) -> str:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Authority:
    """A certificate authority, and a time-stamping one below it."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder, self.ca, self.config = folder, folder / "ca.pem", folder / "tsa.cnf"
        self.config.write_text(CONFIG.format(folder=folder))
        key = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "/dev/null")
        root = ("-x509", "-days", "2", "-subj", f"/CN={name} root", "-keyout", folder / "ca.key", "-out", self.ca)
        openssl(*key, *root, "-addext", "basicConstraints=critical,CA:true")
        openssl(*key, "-subj", f"/CN={name}", "-keyout", folder / "tsa.key", "-out", folder / "tsa.csr")
        by = ("-CA", self.ca, "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", "2")
        extended = ("-extfile", self.config, "-extensions", "signer")
        openssl("x509", "-req", "-in", folder / "tsa.csr", *by, *extended, "-out", folder / "tsa.pem")

    def answer(self, request: Path) -> None:
        signer = ("-signer", self.folder / "tsa.pem", "-inkey", self.folder / "tsa.key", "-chain", self.ca)
        words = ("-config", self.config, "-section", "a", "-queryfile", request, "-out", request.with_suffix(".tsr"))
        openssl("ts", "-reply", *words, *signer)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("authorities")
    return Authority(folder / "one", "Clock One"), Authority(folder / "two", "Clock Two")


@pytest.fixture
def registered(tmp_path: Path) -> tuple[SuiteDir, SuiteConfig]:
    _, suite = build_suite(tmp_path / "other", Synthetic(arms=("baseline", "both"), seeds=(1,), steps=60))
    suite_dir = SuiteDir(tmp_path / "out")
    register(suite_dir, suite)
    return suite_dir, suite


def said(suite_dir: SuiteDir, *began: float) -> str:
    record = read_plan(suite_dir)
    assert record is not None
    return anchor_sentence(suite_dir, record, began)


def test_the_request_is_what_openssl_makes(registered: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> None:
    suite_dir, _ = registered
    request, zipped = write_requests(suite_dir)[:2]
    ours = openssl("ts", "-query", "-in", request, "-text")
    openssl("ts", "-query", "-data", suite_dir.plan, "-sha256", "-cert", "-no_nonce", "-out", tmp_path / "theirs")
    assert request.read_bytes() == (tmp_path / "theirs").read_bytes() and "Certificate required: yes" in ours
    with zipfile.ZipFile(zipped) as file:
        assert {"plan.md", "plan.json"} <= {*file.namelist()}
        assert file.read("plan.json") == suite_dir.plan.read_bytes()


def test_an_answer_is_checked_kept_and_said(
    registered: tuple[SuiteDir, SuiteConfig],
    authorities: tuple[Authority, Authority],
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite_dir, _ = registered
    one, two = authorities
    out = str(suite_dir.root)
    assert main(["plan", "anchor", out]) == 0
    request = stem(suite_dir).with_suffix(".tsq")
    assert f"--data-binary @{request}" in capsys.readouterr().out
    assert main(["plan", "anchor", out, "--ca", str(one.ca)]) == 2
    assert "put the authority's answer there" in capsys.readouterr().err
    assert said(suite_dir) == "The plan is not anchored: no clock but those of this folder says when it was there."
    one.answer(request)
    assert main(["plan", "anchor", out, "--ca", str(one.ca)]) == 0
    assert "UTC by DirName:/CN=Clock One" in capsys.readouterr().out
    early = said(suite_dir, 4e9)
    assert early.startswith("The plan is anchored before the first step: 20") and "Clock One" in early
    assert said(suite_dir, 1e9, 4e9).startswith("The plan is anchored later: 20")
    assert early.replace("before the first step", "X") == said(suite_dir).replace("before the first step", "X")
    # an answer of another authority than the one that is trusted
    two.answer(request)
    assert main(["plan", "anchor", out, "--ca", str(one.ca)]) == 2
    assert "is no answer for plan.json by ca.pem" in capsys.readouterr().err
    assert said(suite_dir).startswith("The plan is not anchored: ")
    # an answer for another plan, under this one's name
    one.answer(request)
    answer = request.with_suffix(".tsr").read_bytes()
    suite_dir.plan.write_text(suite_dir.plan.read_text().replace('"margin_nats": 0.02', '"margin_nats": 0.05'))
    stem(suite_dir).with_suffix(".tsr").write_bytes(answer)
    assert said(suite_dir).startswith("The plan is not anchored: ") and "is no answer for plan.json" in said(suite_dir)


def test_an_amended_plan_has_the_anchor_of_the_earlier_one_by_its_name(
    registered: tuple[SuiteDir, SuiteConfig], authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    suite_dir, suite = registered
    write_requests(suite_dir)
    authorities[0].answer(stem(suite_dir).with_suffix(".tsq"))
    shutil.copy(authorities[0].ca, suite_dir.anchor / "ca.pem")
    register(suite_dir, replace(suite, analysis=AnalysisConfig(margin_nats=0.05)), amend="a typing error")
    assert said(suite_dir).startswith("The earlier plan plan-1.json is anchored before the first step: ")


def test_check_and_report_say_it(
    registered: tuple[SuiteDir, SuiteConfig], authorities: tuple[Authority, Authority]
) -> None:
    suite_dir, _ = registered
    build_suite(suite_dir.root, Synthetic(arms=("baseline", "both"), seeds=(1,), steps=60))
    for arm in ("baseline", "both"):
        run = suite_dir.cell(arm, 1)
        edit_manifest(run, plan=plan_stamp(run), started_at="2126-01-01T00:00:00+0000")
    write_requests(suite_dir)
    authorities[0].answer(stem(suite_dir).with_suffix(".tsq"))
    shutil.copy(authorities[0].ca, suite_dir.anchor / "ca.pem")
    found = check_plan(suite_dir, load_suite(suite_dir.suite))
    assert "before the data. The plan is anchored before the first step: " in found.sentences[0]
