"""Checkpoints in the format of the authors' code, for tests of their import."""

import argparse
import collections
import io
import re
from typing import Any

import torch

BLOCKS = (2, 2, 1, 1)  # in the stages of a KNResNet-18


def published_name(key: str) -> str:
    """Return a tensor's name in the authors' code, which numbers blocks across stages."""
    key = re.sub(r"^stem\.", "block0.0.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.", r"trans_block\1.", key)
    number = lambda m: f"res_block{sum(BLOCKS[: int(m[1])]) + int(m[2]) + 1}."  # noqa: E731
    key = re.sub(r"^stages\.(\d)\.blocks\.(\d)\.", number, key)
    return re.sub(r"^head\.fc\.", "fc.", re.sub(r"^neck\.", "conv_block_f.", key))


def saved_checkpoint(model: torch.nn.Module, **more: Any) -> bytes:
    """Save a KNResNet-18 as the authors' trainer does."""
    published = {published_name(key): value for key, value in model.state_dict().items()}
    momentum = [{"momentum_buffer": torch.zeros(7)}]
    file = io.BytesIO()
    torch.save(
        {
            "model": collections.OrderedDict(published),
            "optimizer": {"state": momentum, "param_groups": [{"lr": 1e-4, "nesterov": False}]},
            "lr_scheduler": {"step_size": 30, "last_epoch": 100},
            "epoch": 99,
            "args": argparse.Namespace(model="knresnet18", batch_size=32, device="cuda", gpu=0),
            **more,
        },
        file,
    )
    return file.getvalue()
