"""What a launch in this environment would meet: what is installed, patched, refused, and why.

Nothing of Megatron's is imported here, and no exception gets out: two new interpreters are started,
one to see whether the start-up file is run, one that imports all that is wrapped
(`step35_patch.patch.probe`).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import platform
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch import settings
from step35_patch._version import __version__
from step35_patch.config.errors import ConfigProblem
from step35_patch.patch.activation import STARTUP_MODULE
from step35_patch.patch.megatron_version import is_tested
from step35_patch.patch.probe import BRIDGE, Findings, FoundTarget
from step35_patch.patch.targets import TESTED

if TYPE_CHECKING:
    from packaging.requirements import Requirement


STARTUP_FILE = "a1_step35_patch.pth"
DISTRIBUTION = "step35-patch"
# The packages whose versions are told, besides Megatron-Core, PyTorch and CUDA.
_PACKAGES = (
    *("megatron-bridge", "transformer-engine", "emerging-optimizers", "transformers"),
    *("wrapt", "pydantic", "safetensors", "rich"),
)
# What needs an extra, by its name in setup.cfg.
NEEDED_BY = {
    "training": "pretrain_gpt.py, and all of megatron.training",
    "te": "--transformer-impl transformer_engine, which is Megatron's default",
    "muon": "--optimizer muon",
    "bridge": "import step35_patch.bridge",
    "reference": "step35-patch verify; generate, to read tokenizers",
    "launch": "step35-patch check --script and rehearse; completion of words in a shell",
    "plot": "step35-patch inspect --plot",
}
_SECONDS = 600  # for an interpreter; importing Megatron-Core from a busy disk takes minutes

# An interpreter that starts as one of a launch does, and then says how, after this.
_FOUND = "step35_patch.patch.diagnosis found "
_START = f"""
import json, sys
startup = sys.modules.get({STARTUP_MODULE!r})
patched = "step35_patch" in sys.modules
import step35_patch
print({_FOUND!r} + json.dumps([startup and startup.__file__, patched, step35_patch.__file__]))
"""
_PROBE = "from step35_patch.patch.probe import main; main()"


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        versions: By package; None for what is not there. Megatron-Core's, PyTorch's and CUDA's are
            those of an interpreter that imported them.
        megatron_folders: Each Megatron that is on the path, in the path's order, as a line.
        gpus: Their names.
        targets: What is wrapped, with its state: that of `step35_patch.status()`, or "not
            importable".
        variables: The STEP35_ variables that are set.
        config: The model of STEP35_CONFIG, in a line; empty without one that is usable.
        startup: Where the start-up file lies, and whether it is run.
        extras: By name, what is not there of it, in a line; empty if all is.
        problems: What would stop a launch, or make it another one than was meant.
        notices: What one should know.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    megatron_folders: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    targets: list[FoundTarget] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    config: str = ""
    startup: str = ""
    extras: dict[str, str] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def diagnose() -> Diagnosis:
    """Look at this environment, as a process that is started in it would find it."""
    found = Diagnosis(
        versions={
            "python": platform.python_version(),
            DISTRIBUTION: __version__,
            **dict.fromkeys(("torch", "cuda", "megatron-core")),
            **{name: _version(name) for name in _PACKAGES},
        }
    )
    usable = _variables(found)
    if importlib.util.find_spec("packaging") is None:
        # Without it no version can be compared with another.
        fix = "pip install packaging"
        found.problems.append(ConfigProblem("packaging", "any version", "nothing", fix))
        _startup(found)
        return found
    _requirements(found)
    if _startup(found):
        _targets(found, usable)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _variables(found: Diagnosis) -> bool:
    """Look at the STEP35_ variables; returns whether a process would start with them."""
    found.variables = {
        name: value if name in settings.VARIABLES else "(read by nothing)"
        for name, value in sorted(os.environ.items())
        if name.startswith("STEP35_")
    }
    for name in found.variables:
        meant = difflib.get_close_matches(name, settings.VARIABLES, n=1, cutoff=0.85)
        if meant and meant[0] != name:
            found.problems.append(
                ConfigProblem(name, meant[0], name, "nothing reads a variable of this name")
            )
    wrong = settings.variable_problems()
    found.problems += map(_problem, wrong.values())
    path = os.environ.get("STEP35_CONFIG")
    is_on = os.environ.get("STEP35_PATCH") == "1"
    if not path:
        if is_on:
            found.notices.append(
                "STEP35_PATCH=1 without STEP35_CONFIG: wrapped, but inert, unless a launch gives "
                "--step35-config"
            )
    elif not is_on:
        found.notices.append(
            "STEP35_CONFIG without STEP35_PATCH=1: only programs are patched that import "
            "step35_patch, or are started by python -m step35_patch"
        )
    return _config(found, None if "STEP35_CONFIG" in wrong else path) and not wrong


def _problem(line: str) -> ConfigProblem:
    """A line "name: expected ..., found ..." in its parts."""
    name, _, rest = line.partition(": expected ")
    expected, _, actual = rest.partition(", found ")
    return ConfigProblem(name, expected, actual)


def _config(found: Diagnosis, path: str | None) -> bool:
    """Read the config, if there is one, and the names of fields; returns whether they are fine."""
    try:
        from step35_patch.config.comparison import not_acceptable
        from step35_patch.config.model import Step35Config, Step35ConfigError
    except ImportError as error:  # without pydantic
        problem = ConfigProblem("reading configs", "to be possible", str(error))
        found.problems.append(problem)
        return False
    accepted = os.environ.get("STEP35_ACCEPT_CHANGED", "").split(",")
    names = [name.strip() for name in accepted if name.strip()]
    found.problems += [
        ConfigProblem(wrong.argument, wrong.expected, wrong.found, wrong.fix)
        for wrong in not_acceptable(names, "STEP35_ACCEPT_CHANGED")
    ]
    if not path:
        return True
    try:
        config = Step35Config.from_pretrained(path)
    except Step35ConfigError as error:
        found.problems += [
            ConfigProblem(
                f"{error.source}{': ' * bool(problem.field)}{problem.field}",
                problem.expected,
                problem.found,
                problem.hint,
            )
            for problem in error.problems
        ]
        return False
    mtp = config.num_nextn_predict_layers
    found.config = (
        f"{config.num_hidden_layers} layers and {mtp} MTP layers, {config.torch_dtype}, "
        f"fingerprint {config.fingerprint[:12]}"
    )
    return True


def _requirements(found: Diagnosis) -> None:
    """Hold what is installed against the package's own metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        found.notices.append(
            f"{DISTRIBUTION} has no metadata here (a copy on PYTHONPATH): what it "
            "requires was not compared with what is installed"
        )
        return
    requirements = [Requirement(line) for line in lines]
    for requirement in _unmet(requirements, ""):
        if requirement.name != "megatron-core":  # see _megatron
            found.problems.append(
                ConfigProblem(
                    requirement.name,
                    str(requirement.specifier) or "any version",
                    _version(requirement.name) or "nothing",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            )
    of_package = {str(requirement) for requirement in _unmet(requirements, "")}
    for extra in extras:
        if extra in NEEDED_BY:
            unmet = [r for r in _unmet(requirements, extra) if str(r) not in of_package]
            found.extras[extra] = ", ".join(
                f"{r.name}{r.specifier}"
                + (f" (found {version})" if (version := _version(r.name)) else "")
                for r in unmet
            )


def _unmet(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                yield requirement


def _startup(found: Diagnosis) -> bool:
    """See whether the start-up file runs; returns whether new processes find the package."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STEP35_")}
    done = _run(clean | {"STEP35_PATCH": "1"}, "-c", _START)
    file = next(_startup_files(), None)
    is_on = os.environ.get("STEP35_PATCH") == "1"
    answer = next((line for line in done.stdout.splitlines() if line.startswith(_FOUND)), None)
    if answer is None:
        found.startup = f"{file or 'no start-up file'}; a new interpreter ends with an error"
        found.problems.append(
            ConfigProblem(
                "a new interpreter",
                "to find step35_patch and start with STEP35_PATCH=1",
                _last_line(done.stderr),
                "install the package into this environment: pip install step35-patch",
            )
        )
        return False
    startup, patched, package = json.loads(answer.removeprefix(_FOUND))
    here = str(Path(__file__).parents[1] / "__init__.py")
    if os.path.realpath(package) != os.path.realpath(here):
        found.problems.append(
            ConfigProblem(
                "step35_patch",
                f"the one of this command, {here}",
                f"another one in a new interpreter, {package}",
                "uninstall one of them, or correct PYTHONPATH",
            )
        )
    if startup and patched:
        found.startup = f"{Path(startup).with_name(STARTUP_FILE)}; runs with STEP35_PATCH=1"
        return True
    found.startup = f"{file}; not run, no folder of site's" if file else f"no {STARTUP_FILE}"
    text = "a new interpreter does not run it (a copy on PYTHONPATH, or python -S)"
    if is_on:
        found.problems.append(
            ConfigProblem(
                "STEP35_PATCH=1",
                f"{STARTUP_FILE} in site-packages",
                text,
                "pip install step35-patch; or import step35_patch in the program, or start it by "
                "python -m step35_patch",
            )
        )
    else:
        found.notices.append(f"{STARTUP_FILE}: {text}, so that STEP35_PATCH=1 would do nothing")
    return True


def _startup_files() -> Iterator[Path]:
    folders = [*site.getsitepackages(), site.getusersitepackages(), *sys.path]
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *folders]):
        if (file := Path(folder, STARTUP_FILE)).exists():
            yield file


def _run(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603  # nosec B603  # this interpreter, with our words
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 1, "", f"no end after {_SECONDS} s")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")


def _targets(found: Diagnosis, usable: bool) -> None:
    """Import everything that is wrapped in a process of its own.

    Args:
        found: The diagnosis.
        usable: Whether a process starts with the STEP35_ variables as they are. If not, the rest is
            looked at without them.
    """
    environment = dict(os.environ)
    if not usable:
        environment = {k: v for k, v in environment.items() if not k.startswith("STEP35_")}
        if os.environ.get("STEP35_ALLOW_UNTESTED") == "1":
            environment["STEP35_ALLOW_UNTESTED"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "findings.json")
        done = _run(environment, "-W", "ignore", "-c", _PROBE, str(file))
        if not file.exists():
            ending = f"signal {-done.returncode}" if done.returncode < 0 else "an error"
            found.problems.append(
                ConfigProblem(
                    "importing Megatron-Core",
                    "a process that comes to its end",
                    f"{ending}: {_last_line(done.stderr)}",
                )
            )
            return
        findings: Findings = json.loads(file.read_text())
    found.targets = findings["targets"]
    _torch(found, findings["torch"])
    if _megatron(found, findings):
        _failures(found, findings)
    installed = found.versions["transformer-engine"]
    reason = findings["transformer_engine"]
    if installed and reason and not found.problems:  # else what it is for may be told already
        found.notices.append(
            f"Transformer Engine {installed} is installed, and Megatron-Core does not use it: "
            f"{_last_line(reason)}"
        )


def _torch(found: Diagnosis, torch: dict[str, Any]) -> None:
    if "reason" in torch:
        found.problems.append(
            ConfigProblem("torch", "to be importable", torch["reason"], "reinstall PyTorch")
        )
        return
    found.versions |= {"torch": torch["version"], "cuda": torch["cuda"]}
    found.gpus = torch["gpus"]
    if torch["cuda"] and not found.gpus:
        found.notices.append(
            f"PyTorch is built for CUDA {torch['cuda']} and finds no GPU (no driver, no device, or "
            "CUDA_VISIBLE_DEVICES)"
        )


def _megatron(found: Diagnosis, findings: Findings) -> bool:
    """Tell which Megatrons there are, and which is used; returns whether there is one."""
    version, core, training = findings["megatron"], findings["core"], findings["training"]
    copies = findings["copies"]
    versions = {copy["folder"]: copy["version"] for copy in copies}
    found.versions["megatron-core"] = version
    for copy in copies:
        kind = "checkout" if copy["checkout"] else "package"
        used = {"megatron.core": core, "megatron.training": training}
        names = [name for name, folder in used.items() if folder == copy["folder"]]
        use = f"{' and '.join(names)} from here" if names else "not used, another one comes first"
        found.megatron_folders.append(f"{copy['version']}, {kind} in {copy['folder']}: {use}")
    fix = f"pip install 'megatron-core{TESTED}'"
    if version is None and not copies:
        problem = ConfigProblem("Megatron-Core", f"a version {TESTED}", "none", fix)
        found.problems.append(problem)
        return False
    if version and not is_tested(version):
        if not _is_refused(version):
            found.notices.append(
                f"Megatron-Core {version} is not tested ({TESTED}), and taken, because "
                "STEP35_ALLOW_UNTESTED=1"
            )
        else:
            fix += ", look for a newer step35-patch, or set STEP35_ALLOW_UNTESTED=1"
            problem = ConfigProblem("Megatron-Core", f"a version {TESTED}", version, fix)
            found.problems.append(problem)
    if core in versions and training in versions and versions[core] != versions[training]:
        found.problems.append(
            ConfigProblem(
                "Megatron",
                "megatron.core and megatron.training of one version",
                f"{versions[core]} in {core} and {versions[training]} in {training}",
                "leave one of the two folders on the path",
            )
        )
    elif len(set(versions.values())) > 1:
        found.notices.append(
            f"Megatrons of different versions are on the path ({', '.join(versions.values())}): a "
            "process with another PYTHONPATH or working folder takes another one"
        )
    return True


def _is_refused(version: str | None) -> bool:
    tested = version is not None and is_tested(version)
    return not tested and os.environ.get("STEP35_ALLOW_UNTESTED") != "1"


def _failures(found: Diagnosis, findings: Findings) -> None:
    """Tell what could not be imported or wrapped, for other reasons than the version."""
    told: set[str] = set()
    for target in found.targets:
        module, state, failure = (
            target["module"],
            target["state"],
            findings["failures"].get(target["module"]),
        )
        if failure is None or failure["reason"] in told:
            continue
        told.add(failure["reason"])
        reason = _last_line(failure["reason"])
        if state == "missing":
            # Of a version that is refused, the states say enough.
            if target["required"] and not _is_refused(findings["megatron"]):
                version = f"Megatron-Core {findings['megatron']}"
                fix = f"pip install 'megatron-core{TESTED}', or look for a newer step35-patch"
                problem = ConfigProblem(module, "to be there", f"no such module in {version}", fix)
                found.problems.append(problem)
        elif state == "refused":
            if not _is_refused(findings["megatron"]):
                found.problems.append(_problem(reason.removeprefix("Step35ActivationError: ")))
        elif module.startswith(f"{BRIDGE}.") or (
            failure["missing"] and module.startswith("megatron.training.")
        ):
            extra = "bridge" if module.startswith(f"{BRIDGE}.") else "training"
            found.notices.append(
                f"{module} can't be imported: {reason}; pip install 'step35-patch[{extra}]'"
            )
        else:
            found.problems.append(ConfigProblem(module, "to be importable", reason))
