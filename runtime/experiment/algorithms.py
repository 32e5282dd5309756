"""The training methods that an experiment can name."""

from __future__ import annotations

from typing import Any

import align
import distill

ALGORITHMS: dict[str, Any] = {**align.ALGORITHMS, **distill.ALGORITHMS}
"""{`objective.algorithm`: the objective's class, with its pydantic `Config`}"""
