"""DomainStudio: adapt a pretrained diffusion model to a new image domain from about ten pictures."""

__version__ = "0.1.0"
