"""What users name: words with a nearest spelling, and models on the hub. A leaf that every room may import; no torch.

spelling.py   the known word nearest to an unknown one, as error messages end with it
hub.py        hub ids, and every way the hub can fail in one line
"""

from inputs.hub import hub_errors, hub_revision, is_hub_id, is_on_hub
from inputs.spelling import nearest, one_of

__all__ = ["hub_errors", "hub_revision", "is_hub_id", "is_on_hub", "nearest", "one_of"]
