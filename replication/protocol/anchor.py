"""OUT/anchor: what a clock that is nobody's here needs to vouch that a plan existed by then, and what it answered.

plan-<hash>.tsq    request of RFC 3161 for the SHA-256 of plan.json, to be sent to a time-stamping authority
plan-<hash>.tsr    the authority's answer, put there by a person; ca.pem: the certificates that it is checked with
plan-<hash>.json   the plan, for OpenTimestamps, whose proof lies beside it
osf.zip            the plan with its page, suite and code, for a registry
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from replication.errors import UserError, first_line
from replication.protocol.preregistration import Preregistration
from replication.runs.files import file_sha256, write_bytes
from replication.runs.layout import SuiteDir
from replication.runs.manifest import code_patch

BEFORE_HASH = bytes.fromhex("30390201013031300d060960864801650304020105000420")
"""DER of a TimeStampReq: version 1, then an imprint by SHA-256, whose 32 bytes follow."""
BEHIND_HASH = bytes.fromhex("0101ff")  # certReq: the answer shall hold the authority's certificate


@dataclass(frozen=True)
class Anchor:
    """What an authority's answer says of a plan."""

    file: str  # plan.json, or the earlier one that it is of
    at: datetime
    authority: str  # as its certificate names it


def stem(suite_dir: SuiteDir, file: str = "plan.json") -> Path:
    """Of the files of a plan, by the hash of its bytes, without their suffix."""
    return suite_dir.anchor / f"plan-{file_sha256(suite_dir.root / file)[:16]}"


def write_requests(suite_dir: SuiteDir) -> list[Path]:
    """Write request, copy and zip of plan.json, and an OpenTimestamps proof where `ots` is installed; their paths."""
    of, plan = stem(suite_dir), suite_dir.plan.read_bytes()
    request, copy, zipped = (of.with_suffix(".tsq"), of.with_suffix(".json"), suite_dir.anchor / "osf.zip")
    write_bytes(request, BEFORE_HASH + bytes.fromhex(file_sha256(suite_dir.plan)) + BEHIND_HASH)
    write_bytes(copy, plan)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as file:
        for path in (suite_dir.plan_md, suite_dir.plan, suite_dir.suite):
            if path.is_file():
                file.write(path, path.name)
        if patch := code_patch():
            file.writestr("code.patch", patch)
    proof = copy.with_suffix(".json.ots")
    if shutil.which("ots") and not proof.exists():
        with suppress(UserError):  # its calendars may not be reached from here; the request is there all the same
            _call("ots", "stamp", copy)
    return [path for path in (request, zipped, proof) if path.exists()]


def verify(suite_dir: SuiteDir, file: str = "plan.json") -> Anchor | None:
    """The answer for a plan, checked by openssl with ca.pem; None where there is none. UserError: it is false."""
    answer, ca = stem(suite_dir, file).with_suffix(".tsr"), suite_dir.anchor / "ca.pem"
    if not answer.is_file():
        return None
    if not ca.is_file():
        raise UserError(f"{answer}: cannot be checked; name the authority's certificates: --ca FILE")
    checked = ("-data", suite_dir.root / file, "-in", answer, "-CAfile", ca)
    _call("openssl", "ts", "-verify", *checked, refused=f"{answer}: is no answer for {file} by {ca.name}")
    text = _call("openssl", "ts", "-reply", "-in", answer, "-text")
    at, authority = (re.search(rf"^{key}: (.*)$", text, re.M) for key in ("Time stamp", "TSA"))
    if at is None:
        raise UserError(f"{answer}: has no time that openssl shows; ask the authority again")
    time = datetime.strptime(re.sub(r"\.\d+", "", at[1]), "%b %d %H:%M:%S %Y %Z").replace(tzinfo=UTC)
    return Anchor(file, time, authority[1] if authority else "an authority that its answer does not name")


def anchor_sentence(suite_dir: SuiteDir, record: Preregistration, began: Iterable[float]) -> str:
    """Whether the newest plan with an answer was anchored before the cells began, by their clocks."""
    try:
        files = (suite_dir.plan.name, *(entry.file for entry in reversed(record.history)))
        anchor = next((found for file in files if (found := verify(suite_dir, file))), None)
    except (UserError, OSError) as error:
        return f"The plan is not anchored: {first_line(error)}."
    if anchor is None:
        return "The plan is not anchored: no clock but those of this folder says when it was there."
    first = min(began, default=None)
    when = "anchored before the first step" if first is None or anchor.at.timestamp() <= first else "anchored later"
    of = "The plan" if anchor.file == suite_dir.plan.name else f"The earlier plan {anchor.file}"
    return f"{of} is {when}: {anchor.at:%Y-%m-%d %H:%M:%S} UTC by {anchor.authority}."


def _call(*words: str | Path, refused: str = "") -> str:
    """What a program prints. UserError where it is not there or fails, with `refused`, or its last line."""
    try:
        done = subprocess.run([str(w) for w in words], capture_output=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{words[0]}: cannot be run ({first_line(error)}); install it") from None
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{refused or ' '.join(map(str, words[:2]))} ({line}); put the right one there")
    return done.stdout
