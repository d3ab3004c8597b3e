"""The paper's findings on any model: attention stages, entropy, exits by hand and by heads, single prompts.

```python
from dyvte_engine.analysis import attention_stages, load_data

task = load_data("gqa", limit=50)[0]
stages = attention_stages(engine, task.samples)
stages.boundaries, stages.plot(), pandas.DataFrame(stages.rows())
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import find

if TYPE_CHECKING:
    from .attention import FIELDS, KEYS, WEIGHTS, measure
    from .boundaries import Boundaries, detect
    from .data import load_data, task_of
    from .entropy import AttentionEntropy, attention_entropy
    from .exits import ExitHistogram, ManualExit, TaskExits, exit_histogram, manual_exit
    from .report import Analysis, analyse, write
    from .stages import AttentionStages, attention_stages
    from .timeline import Timeline, Timelines, timelines

__all__ = [
    "FIELDS",
    "KEYS",
    "WEIGHTS",
    "Analysis",
    "AttentionEntropy",
    "AttentionStages",
    "Boundaries",
    "ExitHistogram",
    "ManualExit",
    "TaskExits",
    "Timeline",
    "Timelines",
    "analyse",
    "attention_entropy",
    "attention_stages",
    "detect",
    "exit_histogram",
    "load_data",
    "manual_exit",
    "measure",
    "task_of",
    "timelines",
    "write",
]
_HOMES = {
    "Analysis": "report",
    "AttentionEntropy": "entropy",
    "AttentionStages": "stages",
    "Boundaries": "boundaries",
    "ExitHistogram": "exits",
    "FIELDS": "attention",
    "KEYS": "attention",
    "ManualExit": "exits",
    "TaskExits": "exits",
    "Timeline": "timeline",
    "Timelines": "timeline",
    "WEIGHTS": "attention",
    "analyse": "report",
    "attention_entropy": "entropy",
    "attention_stages": "stages",
    "detect": "boundaries",
    "exit_histogram": "exits",
    "load_data": "data",
    "manual_exit": "exits",
    "measure": "attention",
    "task_of": "data",
    "timelines": "timeline",
    "write": "report",
}


def __getattr__(name: str) -> Any:
    """Names are looked up at first use, so that the command line starts without torch."""
    return find(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
