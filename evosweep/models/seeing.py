"""What images as calibration data ask of a model: a processor, and transforms that do not measure text alone."""

from typing import Any

from evosweep.core.errors import ModelError
from evosweep.data.images import ImageProcessor
from evosweep.models.load import LoadedModel
from evosweep.models.towers import SEEING, loader_name
from evosweep.models.transforms.base import Transform


def image_processor(loaded: LoadedModel) -> ImageProcessor:
    """Return what prepares images with their text for a model.

    A config names the token in whose place images are put: a processor's own may be one that it takes for it in text.

    Raises:
        ModelError: The model reads text alone, or its checkpoint has no such processor.
    """
    if loader_name(loaded.model) != SEEING:
        raise ModelError(
            f"data=images needs a model of images and text (model.kind=vision_language): {loaded.name} is a "
            f"{loaded.model.config.model_type}, which reads text alone"  # type: ignore[union-attr]
        )
    processor = loaded.processor
    config: Any = loaded.model.config
    placeholder = getattr(config, "image_token_id", None)
    if getattr(processor, "image_processor", None) is None or placeholder is None:
        raise ModelError(
            f"data=images needs the model's processor, and the checkpoint {loaded.name} has none that loads "
            "(processor_config.json, preprocessor_config.json): put those of the original model beside its weights"
        )
    return ImageProcessor(processor, int(placeholder))


def check_transform(transform: Transform) -> None:
    """Raise ModelError where a transform measures the model on tokens, as it would without their images."""
    if type(transform).calibrate is not Transform.calibrate:
        raise ModelError("transform: data=images needs one that measures nothing: transform=none")
