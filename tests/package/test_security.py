"""What SECURITY.md promises, read from the package's own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "step35_patch").rglob("*.py"), *(ROOT / "startup").rglob("*.py")])
# Modules that run, fetch or unpack what somebody else wrote; and who may import one, for what.
NOBODY: dict[str, str] = {}
GUARDED = {
    **{
        module: NOBODY
        for module in (
            *("marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "pty"),
            *("urllib", "http", "requests", "ftplib", "smtplib", "aiohttp", "httpx", "xmlrpc"),
            *("huggingface_hub", "webbrowser", "asyncio"),
        )
    },
    "pickle": {
        "storage/inert_pickle.py": "its operations' codes",
        "storage/torch_dist.py": "writes .metadata",
    },
    "socket": {"commands/private_words.py": "the host's name, to leave it out of a report"},
    "ctypes": {"commands/verify.py": "malloc_trim"},
    "runpy": {"__main__.py": "starts the user's own program"},
    "subprocess": {
        "patch/diagnosis.py": "this Python, to look at a fresh one",
        "commands/demo_training.py": "the example script",
        "commands/gradients.py": "the example script",
        "commands/rehearse.py": "the user's own program",
    },
}
CALLS = ("eval", "exec", "compile", "__import__", "breakpoint", "input")
METHODS = (
    *("os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "os.startfile"),
    *("torch.load", "torch.hub.load", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("yaml.load", "yaml.unsafe_load", "subprocess.getoutput", "subprocess.getstatusoutput"),
)


def name_of(file: Path) -> str:
    return (
        file.relative_to(ROOT / "step35_patch").as_posix()
        if "startup" not in file.parts
        else file.name
    )


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def wrong_in(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_bytes())
    for module in imported(tree):
        allowed = GUARDED.get(module.partition(".")[0])
        if allowed is not None and name_of(file) not in allowed:
            yield f"{name_of(file)} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            shell = next((word.value for word in node.keywords if word.arg == "shell"), None)
            if called in (*CALLS, *METHODS):
                yield f"{name_of(file)}:{node.lineno} calls {called}"
            if shell is not None and ast.unparse(shell) != "False":
                yield f"{name_of(file)}:{node.lineno} starts a shell"


def test_nothing_runs_or_fetches_what_others_wrote():
    assert [wrong for file in FILES for wrong in wrong_in(file)] == []


def test_the_exceptions_are_still_needed():
    found = {
        (module.partition(".")[0], name_of(file))
        for file in FILES
        for module in imported(ast.parse(file.read_bytes()))
    }
    for module, files in GUARDED.items():
        for file in files:
            assert (module, file) in found, f"{file} no longer imports {module}"


def test_the_start_up_file_imports_this_package_alone():
    """In every interpreter of the environment: what it can run must be plain to see."""
    [line] = (ROOT / "startup" / "a1_step35_patch.pth").read_text().splitlines()
    tree = ast.parse(line)
    assert list(imported(tree)) == ["os"]
    [inner] = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "exec"
    ]
    assert list(imported(ast.parse(inner))) == ["step35_patch_startup"]
    module = (ROOT / "startup" / "step35_patch_startup.py").read_text()
    assert set(imported(ast.parse(module))) == {"os", "step35_patch"}
