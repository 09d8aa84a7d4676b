"""The only room that knows diffusers and peft: loading, adapting, sampling and saving models."""
