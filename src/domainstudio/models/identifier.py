"""A new word for what the training pictures share: `<word>` in a prompt, one token with an embedding of its own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from domainstudio.errors import UserError

EMBEDDING_FILE = "learned_embeds.safetensors"
_NEW_WORD = re.compile(r"<[^<>\s{}|]+>")


def find_identifier(prompts: Sequence[str]) -> str | None:
    """The new word, brackets included, that prompts use; None where they use none.

    Raises:
        ValueError: if they use several.
    """
    found = dict.fromkeys(word for prompt in prompts for word in _NEW_WORD.findall(prompt))
    if len(found) > 1:
        raise ValueError(f"{', '.join(found)} are several new words; one can be learned, write the others plainly")
    return next(iter(found), None)


def add_identifier(tokenizer: Any, text_encoder: nn.Module, word: str) -> None:
    """Makes `<word>` one token, which first means what `word` means: the mean of its tokens' embeddings.

    Raises:
        UserError: if the tokenizer has that token already.
    """
    start = tokenizer(word.strip("<>"), add_special_tokens=False).input_ids
    encoder: Any = text_encoder
    _add_token(tokenizer, encoder, word, encoder.get_input_embeddings().weight[start].mean(0))


def load_identifier(tokenizer: Any, text_encoder: nn.Module, folder: Path) -> None:
    """Adds the word that `save_embedding` wrote into a folder, if there is one."""
    found = read_embedding(folder)
    if found is not None:
        _add_token(tokenizer, text_encoder, *found)


def _add_token(tokenizer: Any, text_encoder: Any, word: str, vector: Tensor) -> None:
    if tokenizer.add_tokens([word]) != 1:
        raise UserError(f"the model knows {word} already; give what it is to learn another word in angle brackets")
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = vector


class IdentifierEmbedding(nn.Module):
    """Token embeddings of which one is trained: textual inversion (Gal et al. 2022, arXiv 2208.01618)."""

    def __init__(self, frozen: nn.Embedding, word: str, token: int):
        super().__init__()
        self.frozen, self.word, self.token = frozen, word, token
        self.vector = nn.Parameter(frozen.weight[token].detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens -> (B, L, D)."""
        embedded = self.frozen(tokens)
        return torch.where((tokens == self.token).unsqueeze(-1), self.vector.to(embedded.dtype), embedded)

    def plain(self) -> nn.Embedding:
        """An ordinary table with the vector in it."""
        with torch.no_grad():
            self.frozen.weight[self.token] = self.vector.to(self.frozen.weight.dtype)
        return self.frozen


def train_identifier(tokenizer: Any, text_encoder: nn.Module, word: str) -> None:
    """Puts the embedding of a word that `add_identifier` added into a parameter of its own."""
    encoder: Any = text_encoder
    table = encoder.get_input_embeddings()
    encoder.set_input_embeddings(IdentifierEmbedding(table, word, tokenizer.convert_tokens_to_ids(word)))


def find_embedding(network: nn.Module) -> IdentifierEmbedding | None:
    """The trained embedding in a network, if there is one."""
    return next((module for module in network.modules() if isinstance(module, IdentifierEmbedding)), None)


def save_embedding(embedding: IdentifierEmbedding, folder: Path) -> None:
    """Writes the word's vector as `load_textual_inversion`, ComfyUI and A1111 read it."""
    vector = embedding.vector.detach().float().contiguous().cpu()
    save_file({embedding.word: vector}, folder / EMBEDDING_FILE, metadata={"format": "pt"})


def read_embedding(folder: Path) -> tuple[str, Tensor] | None:
    """The word and its vector that `save_embedding` wrote; None where there is none."""
    path = folder / EMBEDDING_FILE
    return next(iter(load_file(path).items())) if path.exists() else None
