"""DeepSeek-V3 as other programs keep it."""

from core.weights.peer_forms import titan_form
from deepseek_v3.hf import KEYS

WQ = "layers.{i}.attention.wq.weight"
FORMS = {"dcp": titan_form(KEYS, {WQ: (WQ,)})}
"""torchtitan's joins no projections of this attention."""
