"""A set of pictures and what the metric networks see in it, each seen once.

Images are (N, 3, H, W) in [-1, 1].
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from domainstudio.errors import MissingWeights
from domainstudio.evaluation import features
from domainstudio.evaluation.cache import TensorCache, digest
from domainstudio.evaluation.features import Backbone, Progress
from domainstudio.evaluation.foundation import embed_texts, load_clip_images, load_dino_images
from domainstudio.evaluation.metrics import nearest, pairwise_lpips
from domainstudio.evaluation.way import Ends, Way

UNASKED = "was not asked for"


class Networks:
    """What the metric networks see; loaded when first needed, on the device of the training pictures.

    `source` are pictures that all others are compared with, besides the training pictures; by default none.
    """

    def __init__(
        self,
        training: Tensor,
        backbone: Backbone,
        px: int,
        progress: Progress | None,
        clip: str | None = None,
        dino: str | None = None,
        cache: TensorCache | None = None,
        source: Tensor | None = None,
    ):
        self.training, self.px, self.progress, self.cache = training, px, progress, cache
        self.source = training[:0] if source is None else source
        self.backbone: Backbone = backbone
        self.clip_name, self.dino_name = clip, dino
        # Small batches: on a CPU, memory that the allocator keeps is a fifth faster than fresh memory for every map.
        self.large_batch_size = 8 if training.is_cpu else 32
        self.batch_size = max(1, self.large_batch_size * 64**2 // self.px**2)

    @property
    def lpips_name(self) -> str:
        """Network and size."""
        return f"LPIPS {self.backbone} at {self.px} px"

    @cached_property
    def lpips(self) -> nn.Module:
        """Raises MissingWeights."""
        return features.load_lpips(self.backbone).to(self.training.device)

    @cached_property
    def inception(self) -> nn.Module:
        """Raises MissingWeights."""
        return features.load_inception().to(self.training.device)

    @cached_property
    def clip(self) -> nn.Module:
        """Raises MissingWeights."""
        return load_clip_images(_asked(self.clip_name, "CLIP", "--clip")).to(self.training.device)

    @cached_property
    def dino(self) -> nn.Module:
        """Raises MissingWeights."""
        return load_dino_images(_asked(self.dino_name, "DINOv2", "--dino")).to(self.training.device)

    def clip_texts(self, texts: Sequence[str]) -> Tensor:
        """CLIP's features of texts, (N, D) on the CPU. Raises MissingWeights."""
        return embed_texts(texts, _asked(self.clip_name, "CLIP", "--clip"))

    @cached_property
    def training_embeddings(self) -> tuple[Tensor, Tensor]:
        """Of the training pictures and of their mirror images."""
        return self.embeddings(self.training), self.embeddings(self.training.flip(-1))

    @property
    def has_way(self) -> bool:
        """Whether there are pictures enough of the source and of the training pictures."""
        return min(len(self.training), len(self.source)) >= 2

    @cached_property
    def way(self) -> Way:
        """From the source's pictures to the training pictures; at least 2 of each."""
        return Way(self.training_embeddings[0], self.embeddings(self.source))

    @cached_property
    def ends(self) -> Ends:
        """Of that way."""
        of = digest(self.training), digest(self.source)
        ends = self.kept(f"{self.lpips_name} way", of, lambda: torch.tensor(self.way.ends, dtype=torch.float64))
        return Ends(*ends.tolist())

    def embeddings(self, images: Tensor) -> Tensor:
        """LPIPS embeddings, (N, D)."""
        return features.embed(self.lpips, images, self.batch_size, self.px)

    def kept(self, what: str, of: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, out of the cache if there is one and it is there."""
        return compute() if self.cache is None else self.cache.get(what, of, compute)

    def told(self, stage: str) -> Callable[[int, int], None] | None:
        """The listener to the progress of one stage."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


def _asked(name: str | None, title: str, flag: str) -> str:
    if name is None:
        raise MissingWeights(f"{title} {UNASKED}: give {flag}, with a folder or name if you wish")
    return name


class Pictures:
    """A set of pictures and, when asked, what the networks see in it. `index` repeats pictures at no cost."""

    def __init__(self, networks: Networks, images: Tensor, title: str, index: Tensor | None = None):
        self.networks, self.images, self.title = networks, images, title
        self.index = torch.arange(len(images)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Tensor:
        """LPIPS embeddings of a few."""
        unique, inverse = self.index[index].unique(return_inverse=True)
        return self.networks.embeddings(self.images[unique.to(self.images.device)])[inverse]

    @cached_property
    def content(self) -> tuple[str, ...]:
        """Digests of the pictures and of those that are measured against."""
        return digest(self.images), digest(self.networks.training)

    @property
    def distances(self) -> tuple[Tensor, Tensor]:
        """LPIPS to the training pictures, and to the nearer of each and its mirror image; (N, M)."""
        plain, mirrored = self._places[:, : 2 * len(self.networks.training)].chunk(2, 1)
        return plain, torch.minimum(plain, mirrored)

    @property
    def left(self) -> Tensor:
        """What is left of the way to the training pictures, (N,), where the source's pictures are known."""
        return self._places[:, -1]

    @cached_property
    def _places(self) -> Tensor:
        networks = self.networks
        of = (*self.content, digest(networks.source))
        return networks.kept(f"{networks.lpips_name} to training, way left", of, self._locate)[self.index]

    def _locate(self) -> Tensor:
        networks = self.networks
        training = torch.cat(networks.training_embeddings)
        parts, told = [], networks.told(f"LPIPS of the {self.title}")
        for start in range(0, len(self.images), networks.batch_size):
            batch = networks.embeddings(self.images[start : start + networks.batch_size])
            left = [networks.way.left(batch)[:, None]] if networks.has_way else []
            parts.append(torch.cat([pairwise_lpips(batch, training), *left], 1).cpu())
            if told:
                told(start + len(batch), len(self.images))
        return torch.cat(parts)

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Distance to, and index of, the nearest training picture or mirror image: what copying is judged by."""
        return nearest(self.distances[1])

    @cached_property
    def inception(self) -> Tensor:
        """(N, 2048)."""
        return self._seen_by("Inception", lambda: self.networks.inception)

    @cached_property
    def clip(self) -> Tensor:
        """(N, D) of length 1."""
        return self._seen_by("CLIP", lambda: self.networks.clip, self.networks.clip_name)

    @cached_property
    def dino(self) -> Tensor:
        """(N, D)."""
        return self._seen_by("DINOv2", lambda: self.networks.dino, self.networks.dino_name)

    def _seen_by(self, title: str, network: Callable[[], nn.Module], name: str | None = "") -> Tensor:
        told = self.networks.told(f"{title} of the {self.title}")
        batch_size = self.networks.large_batch_size

        def see() -> Tensor:
            return features.embed(network(), self.images, batch_size, progress=told).cpu()

        return self.networks.kept(f"{title} {_version(name)}", self.content[:1], see)[self.index]


def _version(name: str | None) -> str:
    """The name of a network; of a folder also what would change with its content."""
    files = sorted(Path(name).iterdir()) if name and Path(name).is_dir() else []
    return f"{name} {[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]}"
