"""A trained cell as a folder that transformers, and what reads its folders, loads: weights, configuration, tokenizer.

FOLDER/
  config.json generation_config.json model*.safetensors    as transformers writes them; fp32
  tokenizer.json tokenizer_config.json                     gives texts the ids that the model was trained on
  README.md                                                the model card
  export.json                                              which cell it is of, and how far its logits are from ours

It is written beside its place, loaded again, compared with our model, and then moved there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from replication.config import RunConfig, load_run, load_suite
from replication.data.store import TokenStore
from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError
from replication.generation.generate import load_model
from replication.model.layout import config_of, layout_of, weights_of
from replication.model.transformer import Transformer
from replication.protocol.certificate import Certificate, certify
from replication.protocol.deviations import PlanStatus, check_plan
from replication.runs.files import remove_tree, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, refuse_untrained
from replication.runs.records import read_record, write_record

TOLERANCE = 1e-4  # largest difference of logits, over the largest logit, in fp32
DRAWS = 3  # of random tokens: rounding may choose the other one of two experts that are as good as even
TEXTS = ("The sea, 1 234 km away.\n\n  def f(x):\n\treturn x ", "naïve café — Ω ≈ 日本語 🙂")


@dataclass(frozen=True)
class Exported:
    """What export.json says."""

    arm: str
    seed: int
    weights_sha256: str | None  # of the cell's final weights, as its manifest has it
    model_type: str
    largest_difference: float
    """Of logits on random tokens in fp32, over the largest logit."""


@dataclass(frozen=True)
class Evidence:
    """What a suite says of its cells; the certificate is none where there is no suite."""

    plan: PlanStatus
    certificate: Certificate | None

    @classmethod
    def of(cls, suite_dir: SuiteDir) -> Evidence:
        if not suite_dir.suite.is_file():
            return cls(check_plan(suite_dir), None)
        suite = load_suite(suite_dir.suite)
        certificate = certify(suite_dir, suite.arms, suite.seeds, strict=suite.analysis.strict_pairs)
        return cls(check_plan(suite_dir, suite), certificate)

    def of_cell(self, arm: str, seed: int) -> str:
        """The certificate of one cell in words."""
        certificate = self.certificate
        states = {of.seed: of.state for of in certificate.seeds} if certificate else {}
        if certificate is None or arm not in certificate.arms or seed not in states:
            return "none, the cell is in no suite"
        first = certificate.arms[0]
        if arm == first:
            return f"{states[seed]} at this seed; {first} is the arm that the others are compared with"
        pair = certificate.pair(arm, seed)
        return "; ".join((f"{pair.state}, beside {first} at this seed", *pair.reasons, *pair.departures))


def export_cell(run: RunDir, store: TokenStore, evidence: Evidence, folder: Path) -> tuple[Exported, bool]:
    """Write the folder of a trained cell; where it is there already, of these weights, only its card anew.

    Returns what export.json says, and whether the folder is new. UserError: the cell is not trained, no class of
    transformers computes its model, the folder holds something else, or what was written computes something else.
    """
    config, manifest = load_run([run.config]), refuse_untrained(run)
    there, layout = read_record(folder / "export.json", Exported), layout_of(config.model)
    if there is not None and there.weights_sha256 == manifest.final_weights_sha256:
        write_text(folder / "README.md", _card(config, manifest, evidence, there))  # plan and certificate may be new
        return there, False
    is_ours = there is not None and (there.arm, there.seed) == (config.arm, config.seed)
    if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else; name another folder with --to")
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.part")
    remove_tree(partial)
    partial.mkdir(parents=True)
    on_cpu, fp32 = replace(config.cluster, accelerator="cpu"), replace(config.generation, precision="32-true")
    ours = cast(Transformer, load_model(replace(config, cluster=on_cpu, generation=fp32), run))
    _write_model(config, ours, store, partial)
    _write_tokenizer(store.tokenizer, config.data.block_size_tokens, partial)
    _check_tokenizer(store.tokenizer, partial)
    difference = largest_difference(ours, partial)
    made = Exported(config.arm, config.seed, manifest.final_weights_sha256, layout.model_type, difference)
    write_text(partial / "README.md", _card(config, manifest, evidence, made))
    write_record(partial / "export.json", made)
    remove_tree(folder)
    partial.rename(folder)
    return made, True


def _write_model(config: RunConfig, ours: Transformer, store: TokenStore, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    g, model = config.generation, config.model
    keys = config_of(model, config.data.block_size_tokens, store.end_of_text_id)
    with torch.device("meta"):  # no weights of its own
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(layout_of(model).model_type, **keys))
    weights = weights_of(model, {name: value.contiguous() for name, value in ours.state_dict().items()})
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.tie_weights()
    theirs.generation_config = GenerationConfig(  # without a length, which would win over a caller's
        do_sample=True, temperature=g.temperature, top_k=g.top_k, top_p=g.top_p,
        eos_token_id=store.end_of_text_id, pad_token_id=store.end_of_text_id,
    )  # fmt: skip
    theirs.save_pretrained(folder)


def _write_tokenizer(tokenizer: TextTokenizer, max_positions: int, folder: Path) -> None:
    """Without what adds tokens to a text or cuts it: training used none of that."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    parts = json.loads(tokenizer.json()) | {"post_processor": None, "truncation": None, "padding": None}
    parts["model"]["dropout"] = None
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token=tokenizer.end_of_text,
        clean_up_tokenization_spaces=False, model_max_length=max_positions,
    ).save_pretrained(folder)  # fmt: skip


@torch.inference_mode()
def largest_difference(ours: Transformer, folder: Path) -> float:
    """Of the logits of random tokens, ours beside the folder's, in fp32, over the largest; UserError beyond TOLERANCE.

    A folder passes where one of a few draws does: rounding may turn a token to another expert in one of them, and a
    weight in a wrong place shows in all.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(64, theirs.config.max_position_embeddings)
    found = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        tokens_BT = torch.randint(0, ours.config.vocab_size, (2, length), generator=generator)
        a_BTV = ours.logits(ours(tokens_BT).hidden_BTD)
        b_BTV = theirs(input_ids=tokens_BT).logits
        found.append(float((a_BTV - b_BTV).abs().max() / a_BTV.abs().max()))
        if found[-1] <= TOLERANCE:
            return found[-1]
    raise UserError(
        f"{folder}: its logits are {min(found):.1e} from ours, more than {TOLERANCE:g} of the largest; this version of "
        "transformers computes another function: install one that pyproject.toml names"
    )


def _check_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """UserError where the folder's tokenizer gives a text other ids than ours, or reads them otherwise."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    if theirs.eos_token_id != tokenizer.end_of_text_id:
        raise UserError(f"{folder}: its end of text is token {theirs.eos_token_id}, ours {tokenizer.end_of_text_id}")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if theirs.encode(text) != ids or theirs.decode(ids) != tokenizer.decode(ids, skip_special_tokens=False):
            raise UserError(f"{folder}: its tokenizer reads {text!r} otherwise; install a version of transformers that "
                            "pyproject.toml names")  # fmt: skip


def _card(config: RunConfig, manifest: Manifest, evidence: Evidence, made: Exported) -> str:
    environment = Environment(
        loader=PackageLoader("replication.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    certificate = evidence.of_cell(config.arm, config.seed)
    return environment.get_template("card.md.j2").render(
        config=config, manifest=manifest, plan=evidence.plan, certificate=certificate, made=made
    )
