"""What setup.cfg cannot say: requirements from their table, and configs and tools for mim."""

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# openmim looks into cae_mm/.mim. onedl-mim 0.5 looks into the first folder of the sorted list of
# installed files, so it gets one whose name comes before that of cae_mm-<version>.dist-info.
MIM_FOLDERS = ('cae_mm/.mim', 'cae_mm+mim')


class BuildPyWithMim(build_py):
    """Copies what mim needs to the build directory of a wheel.

    An editable install needs no copy: there onedl-mim looks into the project root itself.
    """

    def run(self) -> None:
        """Builds the package, then adds the folders for mim."""
        super().run()
        if self.editable_mode:
            return
        for name in MIM_FOLDERS:
            mim = Path(self.build_lib, name)
            shutil.rmtree(mim, ignore_errors=True)
            for folder in ('configs', 'tools'):
                ignore = shutil.ignore_patterns('__pycache__')
                shutil.copytree(folder, mim / folder, ignore=ignore)
            shutil.copy2('model-index.yml', mim)


# By path, as pip builds where there is no cae_mm to import.
tables = runpy.run_path('cae_mm/dependencies.py')
setup(
    cmdclass={'build_py': BuildPyWithMim},
    install_requires=tables['INSTALL_REQUIRES'],
    extras_require=tables['EXTRAS_REQUIRE'],
)
