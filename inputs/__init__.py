"""What users name or bring: words with a nearest spelling, hub models, image files. A leaf for every room; no torch.

spelling.py   the known word nearest to an unknown one, as error messages end with it
hub.py        hub ids, and every way the hub can fail in one line
images.py     image files of any kind as 8-bit RGB
"""

from inputs.hub import hub_errors, hub_revision, is_hub_id, is_on_hub
from inputs.spelling import nearest, one_of

__all__ = ["hub_errors", "hub_revision", "is_hub_id", "is_on_hub", "nearest", "one_of"]
