"""The nine tasks, and the accuracy and FLOPs of a policy on them."""

from .suite import TASKS, load_tasks
from .task import FORMS, Sample, Task

__all__ = ["FORMS", "TASKS", "Sample", "Task", "load_tasks"]
