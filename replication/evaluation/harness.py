"""Tasks of lm-evaluation-harness on our own model, without a copy of it on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from replication.data.tokenizer import TextTokenizer
from replication.errors import UserError, first_line
from replication.evaluation.scoring import BATCH_TOKENS, Scorer
from replication.generation.sampling import Sampler, complete, row_key


@dataclass(frozen=True)
class Task:
    """One name that was asked for: a task, or a group or tag of several."""

    name: str
    asked: str  # hash of the task's settings and documents, of the limit, and of the harness's version
    loaded: Mapping[str, Mapping[str, Any]]  # tasks and groups by name, as the harness loaded them
    limit: int | None


def load_tasks(named: str, limit: int | None) -> list[Task]:
    """Tasks by a comma-separated list of names and of folders of task files; UserError for one that is not there."""
    words = [word for word in named.split(",") if word]
    folders = [word for word in words if Path(word).is_dir()]
    names = [word for word in words if word not in folders]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    for folder in folders:
        own = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not own:
            raise UserError(f"--tasks: {folder} holds no task file (a .yaml with a key `task`)")
        names += own
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise UserError(f"--tasks: {unknown[0]} is neither a folder nor a task; `lm-eval ls tasks` lists them")
    found = []
    for name in dict.fromkeys(names):
        try:
            loaded = manager.load([name])
        except Exception as error:  # of datasets, of the hub, or of the task's own code
            raise UserError(f"--tasks: {name} cannot be loaded ({first_line(error)})") from error
        digest = hashlib.sha256(f"{metadata.version('lm_eval')} {limit}".encode())
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            settings = {k: v for k, v in task.dump_config().items() if k != "dataset_kwargs"}  # paths of this machine
            for value in (settings, *task.eval_docs):
                digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        found.append(Task(name, digest.hexdigest(), loaded, limit))
    return found


def run_task(task: Task, scorer: Scorer, tokenizer: TextTokenizer) -> dict[str, float | None]:
    """Metric -> value; of a tag, which has no value of its own, `task metric` of each of its tasks."""
    for one in task.loaded["tasks"].values():
        one.set_fewshot_seed(DEFAULT_OTHER_SEED)  # every cell gets the same examples
    model = CellModel(scorer, tokenizer)  # not simple_evaluate, which lists the machine's packages every time
    results = evaluate(model, task.loaded, limit=task.limit, bootstrap_iters=0, log_samples=False)
    assert results is not None
    found = {**results["results"], **results.get("groups", {})}
    return {
        f"{'' if name == task.name else f'{name} '}{metric.removesuffix(',none')}": value
        for name, values in found.items()
        if name == task.name or task.name not in found
        for metric, value in values.items()
        if type(value) in (int, float) and "_stderr" not in metric and metric != "sample_len"
    }


class CellModel(TemplateLM):
    """Our model as the harness asks it; its own code cuts texts into context and continuation."""

    def __init__(self, scorer: Scorer, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self._scorer, self._text = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._scorer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        return self._text.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[tuple[float, bool]]:
        return self._scorer.score([(context, after) for _, context, after in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self._scorer.rolling([self._text.encode(*request.args) for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled by our own noise; a text ends before the first of the task's stop texts."""
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        found = [""] * len(requests)
        with self._scorer.reporter.bar("completions", len(requests)) as done:
            for alike in dict.fromkeys(settings):
                rows = [i for i, own in enumerate(settings) if own == alike]
                kwargs = normalize_gen_kwargs(requests[rows[0]].args[1])
                rows.sort(key=lambda i: len(requests[i].args[0]))
                size = max(1, BATCH_TOKENS // self._scorer.length)
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    texts = self._complete(batch, [requests[i].args[0] for i in batch], kwargs)
                    for i, text in zip(batch, texts, strict=True):
                        found[i] = postprocess_generated_text(text, kwargs["until"], None)
                    done(start + len(batch))
        return found

    def _complete(self, rows: Sequence[int], contexts: Sequence[str], kwargs: Mapping[str, Any]) -> list[str]:
        room = self._scorer.length - kwargs["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"--tasks: {kwargs['max_gen_toks']} tokens are to be generated, and the model was trained on blocks of "
                f"{self._scorer.length}; set max_gen_toks in the task's generation_kwargs"
            )
        sampler = Sampler(1.0, 1)
        if kwargs["do_sample"]:
            most = kwargs.get("top_k") or self._text.vocab_size
            sampler = Sampler(kwargs["temperature"], most, kwargs.get("top_p", 1.0))
        prompts = [self._text.encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        keys = [row_key("evaluation", i) for i in rows]
        ids = complete(self._scorer.model, prompts, keys, sampler, kwargs["max_gen_toks"], self.eot_token_id)
        return [self._text.decode(of_row) for of_row in ids]
