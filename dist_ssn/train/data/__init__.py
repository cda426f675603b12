"""Tasks to train on: batches, loss and metrics.

A task's training batch is a pure function of (seed, step, micro-batch, rank, number of ranks). So a resumed run needs
only the step, and all ranks together see exactly the samples that one process would see, in the same order.
"""

from __future__ import annotations

from dist_ssn.train.data.sources import DATA, DEFAULT_CONTEXT, data_hints, load_task
from dist_ssn.train.data.tasks import ClassificationTask, Hints, LanguageTask, Task, logits_of

__all__ = [
    "DATA",
    "DEFAULT_CONTEXT",
    "ClassificationTask",
    "Hints",
    "LanguageTask",
    "Task",
    "data_hints",
    "load_task",
    "logits_of",
]
