"""How a text encoder's tokenizer splits words."""

from pathlib import Path

from transformers import CLIPTokenizer

from dd.generators.loading import EMBEDDED


def token_pieces(model: str, words: list[str]) -> dict[str, list[str]]:
    """{word: its token pieces} by the tokenizer of ``model``, a name of :data:`EMBEDDED` or a
    folder in Stable Diffusion's format."""
    folder = EMBEDDED.get(model, Path(model))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return {word: tokenizer.tokenize(word) for word in words}
