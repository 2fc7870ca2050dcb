"""Small tokenizers in the forms in which models have them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PIECES = [bytes([byte]) for byte in range(256)] + [b"th", b" th", b" the", b"es", b" t"]
"""A vocabulary of all bytes and a few pieces; the number of a piece is its rank."""
PATTERN = r" ?\p{L}+| ?[^\s\p{L}]+|\s+"


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer.json that has a token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({each: rank for rank, each in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def make_tekken(folder: Path) -> Path:
    """A tekken.json as Mistral's models have it, with 1000 special tokens before the others."""
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(PIECES)
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(PIECES),
        "default_vocab_size": len(PIECES) + 1000,
        "default_num_special_tokens": 1000,
        "version": "v3",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps({"vocab": vocabulary, "config": config}))
    return folder


def make_tiktoken(folder: Path, name: str = "tokenizer.model") -> Path:
    """A tiktoken file as Llama 3's original folder has it."""
    lines = (f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(PIECES))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
