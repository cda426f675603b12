"""The few corners of PyTorch that we use and that it does not document, in one place (tried with torch 2.13).

Each is used by PyTorch's own Python code too: activation checkpointing numbers backward passes by `graph_task_id`, AOTAutograd
asks for the hooks around it, and FSDP2 has its last work of a backward called by `at_end_of_backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def graph_task_id() -> int:
    """The number of the backward pass that runs on this thread, -1 outside of one."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls back when the backward that runs on this thread has computed all its gradients; in the order of these calls."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


def is_tracing() -> bool:
    """Whether torch.compile or a transform of torch.func looks at what runs now: then it must be plain operations."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def saved_tensor_hooks() -> Hooks | None:
    """The innermost (pack, unpack) that are active on this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore


def assert_soon(condition: torch.Tensor, message: str) -> None:
    """Asserts a condition that is on a device, without waiting for it."""
    torch._assert_async(condition, message)  # pyright: ignore
