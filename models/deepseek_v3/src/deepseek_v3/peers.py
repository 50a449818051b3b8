"""DeepSeek-V3 as other programs keep it."""

from core.weights.peer_forms import titan_form
from deepseek_v3.hf import KEYS

FORMS = {"dcp": titan_form(KEYS)}
