"""Numbers that no run can have are refused by validation, before anything is built: each one line with both numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest

from core.config import configurable
from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import alternatives, field_types, walk
from core.config.validate import problems_of, validate
from core.nn.attention import Attention
from core.nn.mla import MLA
from core.nn.module import LARGEST
from core.testing.toy import Toy, ToyMoE
from core.train.trainer import Trainer


class Latent(Toy):
    @dataclass(kw_only=True, slots=True)
    class Config(Toy.Config):
        latent: MLA.Config


def runs() -> Iterator[Trainer.Config]:
    """Runs that have a part of every kind between them."""
    latent = MLA.Config(n_heads=2, q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    for model in (Toy.Config(), ToyMoE.Config(), Latent.Config(latent=latent)):
        config = Trainer.Config(model=model)
        config.training.seq_len = 16
        yield config


def whole_numbers() -> Iterator[tuple[Trainer.Config, str, Configurable.Config, str]]:
    """Every setting of those runs that takes a whole number."""
    for config in runs():
        for path, node in walk(config):
            for name, annotation in field_types(type(node)).items():
                if {int, float} & set(alternatives(annotation)):
                    yield config, f"{path}.{name}".lstrip("."), node, name


def test_no_setting_takes_more_than_64_bits() -> None:
    paths = set()
    for config, path, node, name in whole_numbers():
        before = getattr(node, name)
        for value, bits in ((2**63, 64), (-(2**64), 65), (10**5000, 16610)):
            setattr(node, name, value)
            said = f"a whole number must be from -2^63 to 2^63 - 1, this one has {bits} bits"
            assert (path, said) in problems_of(config)
        setattr(node, name, before)
        paths.add(path)
    assert len(paths) > 60 and {"training.steps", "model.moe.router.top_k", "optimizer.lr"} <= paths


def test_sizes_of_models_have_bounds_that_published_ones_are_far_from() -> None:
    found = set()
    for config, path, node, name in whole_numbers():
        if name not in LARGEST or not path.startswith("model."):
            continue
        before = getattr(node, name)
        setattr(node, name, LARGEST[name] + 2)
        expected = f"{name} {LARGEST[name] + 2:,} must be at most {LARGEST[name]:,}"
        assert (path, expected) in [(p, message.removesuffix(", or None")) for p, message in problems_of(config)]
        setattr(node, name, LARGEST[name])
        assert not [p for p, _ in problems_of(config) if p == path]
        setattr(node, name, before)
        found.add(name)
    assert found == LARGEST.keys()
    sizes = {"dim": 16384, "hidden_dim": 53248, "n_layers": 126, "n_heads": 128, "n_experts": 512, "vocab_size": 262144}
    assert all(LARGEST[name] >= 4 * size for name, size in sizes.items())


def test_every_size_of_an_attention_is_bounded() -> None:
    """A width that nobody bounds costs a list of frequencies as long."""
    for config in (Attention.Config, MLA.Config):
        numbers = {each.name for each in fields(config) if field_types(config)[each.name] in (int, int | None)}
        assert numbers - LARGEST.keys() <= {"n_kv_heads", "window"}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("training.seq_len", 2**31, "seq_len 2,147,483,648 must be at most 1,073,741,824"),
        ("training.local_batch_size", 10**9, "local_batch_size 1,000,000,000 must be at most 1,048,576"),
        ("training.global_batch_size", 8 * 10**9, "a step of 128,000,000,000 tokens must have at most 1,073,741,824"),
        ("parallelism.tensor_parallel_degree", 10**9, "tensor_parallel_degree 1,000,000,000 must be at most 131,072"),
        ("comm.train_timeout_seconds", 10**12, "train_timeout_seconds 1,000,000,000,000 must be at most 31,536,000"),
        ("comm.trace_buf_size", 10**12, "trace_buf_size 1,000,000,000,000 must be at most 16,777,216"),
    ],
)
def test_what_costs_memory_or_never_ends_has_a_bound(path: str, value: int, said: str) -> None:
    config: Any = next(runs())
    section, name = path.split(".")
    setattr(getattr(config, section), name, value)
    assert (path, said) in problems_of(config)


def test_degrees_together_have_a_bound() -> None:
    config = next(runs())
    config.parallelism.tensor_parallel_degree = config.parallelism.pipeline_parallel_degree = 1024
    with pytest.raises(UserError, match="the degrees make 1,048,576 ranks, at most 131,072 are possible"):
        validate(config)
    with pytest.raises(UserError, match="--world-size 1,000,000 must be at most 131,072"):
        Trainer.plan(next(runs()), world_size=10**6, rank=0)


def test_a_text_is_bounded_and_has_no_zero_byte() -> None:
    for text, length in (("a\0b", 3), ("x" * (2**20 + 1), 2**20 + 1)):
        config = next(runs())
        config.dataloader.dataset = text
        said = f"a text may have 1,048,576 characters, and no zero byte; this one has {length:,}"
        assert problems_of(config) == [("dataloader.dataset", said)]


def test_range_problems_names_the_bound_that_is_missed() -> None:
    config = Attention.Config(n_heads=-1, n_kv_heads=5, head_dim=4, window=7)
    found = configurable.range_problems(config, n_heads=3, n_kv_heads=3, head_dim=4, window=6)
    assert list(found) == [
        ("n_heads", "n_heads -1 must be at least 1"),
        ("n_kv_heads", "n_kv_heads 5 must be at most 3"),
        ("window", "window 7 must be at most 6, or None"),
    ]
