"""Train Step-3.5 with Megatron's own training loop, on the text of Python's documentation.

    STEP35_CONFIG=path/to/config.json python pretrain_step35.py MEGATRON_ARGUMENTS
    STEP35_CONFIG=... torchrun --nproc-per-node 8 pretrain_step35.py MEGATRON_ARGUMENTS

Nothing below knows Step-3.5 but `import step35_patch`, which makes Megatron-Core's builders build
it. The tokens are bytes, so that no tokenizer and no download are needed. Without a GPU the script
runs on the CPU. `step35-patch demo` runs it, and prints a whole command line.
"""

import torch

import step35_patch  # all it takes: Megatron-Core is patched as it is imported below

if not torch.cuda.is_available():
    from step35_patch import cpu

    cpu.install()

import inspect
import pydoc_data.topics
from functools import partial
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.datasets import utils as dataset_utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import arguments, get_args, pretrain, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args


def model_provider(
    pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    """Build this pipeline stage's part of the model, as Megatron-LM's gpt_builders.py does."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    how = {"use_transformer_engine": use_te, "normalization": args.normalization}
    mtp_block_spec = None
    if args.mtp_num_layers:
        last_layer_spec = get_gpt_decoder_layer_specs(config, **how, vp_stage=vp_stage)[-1]
        mtp_block_spec = get_gpt_mtp_block_spec(
            config, last_layer_spec, use_transformer_engine=use_te, vp_stage=vp_stage
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, **how, vp_stage=vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        mtp_block_spec=mtp_block_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


class Bytes(torch.utils.data.Dataset):
    """Windows of a text's bytes, each sample at a place that depends on its number only."""

    def __init__(self, text: bytes, num_samples: int, seq_length: int):
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.num_samples, self.seq_length = num_samples, seq_length

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        # The golden ratio's multiples spread evenly over the text, in no order.
        start = int(index * 0.6180339887498949 % 1 * (len(self.text) - self.seq_length - 1))
        window = self.text[start : start + self.seq_length + 1].long()
        return {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


def datasets_provider(train_val_test_num_samples, vp_stage=None):
    """The first nine tenths of the text to train on, the rest to evaluate and to test on."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(text) * 9 // 10
    parts = zip((text[:cut], text[cut:], text[cut:]), train_val_test_num_samples, strict=True)
    seq_length = get_args().seq_length
    return tuple(Bytes(part, n, seq_length) if n else None for part, n in parts)


datasets_provider.is_distributed = True  # every rank builds it, so that none has to broadcast


def loss_func(loss_mask, losses):
    """Sum of the tokens' losses, their number, and both for Megatron's log."""
    loss = torch.sum(losses.float() * loss_mask)
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


# An argument that Megatron-Core 0.18 and later ask for.
NOT_HYBRID = dict.fromkeys(
    {"is_hybrid_cp"} & set(inspect.signature(get_batch_on_this_cp_rank).parameters), False
)


def forward_step(data_iterator, model):
    """One micro-batch through the model; the attention mask is causal."""
    batch = {name: t.cuda(non_blocking=True) for name, t in next(data_iterator).items()}
    batch = get_batch_on_this_cp_rank(
        batch, cp_group=parallel_state.get_context_parallel_group(), **NOT_HYBRID
    )
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def embedding_ranks(pp_ranks, *_):
    """Of a pipeline's ranks those with the embedding: the first, and wherever MTP layers are."""
    config = core_transformer_config_from_args(get_args())
    return sorted({pp_ranks[0], *get_mtp_ranks(pp_ranks, config)})


def main():
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        # Megatron-Core from a wheel has its dataset helper compiled, and nothing to make it from.
        dataset_utils.compile_helpers = lambda: None
    config = {}
    if "cfg_container" in inspect.signature(pretrain).parameters:  # Megatron-Core 0.18 and later
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        args = arguments.parse_and_validate_args()
        config["cfg_container"] = pretrain_cfg_container_from_args(args)
    print_rank_0(step35_patch.status())
    pretrain(
        **config,
        train_valid_test_dataset_provider=datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    main()
