"""The network of a checkpoint, whatever its task."""

from typing import Any

import timm
from torch import nn

from kn_zoo.checkpoints.manifest import Checkpoint
from kn_zoo.segmentation.models import create_segmentation_model


def create(checkpoint: Checkpoint, pretrained: bool = False) -> nn.Module:
    """Create the network of a checkpoint, with random weights unless ``pretrained``.

    Only a ``pretrained`` network needs the checkpoint to be in the manifest.

    Raises:
        WeightsError: the checkpoint cannot be found, or its file does not match the manifest.
    """
    segments = checkpoint.task == "segmentation"
    create_model: Any = create_segmentation_model if segments else timm.create_model
    if pretrained:
        return create_model(checkpoint.name, pretrained=True)
    return create_model(
        checkpoint.architecture,
        num_classes=checkpoint.dataset.num_classes,
        in_chans=checkpoint.preprocessing.input_size[0],
        **checkpoint.model_args,
    )
