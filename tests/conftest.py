"""Shared settings: one thread, fixed seeds, markers that explain why a test is skipped."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests interrupt their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest listens to every logger, and that makes torch.export write its long structured log.
logging.getLogger("torch.__trace").propagate = False

MARKERS = {
    "ray": "needs the optional package ray",
    "slow": "takes more than a few seconds; run with -m slow",
    "gpu": "needs a CUDA device",
    "transformers": "needs the optional package transformers",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "no CUDA device"
    if importlib.util.find_spec("transformers") is None:
        absent["transformers"] = "transformers is not installed; pip install 'dagh[hf]'"
    if importlib.util.find_spec("ray") is None:
        absent["ray"] = "ray is not installed; pip install 'dagh[ray]'"
    for item in items:
        for name, reason in absent.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision as the default dtype inside a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(0)
