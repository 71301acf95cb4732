"""Puts the start-up files into site-packages; everything else is in setup.cfg.

They belong beside the package, where no setuptools option puts a file in wheels and in editable
installs alike.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# The names sort after `__editable__*.pth`, which makes an editable install's package importable.
STARTUP = [
    "startup/a1_step35_patch.pth",
    "startup/a1_step35_patch.start",
    "startup/step35_patch_startup.py",
    "startup/step35_patch_verl.py",
]


class BuildWithStartup(build_py):
    """build_py, and the start-up files at the wheel's top."""

    def run(self):
        super().run()
        # An editable wheel takes nothing from the build folder; what is not editable is put into
        # the folder that it is packed from, which `install` is told of.
        editable = self.editable_mode
        top = self.get_finalized_command("install").install_lib if editable else self.build_lib
        for file in STARTUP:
            self.copy_file(file, str(Path(top, Path(file).name)), preserve_mode=False)

    def get_source_files(self):
        return [*super().get_source_files(), *STARTUP]


setup(cmdclass={"build_py": BuildWithStartup})
