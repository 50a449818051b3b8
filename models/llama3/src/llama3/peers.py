"""Llama 3 as other programs keep it."""

from core.weights.peer_forms import litgpt_form, megatron_form, nanotron_form, titan_form
from llama3.hf import HALVES, KEYS

FORMS = {
    "dcp": titan_form(KEYS),
    "litgpt": litgpt_form(HALVES),
    "megatron": megatron_form(HALVES),
    "nanotron": nanotron_form(),
}
