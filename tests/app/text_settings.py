"""Settings of quick runs of text-to-image models."""

from typing import Any

from command_line import FAST

PROMPTS = {"instance_prompt": "a portrait, xyz style", "class_prompt": "a portrait", "guidance_scale": 2.0}
FAST_TEXT: dict[str, Any] = {**FAST, **PROMPTS, "learning_rate": 0.02, "lr_warmup_steps": 0}
"""Settings of a run that takes a moment and learns something that can be seen."""
