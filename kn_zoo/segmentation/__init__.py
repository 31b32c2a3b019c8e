"""Semantic segmentation: networks, data sets, training and evaluation."""

from .fcn import FCN
from .models import create_segmentation_model, list_segmentation_models, load_bundle

__all__ = ["FCN", "create_segmentation_model", "list_segmentation_models", "load_bundle"]
