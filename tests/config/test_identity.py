"""The identity of a run over versions: hashes never move, and a new key is left out of them while it is neutral."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import field, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

from replication.config import (
    RunConfig,
    SourceConfig,
    TrainingConfig,
    differences,
    sampling_settings,
    scientific,
    scientific_hash,
    without_neutral,
)
from replication.config import load as loading
from replication.config.identity import NOT_SCIENTIFIC
from replication.config.reading import hints
from replication.config.schema import GenerationConfig
from replication.data.folder import request_of
from replication.errors import UserError

BASE_KEYS = Path(__file__).with_name("base_keys.txt")
"""Scientific keys, and those of the sampling, of the first version; in every hash, whatever their value."""


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key of a schema, those of list entries too."""
    for entry in dataclasses.fields(cls):
        hint = hints(cls)[entry.name]
        inner = [h for h in (hint, *get_args(hint)) if is_dataclass(h)]
        if inner:
            yield from fields_of(inner[0], f"{prefix}{entry.name}.")
        elif "found" not in entry.metadata:  # which is no key: see test_paths.py
            yield f"{prefix}{entry.name}", entry


def undeclared(cls: type) -> set[str]:
    """Keys of a schema that would make folders of earlier versions foreign."""
    free = tuple(name for name in NOT_SCIENTIFIC if name != "generation.")
    of_hash = {k: f for k, f in fields_of(cls) if not k.startswith((*free, "generation.prompts", "generation.rows_at"))}
    of_hash = {k: f for k, f in of_hash.items() if f.default_factory is not dict}  # an empty mapping has no keys
    return {k for k, f in of_hash.items() if "neutral_since" not in f.metadata} ^ set(BASE_KEYS.read_text().split())


def planted(cls: type, section: str, **metadata: str) -> type:
    """A schema with one key more in a section, `planted` with default 0."""
    plant = field(default=0, metadata=metadata)
    inner = make_dataclass(
        hints(cls)[section].__name__, [("planted", int, plant)], bases=(hints(cls)[section],), frozen=True
    )
    return make_dataclass(cls.__name__, [(section, inner, field(default_factory=inner))], bases=(cls,), frozen=True)


def test_a_new_key_declares_since_when_it_is_neutral():
    assert not undeclared(RunConfig), "give the field metadata neutral_since (config/README.md); base_keys.txt stays"
    assert not undeclared(planted(RunConfig, "model", neutral_since="9.9.9"))
    assert undeclared(planted(RunConfig, "model")) == {"model.planted"}
    assert undeclared(planted(RunConfig, "generation")) == {"generation.planted"}
    assert not undeclared(planted(RunConfig, "cluster"))


def test_the_hash_of_what_there_was_is_what_it_was():
    assert scientific_hash(RunConfig()) == "c4b60262c9e7d858"
    source = SourceConfig("web", kind="hub", path="a/b")
    assert (
        scientific_hash(replace(RunConfig(), data=replace(RunConfig().data, sources=(source,)))) == "91e4b2bc7cbaaac1"
    )


def test_a_neutral_key_is_in_no_hash_and_no_comparison(monkeypatch):
    before = loading.load_run(["arms/both.yaml"])
    monkeypatch.setattr(loading, "RunConfig", planted(RunConfig, "training", neutral_since="9.9.9"))
    after, other = (loading.load_run(["arms/both.yaml"], [f"--training.planted={n}"]) for n in (0, 1))
    assert scientific(after) == scientific(before) and scientific_hash(after) == scientific_hash(before)
    assert scientific_hash(other) != scientific_hash(before)
    assert differences(scientific(before), scientific(other)) == {"training.planted": (None, 1)}


def test_a_key_that_a_record_lacks_counts_as_neutral():
    there = {"training.steps": 5}
    assert differences(there, {**there, "training.muon_gram": False}) == {}
    assert differences({**there, "training.muon_coefficients": "quintic"}, there) == {}
    assert differences(there, {**there, "training.muon_gram": True}) == {"training.muon_gram": (False, True)}


def test_a_key_of_list_entries_and_of_sampling_is_left_out_too():
    source = make_dataclass(
        "SourceConfig",
        [("planted", int, field(default=0, metadata={"neutral_since": "9.9.9"}))],
        bases=(SourceConfig,),
        frozen=True,
    )
    old, new, other = SourceConfig("web"), source("web"), source("web", planted=1)
    of = [replace(RunConfig().data, sources=(s,)) for s in (old, new, other)]
    assert request_of(of[0]) == request_of(of[1]) != request_of(of[2])
    assert without_neutral(other)["planted"] == 1
    sampling = hints(planted(RunConfig, "generation", neutral_since="9.9.9"))["generation"]
    assert sampling_settings(sampling()) == sampling_settings(GenerationConfig())
    assert sampling_settings(sampling(planted=1))["planted"] == 1


def test_muons_new_keys_enter_where_they_are_set():
    muon = TrainingConfig(optimizer="muon")
    hashes = {
        scientific_hash(replace(RunConfig(), training=replace(muon, **keys)))
        for keys in ({}, {"muon_gram": True}, {"muon_coefficients": "polar_express"})
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("key, word", [("muon_coefficients=polar_express", "quintic"), ("muon_gram=true", "false")])
def test_muons_keys_are_refused_for_other_optimizers(key, word):
    with pytest.raises(UserError, match=rf"training\.{key.split('=')[0]}: adamw does not use it; set it to {word}"):
        loading.load_run([], [f"--training.{key}"])
