"""Speed of generation on a CPU, beside transformers' `generate` with the same weights.

    pip install models/qwen3 transformers
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/generate_cpu.py

A Qwen3 of dim 512, 8 layers and 32,000 words continues prompts of 512 tokens, one or eight at a time, by the likeliest
token or by one that is drawn. Its weights lie by columns, as the command lays them. Both take turns in one process; the
likeliest tokens must be the same before anything is timed. Ratios are to transformers, per round of turns: median
(lowest to highest); more is faster. The third contender multiplies with the weights as often as the texts need and does
nothing else: no exact generation on this processor, which reads each weight for each token, is faster.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import ratios
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from core.generate.columns import lay_by_columns
from core.generate.generate import generate
from core.generate.sample import Sampler
from core.nn.decoder import Decoder
from core.nn.layers import Head, Linear
from core.testing.toy import on_cpu
from core.weights.hf import save_hf
from qwen3.configs import qwen3_debug

Writes = Callable[[bool], list[list[int]]]
"""Continues the prompts, by drawn tokens or by the likeliest, and returns what follows each."""


def network(vocab_size: int) -> Decoder:
    config = qwen3_debug().model
    config.vocab_size, config.dim, config.n_layers, config.max_seq_len = vocab_size, 512, 8, 1024
    config.attention.n_heads, config.attention.n_kv_heads, config.attention.head_dim = 8, 4, 64
    config.feed_forward.hidden_dim = 1536
    return on_cpu(config).eval()


def contenders(model: Decoder, prompts: torch.Tensor, n_tokens: int, folder: Path) -> dict[str, Writes]:
    save_hf(model, folder)
    lay_by_columns(model)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    reference.generation_config.eos_token_id = None
    n_prompt, vocab_size = prompts.shape[1], model.config.vocab_size

    def ours(drawn: bool) -> list[list[int]]:
        sampler = Sampler(len(prompts), temperature=float(drawn))
        limits = [n_tokens] * len(prompts)
        return [c.ids for c in generate(model, prompts.tolist(), sampler, limits=limits, n_tokens=vocab_size)]

    def theirs(drawn: bool) -> list[list[int]]:
        texts = reference.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            pad_token_id=0,
            **({"do_sample": True, "top_k": 0} if drawn else {"do_sample": False}),
        )
        return texts[:, n_prompt:].tolist()

    layers = [module for module in model.modules() if isinstance(module, Linear)]

    @torch.inference_mode()
    def products(drawn: bool) -> list[list[int]]:
        for n_rows in (prompts.numel(), *[len(prompts)] * (n_tokens - 1)):
            sides = {n_in: torch.ones(n_rows, n_in) for n_in in {layer.weight.shape[1] for layer in layers}}
            for layer in layers:
                side = sides[layer.weight.shape[1]]
                layer(side[: len(prompts)] if isinstance(layer, Head) else side)
        return []

    return {"armature": ours, "transformers": theirs, "products": products}


def in_turns(writers: dict[str, Writes], drawn: bool, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each turn; CPU time counts all threads."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(rounds):
        for name, write in writers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            write(drawn)
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="words that the model knows")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    args = parser.parse_args()
    model = network(args.vocabulary)
    print(f"{'':16}{'armature':>10}{'theirs':>10} tokens/s   {'ratio by wall time':24}{'ratio by CPU time':24}")
    for n_rows in (1, 8):
        prompts = torch.randint(args.vocabulary, (n_rows, args.prompt), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            writers = contenders(model, prompts, args.tokens, Path(folder))
            found, expected, _ = (write(False) for write in writers.values())
            assert found == expected, "not the same network"
            for drawn in (False, True):
                times = in_turns(writers, drawn, args.rounds)
                tokens = n_rows * args.tokens
                speeds = [tokens / statistics.median(wall for wall, _ in times[name]) for name in writers]
                shown = ratios(times, to="transformers", faster=True)
                name = f"{n_rows} x {'drawn' if drawn else 'likeliest'}"
                print(f"{name:16}{speeds[0]:>10,.1f}{speeds[1]:>10,.1f}            {shown['armature']}")
                print(f"{'products alone':48}{shown['products']}", flush=True)


if __name__ == "__main__":
    main()
