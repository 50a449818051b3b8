"""Time of one token more on a CPU, of every debug recipe, beside transformers' model with the same weights.

    pip install models/llama3 models/qwen3 models/deepseek_v3 models/gpt_oss transformers
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/tokens_cpu.py

Both keep what they computed of a prompt and take turns token by token in one process; the logits of every token must
agree. Weights lie by columns, as the command `generate` lays them. Times are medians of CPU time, ratios those of
turns: median (the middle 80 %); more is faster.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from families_cpu import RECIPES
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from core.generate.cache import CachedDecoder
from core.generate.columns import lay_by_columns
from core.nn.decoder import Decoder
from core.testing.toy import on_cpu
from core.weights.hf import save_hf


def in_turns(model: Decoder, reference: PreTrainedModel, prompts_BL: Tensor, n_tokens: int) -> list[list[float]]:
    """CPU milliseconds of each token, ours and theirs."""
    kept = DynamicCache(config=reference.config)
    times: list[list[float]] = [[], []]
    n_rows, n_prompt = prompts_BL.shape
    with torch.inference_mode(), CachedDecoder(model, n_pads=[0] * n_rows, capacity=n_prompt + n_tokens) as cached:

        def theirs(tokens_BL: Tensor) -> Tensor:
            return reference(tokens_BL, past_key_values=kept, use_cache=True, logits_to_keep=1).logits[:, -1]

        contenders: list[Callable[[Tensor], Tensor]] = [cached, theirs]
        tokens_BL = prompts_BL
        for _ in range(n_tokens + 1):
            logits = []
            for contender, spent in zip(contenders, times, strict=True):
                start = time.process_time()
                logits.append(contender(tokens_BL))
                spent.append(1000 * (time.process_time() - start))
            torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
            tokens_BL = logits[0].argmax(-1)[:, None]
    return [spent[1:] for spent in times]


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="recipe", help=", ".join(RECIPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="texts that are continued at a time")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=60, help="tokens that are timed")
    args = parser.parse_args()
    print(f"{'':20}{'texts':>6}{'ours, ms':>10}{'theirs':>8}  theirs / ours")
    for name in args.recipes:
        model = on_cpu(RECIPES[name]().model).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_hf(model, Path(folder))
            reference = AutoModelForCausalLM.from_pretrained(folder).eval()
        lay_by_columns(model)
        for n_rows in args.rows:
            shape, generator = (n_rows, args.prompt), torch.Generator().manual_seed(0)
            prompts_BL = torch.randint(model.config.vocab_size, shape, generator=generator)
            ours, theirs = in_turns(model, reference, prompts_BL, args.tokens)
            ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
            tenth, medians = len(ratios) // 10, (statistics.median(ours), statistics.median(theirs))
            print(f"{name:20}{n_rows:>6}{medians[0]:>10.2f}{medians[1]:>8.2f}", end="  ")
            print(f"{statistics.median(ratios):.2f} ({ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f})", flush=True)


if __name__ == "__main__":
    main()
