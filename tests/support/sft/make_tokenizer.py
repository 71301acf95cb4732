"""Makes the tokenizer that lies beside it, of the conversations beside it: make_tokenizer.py.

Bytes and a hundred merges of them, with the special tokens that Megatron's prompt formats ask for
(`nemotron-h-aligned`: <SPECIAL_10>, <SPECIAL_11>, padding <SPECIAL_233>; `nemotron-nano-v2`:
<SPECIAL_12>, padding <unk>), and a chat template of its own (`default`).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
CONVERSATIONS = FOLDER / "conversations.jsonl"
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>", "<unk>"]
SPECIAL += [f"<SPECIAL_{number}>" for number in (10, 11, 12, 233)]
SIZE = 368
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|begin|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
)


def main() -> None:
    lines = CONVERSATIONS.read_text().splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(FOLDER / "tokenizer")


if __name__ == "__main__":
    main()
