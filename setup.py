"""Adds the native kernels to the build; everything else stands in pyproject.toml.

A wheel holds one library for each instruction set of its platform, for any Python 3. Where no C++ compiler is found
it is a pure wheel, and the torch path serves.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

NATIVE = Path("hnet_runtime") / "ops" / "native"


def load_native_build():
    """build.py alone: importing the package would ask for what is installed only later."""
    spec = importlib.util.spec_from_file_location("hnet_native_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native_build = load_native_build()


def has_compiler() -> bool:
    try:
        native_build.find_compiler()
    except native_build.NoCompiler:
        return False
    return True


class BuildNative(Command):
    """Compiles into the build folder, or beside the sources for an editable install."""

    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        print(native_build.build(self._folder() / "lib"), flush=True)

    def _folder(self) -> Path:
        return NATIVE if self.editable_mode else Path(self.build_lib) / NATIVE

    def get_source_files(self):
        return [str(NATIVE / path.name) for path in native_build.source_files()]

    def get_outputs(self):
        return [str(Path(self.build_lib) / NATIVE / "lib" / path.name) for path in self._made()]

    def get_output_mapping(self):
        return dict(zip(self.get_outputs(), map(str, self._made()), strict=True)) if self.editable_mode else {}

    def _made(self):
        return sorted((self._folder() / "lib").glob("libhnet_*"))


class NativeDistribution(Distribution):
    """A wheel with compiled parts goes where platform's libraries go, unless nothing can be compiled."""

    def has_ext_modules(self):
        return has_compiler()


class NativeWheel(bdist_wheel):
    """The libraries do not know Python: one wheel of a platform serves every version."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(distclass=NativeDistribution, cmdclass={"build_native": BuildNative, "bdist_wheel": NativeWheel})
