"""The garbage collector is left as it was found."""

from __future__ import annotations

import gc

import pytest
import torch

from spectra.checkpoints import CheckpointError, open_checkpoint
from spectra.checkpoints.collector import paused_collector


def test_it_is_off_inside_and_on_again_after_the_outermost_block() -> None:
    with paused_collector():
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_for_whom_it_was_off() -> None:
    gc.disable()
    try:
        open_checkpoint({"w": torch.ones(2, 2)})
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_is_on_again_after_a_refusal() -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint({})
    assert gc.isenabled()
