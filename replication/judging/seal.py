"""The sealed key: which arm, seed and completion stands behind each item. Written once, before any vote.

It lies in a folder of its own, apart from the database, and only the commands that make a panel, add judges or lock it
read it. The panel holds the SHA-256 of the file from the start, so that a key that was changed afterwards is found out.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from replication.errors import UserError
from replication.runs.files import write_text


@dataclass(frozen=True)
class Behind:
    """What stands behind an item."""

    seed: int
    arm_first: str
    arm_second: str
    sample_first: int
    sample_second: int


@dataclass(frozen=True)
class Key:
    """All that is sealed.

    Attributes:
        secret: what the design is drawn from.
        prompts, seeds: ids in the order of the design's indices.
        samples_baseline, samples_treatment: sample numbers in that order.
        items: item id -> what stands behind it.
        samples: arm -> sample numbers, of a panel of more than two arms; `by_arm` has them of every panel.
    """

    panel_id: str
    secret: str
    baseline: str
    treatment: str
    prompts: list[int]
    seeds: list[int]
    samples_baseline: list[int]
    samples_treatment: list[int]
    repeat_share: float
    n_attention: int
    items: dict[str, Behind]
    samples: dict[str, list[int]] = field(default_factory=dict)

    @property
    def by_arm(self) -> dict[str, list[int]]:
        return self.samples or {self.baseline: self.samples_baseline, self.treatment: self.samples_treatment}


def write_key(folder: Path, key: Key) -> str:
    """Write DIR/sealed/key.json, readable by its owner alone; return its SHA-256.

    Raises:
        UserError: there is one already.
    """
    path = folder / "key.json"
    if path.exists():
        raise UserError(
            f"{path}: there already; a panel's key is written once. If its panel lies in another database, "
            "name that; if it was never made, move the key away"
        )
    if not folder.is_dir():
        folder.mkdir(parents=True)
        os.chmod(folder, 0o700)
    text = json.dumps(asdict(key), indent=1)
    write_text(path, text)
    os.chmod(path, 0o600)
    return hashlib.sha256(text.encode()).hexdigest()


def read_by_others(folder: Path) -> float | None:
    """When the key was last read by anything but these commands, in seconds since 1970, by the file's time of access.

    None: not since it was written, as far as the file system tells. A backup and a copy read it too.
    """
    with suppress(OSError):
        facts = (folder / "key.json").stat()
        return facts.st_atime if facts.st_atime_ns > facts.st_mtime_ns else None
    return None


def remove_key(folder: Path) -> None:
    """Take back what write_key wrote, for a panel that came to nothing."""
    (folder / "key.json").unlink(missing_ok=True)


def read_key(folder: Path, expected_sha256: str) -> Key:
    """Open the seal.

    Raises:
        UserError: no key there, or another one than the panel was made with.
    """
    path = folder / "key.json"
    try:
        facts, data = path.stat(), path.read_bytes()
        with suppress(OSError):  # of a file that is another user's, or on a medium that is only read
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # our own reading leaves no trace of another's
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; the sealed key is needed to add judges and to lock: do it where the panel was "
            "made, or name the folder that holds it with --key"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); lock it as the user who made the panel") from None
    if hashlib.sha256(data).hexdigest() != expected_sha256:
        raise UserError(f"{path}: is not the key that this panel was made with (its SHA-256 differs); restore that one")
    values = json.loads(data)
    return Key(**(values | {"items": {name: Behind(**behind) for name, behind in values["items"].items()}}))
