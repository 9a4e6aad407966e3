"""Functions of tensors that TorchScript runs, which spares a CPU Python's share of a forward of few rows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def scripted(function: F) -> F:
    """Let TorchScript run a function of tensors, which saves a third of its time for a few rows.

    Where it cannot (it is not to be had in Python from 3.14 on), the function computes the same.
    """
    try:
        with warnings.catch_warnings():
            # It is deprecated; of what replaces it, nothing works without a C++ compiler on a CPU.
            warnings.simplefilter("ignore")
            compiled: F = torch.jit.script(function)
    except Exception as error:
        log.info("%s runs without TorchScript: %s", function.__name__, error)
        return function
    return compiled
