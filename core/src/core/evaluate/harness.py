"""The tasks of EleutherAI's lm_eval on a model of ours, in this process."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from core.config.errors import UserError, did_you_mean
from core.data.tokenizer import Tokenizer
from core.evaluate.scores import ScoredRow, batches_by_length, score_rows
from core.generate.cache import CachedDecoder, CachedReader
from core.generate.generate import generate
from core.generate.sample import Sampler
from core.nn.decoder import Decoder
from core.runtime.device import accelerator, random_state, set_random_state


class HarnessModel(TemplateLM):
    """A model as lm_eval asks it: for the likelihood of texts, and to write.

    Its answers are those of lm_eval's own backend for a Hugging Face model with the same weights.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        end_ids: frozenset[int],
        batch_tokens: int,
        seed: int = 0,
        reader: CachedReader = CachedDecoder,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.model, self.text, self.end_ids, self.batch_tokens = model, tokenizer, end_ids, batch_tokens
        self.max_length, self.seed = model.config.max_seq_len, seed

    @property
    def eot_token_id(self) -> int:
        token = self.text.bos_id if self.text.eos_id is None else self.text.eos_id
        if token is None:
            raise UserError("the tokenizer has no bos and no eos, which lm_eval puts in front of a text")
        return token

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with bos in front where the tokenizer puts one there."""
        ids = self.text.encode_prompt(string)
        return ids[1:] if add_special_tokens is False and ids[:1] == [self.text.bos_id] else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [
            ScoredRow((context + continuation)[-self.max_length - 1 :], min(len(continuation), self.max_length))
            for _, context, continuation in requests
        ]
        scores = score_rows(self.model, rows, batch_tokens=self.batch_tokens)
        return [(sum(score.log_probs), score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [number] * len(found)
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a text that ends it."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            asked: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], 256))
            n_new = min(asked["max_gen_toks"], self.max_length - 1)
            contexts = [self.tok_encode(requests[number].args[0])[n_new - self.max_length :] for number in numbers]
            for batch in batches_by_length([len(ids) + n_new for ids in contexts], self.batch_tokens):
                written = self._write([contexts[place] for place in batch], n_new, asked)
                texts = _placed(texts, {numbers[place]: text for place, text in zip(batch, written, strict=True)})
        return texts

    def _write(self, prompts: list[list[int]], n_new: int, asked: dict[str, Any]) -> list[str]:
        until, decode = [text for text in asked.get("until", []) if text], self.text.decode
        sampler = Sampler(
            len(prompts),
            temperature=asked.get("temperature", 0.0) if asked.get("do_sample") else 0.0,
            top_k=asked.get("top_k"),
            top_p=asked.get("top_p", 1.0),
            seed=self.seed,
        )
        completions = generate(
            self.model,
            prompts,
            sampler,
            limits=[n_new] * len(prompts),
            n_tokens=self.text.vocab_size,
            end_ids=self.end_ids,
            enough=lambda ids: any(text in decode(ids) for text in until),
            reader=self.reader,
        )
        return [postprocess_generated_text(decode(each.ids), until, None) for each in completions]


def _placed(texts: list[str], found: dict[int, str]) -> list[str]:
    return [found.get(number, text) for number, text in enumerate(texts)]


def run_tasks(
    model: HarnessModel, tasks: Sequence[str], *, include_path: str | None, limit: int | None, num_fewshot: int | None
) -> dict[str, dict[str, float]]:
    """The results of tasks, by task and metric. `include_path` is a folder of tasks of one's own.

    Raises `UserError` for a task that lm_eval does not know.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"there is no folder {include_path}: --include-path names one with the YAML files of tasks")
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        hint = did_you_mean(unknown[0], manager.all_tasks) or "`lm_eval ls tasks` lists them"
        raise UserError(f"lm_eval knows no task {', '.join(unknown)}; {hint}")
    with own_random_numbers():
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=0,
        )
    assert found is not None, "this is the only rank"
    return {task: dict(metrics_of(values)) for task, values in found["results"].items()}


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Whatever the block does to the generators of this process, they go on from where they were."""
    device = torch.device(str(kind)) if (kind := accelerator().type) else torch.device("cpu")
    ours, numbers, states = random.getstate(), np.random.get_state(), random_state(device)
    host = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numbers)
        set_random_state(states, device)
        torch.set_rng_state(host)


def metrics_of(values: dict[str, Any]) -> list[tuple[str, float]]:
    """The metrics among what lm_eval says of a task: `acc`, and `acc,strict` of a filter that is not the plain one."""
    return [
        (name.removesuffix(",none"), float(value))
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    ]
