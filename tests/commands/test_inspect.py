"""`step35-patch inspect` and the tensors it counts."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from support.config_samples import edited, published, tiny

from step35_patch.cli import main
from step35_patch.config import Step35Config, packaged_config_path
from step35_patch.tensors.published import TensorInfo, published_tensors

TOTALS = {
    "decoder_layers": 45,
    "full_attention_layers": 12,
    "sliding_attention_layers": 33,
    "moe_layers": 42,
    "mtp_layers": 3,
    "tensors": 804,
    "parameters": 199384301376,
    "parameters_by_dtype": {"BF16": 199384301376 - 42 * 288, "F32": 42 * 288},
    "bytes": 398768626944,
}


def run(*arguments, **options):
    """The command in a process of its own."""
    program = "import sys; from step35_patch.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        **options,
    )


# --- tensors ----------------------------------------------------------------------------------


def test_the_published_checkpoint_has_the_published_size():
    tensors = published_tensors(Step35Config.from_pretrained(packaged_config_path()))
    assert len(tensors) == len({tensor.name for tensor in tensors}) == 804
    assert sum(tensor.num_elements for tensor in tensors) == 199384301376
    assert sum(tensor.num_bytes for tensor in tensors) == 398768626944


def test_the_tensors_of_each_kind_of_layer():
    tensors = published_tensors(Step35Config.from_pretrained(packaged_config_path()))
    of_layer = {}
    for tensor in tensors:
        layer, _, name = tensor.name.removeprefix("model.layers.").partition(".")
        if layer.isdecimal():
            of_layer.setdefault(int(layer), {})[name] = tensor

    def attention(heads):
        return {
            "input_layernorm.weight": (4096,),
            "post_attention_layernorm.weight": (4096,),
            "self_attn.q_proj.weight": (heads * 128, 4096),
            "self_attn.k_proj.weight": (1024, 4096),
            "self_attn.v_proj.weight": (1024, 4096),
            "self_attn.o_proj.weight": (4096, heads * 128),
            "self_attn.g_proj.weight": (heads, 4096),
            "self_attn.q_norm.weight": (128,),
            "self_attn.k_norm.weight": (128,),
        }

    dense = {
        "mlp.gate_proj.weight": (11264, 4096),
        "mlp.up_proj.weight": (11264, 4096),
        "mlp.down_proj.weight": (4096, 11264),
    }
    moe = {
        "moe.gate.weight": (288, 4096),
        "moe.router_bias": (288,),
        "moe.gate_proj.weight": (288, 1280, 4096),
        "moe.up_proj.weight": (288, 1280, 4096),
        "moe.down_proj.weight": (288, 4096, 1280),
        "share_expert.gate_proj.weight": (1280, 4096),
        "share_expert.up_proj.weight": (1280, 4096),
        "share_expert.down_proj.weight": (4096, 1280),
    }
    mtp = {
        "enorm.weight": (4096,),
        "hnorm.weight": (4096,),
        "eh_proj.weight": (4096, 8192),
        "transformer.shared_head.norm.weight": (4096,),
        "transformer.shared_head.output.weight": (128896, 4096),
    }
    assert sorted(of_layer) == list(range(48))
    for index, expected in {
        0: attention(64) | dense,
        1: attention(96) | dense,
        3: attention(96) | moe,
        44: attention(64) | moe,
        47: attention(96) | dense | mtp,
    }.items():
        assert {name: tensor.shape for name, tensor in of_layer[index].items()} == expected
        for name, tensor in of_layer[index].items():
            assert tensor.dtype == ("F32" if name == "moe.router_bias" else "BF16")
    outside = [tensor for tensor in tensors if not tensor.name.startswith("model.layers.")]
    assert outside == [
        TensorInfo("model.embed_tokens.weight", (128896, 4096), "BF16"),
        TensorInfo("model.norm.weight", (4096,), "BF16"),
        TensorInfo("lm_head.weight", (128896, 4096), "BF16"),
    ]


def test_layers_come_in_order():
    names = [tensor.name for tensor in published_tensors(Step35Config.from_dict(tiny()))]
    indices = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert indices == sorted(indices) and set(indices) == set(range(8))


@pytest.mark.parametrize(("dtype", "name", "size"), [("float32", "F32", 4), ("float16", "F16", 2)])
def test_the_dtype_is_the_configs_but_for_the_router_bias(dtype, name, size):
    for tensor in published_tensors(Step35Config.from_dict(tiny(torch_dtype=dtype))):
        router_bias = tensor.name.endswith("router_bias")
        assert tensor.dtype == ("F32" if router_bias else name)
        assert tensor.num_bytes == math.prod(tensor.shape) * (4 if router_bias else size)


def test_a_model_without_the_gate_has_no_gate_weights():
    def names(gate):
        config = Step35Config.from_dict(tiny(use_head_wise_attn_gate=gate))
        return {tensor.name for tensor in published_tensors(config)}

    gates = {f"model.layers.{index}.self_attn.g_proj.weight" for index in range(8)}
    assert names(True) - names(False) == gates


def test_the_tensors_are_those_of_the_reference():
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.models.step3p7")
    data = tiny(num_nextn_predict_layers=0)
    for name, value in data.items():
        if isinstance(value, list) and len(value) == 8:
            data[name] = value[:6]
    with torch.device("meta"):
        model = reference.Step3p7TextModel(reference.Step3p7TextConfig(**data, pad_token_id=0))
    theirs = sum(parameter.numel() for parameter in model.parameters())
    theirs += sum(
        buffer.numel() for name, buffer in model.named_buffers() if "correction_bias" in name
    )
    tensors = published_tensors(Step35Config.from_dict(data))
    ours = sum(tensor.num_elements for tensor in tensors if tensor.name != "lm_head.weight")
    assert ours == theirs


# --- the command ------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_layer_and_exact_totals(capsys):
    assert main(["inspect", str(packaged_config_path()), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[:1] != []}
    assert [row for row in rows if row.isdecimal()] == [str(index) for index in range(48)]
    full = ["full", "64", "8", "128", "-", "5000000", "0.5", "llama3"]
    sliding = ["sliding", "96", "8", "128", "512", "10000", "1", "-"]
    assert rows["0"][1:] == [*full, "dense", "-", "-", "214180096"]
    assert rows["3"][1:] == [*sliding, "MoE", "-", "-", "4656210464"]
    assert rows["44"][1:] == [*full, "MoE", "7", "16", "4622524960"]
    assert rows["47"][1:] == [*sliding, "MTP,", "dense", "-", "-", "809390336"]
    assert rows["tensors"][1] == "804"
    assert rows["parameters"][1] == "199384301376"
    assert rows["bytes"][1] == "398768626944"
    assert "45 layers: 12 full, 33 sliding; 42 MoE" in " ".join(rows["decoder"])


def test_equal_neighbours_are_one_row(tmp_path, capsys):
    assert main(["inspect", "step-3.5-flash"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"]) + 1
    rows = [line.split() for line in lines[first : lines.index("", first)]]
    assert [row[0] for row in rows][:5] == ["0", "1-2", "3", "4", "5-7"]
    assert [row[0] for row in rows][-4:] == ["41-42", "43", "44", "45-47"]
    assert all(row[1] != "full" or "-" not in row[0] for row in rows)
    # Nothing is folded that differs in one number.
    (tmp_path / "config.json").write_text(json.dumps(tiny(swiglu_limits=[0.0, 0.5] * 4)))
    assert main(["inspect", str(tmp_path)]) == 0
    folded = capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--all"]) == 0
    assert capsys.readouterr().out == folded


def test_on_a_terminal_of_80_columns_nothing_is_cut(tmp_path):
    """Every figure of the table is there, and no line is longer."""
    program = (
        "import os, pty, sys\n"
        "os.environ |= {'COLUMNS': '80', 'TERM': 'xterm', 'NO_COLOR': '1'}\n"
        "status = pty.spawn([sys.executable, '-m', 'step35_patch.cli', 'inspect', *sys.argv[1:]])\n"
        "sys.exit(os.waitstatus_to_exitcode(status))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "step-3.5-flash"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert rows["5-7"] == ["sliding", "96", "512", "10000", "1", "-", "MoE", "-", "-", "4656210464"]
    full = ["full", "64", "-", "5000000", "0.5", "llama3", "MoE", "7", "16", "4622524960"]
    assert rows["44"] == full
    assert "all layers: groups 8, head dim 128" in lines


def test_json_holds_everything(capsys):
    assert main(["inspect", str(packaged_config_path()), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = Step35Config.from_dict(published())
    assert report["totals"] == TOTALS
    assert report["config"] == published()
    assert report["fingerprint"] == config.fingerprint
    for found, plan in zip(report["layers"], config.layers, strict=True):
        for name in plan.__slots__:
            value = getattr(plan, name)
            if name == "rope_scaling" and value:
                value = {key: getattr(value, key) for key in value.__slots__}
            assert found[name] == (list(value) if isinstance(value, tuple) else value)
    tensors = [TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in report["tensors"]]
    assert tuple(tensors) == published_tensors(config)
    outside = 2 * 128896 * 4096 + 4096
    assert sum(layer["parameters"] for layer in report["layers"]) + outside == 199384301376
    assert sum(layer["bytes"] for layer in report["layers"]) + 2 * outside == 398768626944


def test_a_file_a_folder_and_the_published_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    outputs = []
    for path in ("config.json", ".", str(tmp_path)):
        assert main(["inspect", path]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1 and "8 layers" not in outputs[0]
    assert main(["inspect", "step-3.5-flash"]) == 0
    assert "199384301376" in capsys.readouterr().out
    # What is there goes before the name.
    (tmp_path / "step-3.5-flash").mkdir()
    (tmp_path / "step-3.5-flash" / "config.json").write_text(json.dumps(tiny()))
    assert main(["inspect", "step-3.5-flash"]) == 0
    assert capsys.readouterr().out == outputs[0]


def test_every_feature_off_has_a_table_too(tmp_path, capsys):
    data = tiny(use_head_wise_attn_gate=False, moe_layers_enum=[], rope_scaling=None)
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "no attention gate" in output and "0 MoE" in output
    assert "llama3" not in output and "experts of" not in output


def test_a_wrong_config_is_told_on_stderr(tmp_path, capsys):
    data = edited(tiny(hidden_size=0), "layer_types.1", "sliding")
    (tmp_path / "config.json").write_text(json.dumps(data))
    for options in ([], ["--json"]):
        assert main(["inspect", str(tmp_path), *options]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"{tmp_path / 'config.json'}: 2 problems\n")
        assert "hidden_size" in output.err and "layer_types[1]" in output.err
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["inspect", "a", "b"], ["no-such"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: step35-patch" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "inspect" in output and "demo" in output


def test_it_starts_without_torch():
    program = (
        "import sys; from step35_patch.cli import main; main(['inspect', 'step-3.5-flash'])\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'matplotlib', 'rich'}\n"
        "sys.exit(f'loaded: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "199384301376" in done.stdout


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "step35_patch.cli", "inspect", "step-3.5-flash"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "199384301376" in done.stdout


def test_errors_of_the_process(tmp_path):
    done = run("inspect", str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and str(tmp_path / "config.json") in done.stderr


@pytest.mark.parametrize("option", [[], ["--json"]])
@pytest.mark.parametrize("size", ["short", "long"])
def test_a_reader_that_stops_early_is_no_error(option, size, tmp_path):
    # A short output fits Python's buffer and meets the closed pipe only when it is flushed.
    data = tiny() if size == "short" else published()
    (tmp_path / "config.json").write_text(json.dumps(data))
    program = "import sys; from step35_patch.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "inspect", str(tmp_path), *option],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert stderr == b""
