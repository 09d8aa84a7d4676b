"""The libraries' own bars and remarks, kept off the terminal where they say nothing a user can act on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

_TALKATIVE = (
    "diffusers.pipelines.pipeline_utils",  # a type mismatch for an AutoencoderKL as LDMPipeline's `vqvae`: it is taken
    "diffusers.models.modeling_utils",  # a list, often empty, of layers to be kept in float32
    "diffusers.loaders.lora_base",  # a LoRA that leaves the text encoder alone
    "transformers.utils.import_utils",  # picture processors, which nothing here uses, that lack torchvision
)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside, and no remarks of those loggers."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for logger in levels:
        logger.setLevel(logging.ERROR)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for library in libraries:
            library.enable_progress_bar()
