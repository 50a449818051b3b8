"""Qwen3 as other programs keep it."""

from core.weights.peer_forms import litgpt_form, megatron_form, titan_form
from qwen3.hf import KEYS, MOE_KEYS

FORMS = {"dcp": titan_form(KEYS), "litgpt": litgpt_form(), "megatron": megatron_form()}
MOE_FORMS = {"dcp": titan_form(MOE_KEYS), "litgpt": litgpt_form(), "megatron": megatron_form()}
