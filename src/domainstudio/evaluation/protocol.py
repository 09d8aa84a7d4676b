"""How to measure."""

from dataclasses import dataclass
from typing import Literal

from domainstudio.errors import UserError
from domainstudio.evaluation.features import Backbone


@dataclass(frozen=True)
class Protocol:
    """How to measure; numbers of different protocols must not be compared.

    `lpips_px=None` means the training pictures' own size, at least 32 and at most 256. `clip` and `dino` are a
    folder or hub name on this machine (`foundation.CLIP`, `foundation.DINO`); None leaves their numbers out.
    """

    lpips: Backbone = "vgg"
    lpips_px: int | None = None
    intra: Literal["cdc", "crdi"] = "cdc"
    clip: str | None = None
    dino: str | None = None
    max_per_cluster: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.lpips_px is not None and self.lpips_px < 32:
            raise UserError(f"lpips_px={self.lpips_px} but the LPIPS networks need at least 32; 64 to 256 is usual")
        if self.max_per_cluster < 2:
            raise UserError(f"max_per_cluster={self.max_per_cluster} but diversity needs pairs; use 50")

    @property
    def lpips_name(self) -> str:
        """Such as "LPIPS-VGG at 64 px"."""
        size = f"{self.lpips_px} px" if self.lpips_px else "the pictures' own size"
        return f"LPIPS-{self.lpips.upper()} at {size}"

    def describe(self, num_images: int) -> str:
        """The Intra-LPIPS protocol in words: "CDC: LPIPS-VGG at 64 px, 500 images, at most 50 a cluster"."""
        limit = "at most" if self.intra == "cdc" else "the first"
        return f"{self.intra.upper()}: {self.lpips_name}, {num_images} images, {limit} {self.max_per_cluster} a cluster"


USUAL = Protocol()
