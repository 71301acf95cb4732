"""`step35-patch inspect --plot`: what stands in the picture."""

import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from support.config_samples import tiny

from step35_patch.cli import main

LAYOUT = "Ett|(tt|)*21t|mmmL"  # of examples/sft_arguments.sh


def words(path) -> list[str]:
    """The texts of a picture, in the order of drawing."""
    root = ElementTree.parse(path).getroot()
    return [
        "".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def lightness(colour: str) -> float:
    """Of #rrggbb: relative luminance as WCAG 2 has it, 0 to 1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_layer_says_what_it_is(tmp_path, capsys):
    file = tmp_path / "layers.svg"
    assert main(["inspect", "step-3.5-flash", "--plot", str(file)]) == 0
    assert "199384301376" in capsys.readouterr().out
    found = Counter(words(file))
    assert set(map(str, range(48))) <= found.keys()
    expected = {"all": 12, "5M": 12, "512": 36, "10k": 36, "x2": 12, "M": 43, "D": 7}
    assert {word: found[word] for word in expected} == expected  # one of M and D is the legend's
    assert found["64"] == 12 and found["96"] == 36
    # Layer 7 and 16 have their numbers too.
    assert found["7"] == 3 and found["16"] == 3
    assert "step3p5: 45 layers, 3 MTP layers, hidden size 4096, 199.4 billion parameters" in found
    # Black and white: each fill is told from the others.
    fills = {c for c in re.findall(r"fill: (#[0-9a-f]{6})", file.read_text()) if c != "#000000"}
    levels = sorted(map(lightness, fills))
    assert len(levels) == 4
    assert all(high - low > 0.15 for low, high in pairwise(levels)), levels


@pytest.mark.megatron
def test_stages_of_a_layout(tmp_path, capsys):
    file = tmp_path / "layers.svg"
    command = ["inspect", "step-3.5-flash", "--plot", str(file), "--pipeline-layout", LAYOUT]
    assert main([*command, "--pp", "8"]) == 0
    found = words(file)
    ranks = found[found.index("pipeline rank") + 1 : found.index("chunk of the rank")]
    assert ranks == [str(stage % 8) for stage in range(24)]
    chunks = found[found.index("chunk of the rank") + 1 :][:4]
    assert chunks == ["0", "1", "2", "2"]  # the last one's MTP layers stand apart
    assert "24 pipeline stages, in order: embedding on rank 0, loss on rank 7." in found
    assert main(command) == 0  # a rank for each stage
    found = words(file)
    assert found[found.index("pipeline rank") + 1 :][:24] == [str(stage) for stage in range(24)]
    capsys.readouterr()
    for layout, ranks, reason in (
        (LAYOUT, "7", "must be divisible by"),
        ("Ett|ttL", "2", "must match num_layers"),
        ("Ex|L", "2", "Invalid layer character"),
        (LAYOUT, "0", "--pp: expected 1 or more, found 0"),
    ):
        options = ["--plot", str(file), "--pipeline-layout", layout, "--pp", ranks]
        assert main(["inspect", "step-3.5-flash", *options]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and reason in " ".join(printed.err.split())


def test_a_png_of_any_config(tmp_path, capsys):
    data = tiny(use_head_wise_attn_gate=False, moe_layers_enum=[], rope_scaling=None)
    data |= {name: v[:6] for name, v in data.items() if isinstance(v, list) and len(v) == 8}
    data |= {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(data))
    file = tmp_path / "layers.png"
    assert main(["inspect", str(tmp_path), "--plot", str(file)]) == 0
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1500 and 300 < height < width


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--plot", "layers.pdf"],
            "--plot: expected a file named .png or .svg, found 'layers.pdf'",
        ),
        (["--plot", "nowhere/layers.svg"], "--plot: "),
        (["--plot", "layers.svg", "--pp", "2"], "--pp: expected --pipeline-layout with it"),
        (["--pipeline-layout", LAYOUT], "expected --plot FILE with them"),
    ],
)
def test_what_cannot_be_drawn(options, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "step-3.5-flash", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and reason in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_so(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "step35_patch.cli", "inspect", "step-3.5-flash"]
    done = subprocess.run(
        [*command, "--plot", str(tmp_path / "layers.png")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "pip install 'step35-patch[plot]'" in done.stderr
