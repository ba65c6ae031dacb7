"""The one thing that pyproject.toml cannot say: the C++ kernels, which are built if they can be and left out if they cannot."""

import importlib.util
import pathlib
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = pathlib.Path(__file__).parent / "kernels" / "qjax_kernels" / "cpu"


def builder():
    """kernels/qjax_kernels/cpu/build.py, without the packages around it, which need what is not installed yet."""
    spec = importlib.util.spec_from_file_location("qjax_cpu_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Builds a plain shared library, which is loaded by ctypes and does not know Python."""

    def get_ext_filename(self, fullname):
        return str(pathlib.Path(*fullname.split(".")[:-1]) / builder().LIBRARY)

    def build_extension(self, ext):
        tools = builder()
        try:
            tools.build(pathlib.Path(self.get_ext_fullpath(ext.name)).parent)
        except tools.BuildError as error:
            print(f"qjax: the C++ kernels are left out, products run in plain XLA on CPUs: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """An editable install: the library belongs beside its sources."""
        for ext in self.extensions:
            built = pathlib.Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                self.copy_file(str(built), str(FOLDER / built.name))

    def get_outputs(self):
        """Of what was built: nothing is promised."""
        return [path for path in super().get_outputs() if pathlib.Path(path).exists()]

    def get_output_mapping(self):
        """The same for editable installs."""
        return {built: source for built, source in super().get_output_mapping().items() if pathlib.Path(built).exists()}


sources = sorted(str(path.relative_to(FOLDER.parents[2])) for path in (FOLDER / "src").iterdir())
setup(ext_modules=[Extension("qjax_kernels.cpu.libqjax_cpu", sources=sources, optional=True)], cmdclass={"build_ext": BuildKernels})
