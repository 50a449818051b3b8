"""What the key table of every model must pass; part of `core.testing.model_suite`."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch

from core.config.errors import UserError
from core.config.validate import validate
from core.nn.decoder import Decoder
from core.runtime.meta import meta_model
from core.testing.mutations import mutated_json
from core.testing.toy import on_cpu, randomise
from core.weights.convert import main
from core.weights.folder import hf_config, load_folder
from core.weights.hf import load_hf
from core.weights.key_map import form_key_map, hf_key_map, pattern_of


class KeySuite:
    """The tests of a key table."""

    decoder: ClassVar[Any]
    """The model."""
    sizes: ClassVar[dict[str, Decoder.Config]]
    """Every size by name."""
    hf_model: ClassVar[Any]
    """The class of transformers that computes the same."""
    hf_configs: ClassVar[dict[str, Any]]
    """Configurations of transformers by name: tiny models that differ in whatever the family may differ in."""

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_key_table_is_a_bijection(self, size: str, tied: bool) -> None:
        """Of every stored tensor all rows, and of each row both halves, are in exactly one of our weights."""
        layout = hf_key_map(meta_model(replace(self.sizes[size], tie_embeddings=tied)))
        stored: dict[str, Counter[tuple]] = {}
        shapes: dict[str, list[int]] = {}
        for name, weight in layout.weights.items():
            for piece in layout.places[name][0]:
                stored.setdefault(piece.key, Counter())[piece.stored_row, piece.half] += 1
                shape = piece.stored_shape(weight.shape)
                assert shapes.setdefault(piece.key, shape) == shape, f"{piece.key}: {shapes[piece.key]} or {shape}"
        for key, parts in stored.items():
            halves = {half for _, half in parts}
            assert halves in ({None}, {"first", "second"}, {"even", "odd"}), f"{key}: {halves}"
            n_rows = 1 if (None, None) in parts else shapes[key][0]
            assert set(parts.values()) == {1} and len(parts) == n_rows * len(halves), f"{key}: {parts}"

    def test_every_entry_of_the_key_table_is_used(self) -> None:
        table = self.decoder.hf_form().keys
        configs = [*self.sizes.values(), *map(self.tiny_config, self.hf_configs)]
        if any(name.startswith("ahead.") for name in table):
            configs.append(replace(configs[0], n_mtp_layers=1))
        used = {pattern_of(name)[0] for config in configs for name in meta_model(config).state_dict()}
        needed = {name for name, place in table.items() if place is not None}
        assert needed <= used <= table.keys(), f"entries for no weight: {needed - used}"

    def test_other_programs_have_a_place_for_every_weight(self) -> None:
        for name, form in self.decoder.peer_forms().items():
            for config in self.sizes.values():
                found = form_key_map(meta_model(config), form)
                assert found.places.keys() == found.weights.keys(), name

    def test_converts_there_and_back(self, tiny: str, tmp_path: Path) -> None:
        """The command reads what transformers wrote as `load_hf` does, and writes the same bytes again."""
        there, here, back = tmp_path / "there", tmp_path / "here", tmp_path / "back"
        theirs = self.hf_model(deepcopy(self.hf_configs[tiny]))
        randomise(theirs, seed=7)
        theirs.save_pretrained(there)
        stated = json.loads((there / "config.json").read_text())
        families = {stated["model_type"]: self.decoder}
        main(families, ["from-hf", str(there), str(here)])
        config = self.decoder.from_hf_config(stated)
        expected, found = on_cpu(config), on_cpu(config)
        load_hf(expected, there)
        load_folder(found, here)
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        main(families, ["to-hf", str(here), str(back)])
        assert (back / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()

    def tiny_config(self, tiny: str) -> Decoder.Config:
        """Our configuration of one of `hf_configs`."""
        return self.decoder.from_hf_config(self.hf_configs[tiny].to_dict())

    def test_a_config_json_that_went_wrong_is_read_or_refused(self, tiny: str, tmp_path: Path) -> None:
        """Whatever is in it, and whoever wrote it."""
        self.read_mutated_configs(tiny, tmp_path, n=10)

    @pytest.mark.faults
    def test_many_config_jsons_that_went_wrong_are_read_or_refused(self, tiny: str, tmp_path: Path) -> None:
        self.read_mutated_configs(tiny, tmp_path, n=100)

    def read_mutated_configs(self, tiny: str, folder: Path, n: int) -> None:
        """Read that many changes of what a tiny model states."""
        file, draw = folder / "config.json", Random(tiny)
        stated = json.dumps(meta_model(self.decoder.from_hf_config(self.hf_configs[tiny].to_dict())).to_hf_config())
        for number in range(n):
            file.write_bytes(mutated_json(stated.encode(), draw))
            try:
                validate(hf_config(self.decoder, folder))
            except UserError:
                pass
            except Exception as error:
                error.add_note(f"change {number}: {file.read_bytes()!r}")
                raise
