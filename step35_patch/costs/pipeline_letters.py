"""The letters of Megatron's --pipeline-model-parallel-layout, read without torch.

`|` ends a stage; E is the embedding, t a decoder layer, m an MTP layer, L the loss; `t*3` and
`(tt|)*3` repeat what stands before the star; commas mean nothing. What is accepted is what
`PipelineParallelLayerLayout` of Megatron-Core parses and validates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from step35_patch.config.problem import Problem
from step35_patch.costs.launch_errors import LaunchError

OPTION = "--pipeline-model-parallel-layout"
_LETTERS = {"E", "t", "m", "L"}
# A group in parentheses, then a single letter or bar; neither nests.
_REPEATED = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))
# More is no layout of any cluster, and the text that it stands for should not be made.
_LONGEST = 10_000


def split_stages(letters: str) -> list[str]:
    """The letters of each stage.

    Raises:
        LaunchError: There are others.
    """
    text = letters.replace(",", "")
    for pattern in _REPEATED:
        made = sum(len(part) * int(count[:9]) for part, count in pattern.findall(text))
        if made > _LONGEST:
            raise LaunchError([_problem(letters, f"no more than {_LONGEST} letters in the end")])
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    if others := sorted(set(text) - _LETTERS - {"|"}):
        raise LaunchError([_problem(letters, f"E, t, m, L, | and repetitions, not {others[0]!r}")])
    return text.split("|")


def virtual_size_of(letters: str, pipeline_size: int) -> int | None:
    """The `virtual_pipeline_model_parallel_size` of a layout, or None without virtual stages.

    Raises:
        LaunchError: It cannot be read, or has no multiple of `pipeline_size` stages.
    """
    count = len(split_stages(letters))
    if count % pipeline_size:
        wanted = f"a multiple of --pipeline-model-parallel-size {pipeline_size} stages, not {count}"
        raise LaunchError([_problem(letters, wanted)])
    return None if count == pipeline_size else count // pipeline_size


def layers_of_stages(
    letters: str, pipeline_size: int, num_layers: int, mtp_layers: int
) -> list[tuple[int, int]]:
    """How many decoder and MTP layers each stage has.

    Raises:
        LaunchError: Megatron-Core would not accept the layout.
    """
    virtual_size_of(letters, pipeline_size)
    parts = split_stages(letters)
    wanted = list(_wanted(parts, pipeline_size, num_layers, mtp_layers))
    if wanted:
        raise LaunchError([_problem(letters, text) for text in wanted])
    return [(part.count("t"), part.count("m")) for part in parts]


def _wanted(
    parts: list[str], pipeline_size: int, num_layers: int, mtp_layers: int
) -> Iterator[str]:
    """What the layout would have to have, of `validate_layer_layout`."""
    text = "".join(parts)
    if not text.startswith("E") or text.count("E") != 1:
        yield "one E, before all else"
    if not text.endswith("L") or text.count("L") != 1:
        yield "one L, behind all else"
    for letter, name, count in (("t", "decoder", num_layers), ("m", "MTP", mtp_layers)):
        if text.count(letter) != count:
            yield f"{count} {name} layers ({letter}), not {text.count(letter)}"
    if "m" in text and "t" in text[text.index("m") :]:
        yield "MTP layers (m) behind all decoder layers (t)"
    with_mtp = [number for number, part in enumerate(parts) if "m" in part]
    if len(with_mtp) > 1 or (with_mtp and with_mtp[0] < len(parts) - pipeline_size):
        yield "all MTP layers (m) on one stage, the last virtual one of its pipeline rank"


def _problem(letters: str, expected: str) -> Problem:
    return Problem(OPTION, expected, repr(letters), "change it")
