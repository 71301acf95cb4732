"""A tokenizer whose words are t0, t1, ..., for folders that need one."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers


def write_tokenizer(folder: Path, words: int) -> None:
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer reads them."""
    vocabulary = {f"t{number}": number for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(description))
