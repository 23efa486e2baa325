"""What is compiled when, by which compiler, and what a wheel holds."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hnet_runtime.ops.native import binding, build

ROOT = Path(__file__).parents[2]
EVERY_ISA = ("amx", "avx512", "avx2", "portable")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Says what it is, complains where it is told to, else writes a file; keeps a list of its calls.
PRETENDER = """
import sys
from pathlib import Path
if "--version" in sys.argv:
    print(Path(__file__).with_name("version").read_text())
    sys.exit()
with open(Path(__file__).with_name("calls"), "a") as calls:
    print(*sys.argv[1:], file=calls)
if "-march=x86-64-v4" in sys.argv and Path(__file__).with_name("old").exists():
    print("cc1plus: note: this is an old one\\ncc1plus: error: unknown -march", file=sys.stderr)
    sys.exit(1)
Path(sys.argv[sys.argv.index("-o") + 1]).write_text("a library")
"""


class Workshop:
    """A folder with sources of its own and a pretended compiler that takes no time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sources, self.libraries = folder, folder / "sources", folder / "libraries"
        self.sources.mkdir()
        for path in build.source_files():
            shutil.copy(path, self.sources)
        (folder / "compiler.py").write_text(PRETENDER)
        self.install_compiler("pretender 1.0")

    def install_compiler(self, version: str) -> None:
        (self.folder / "version").write_text(version)

    def build(self, machine: str = "x86_64") -> build.Built:
        environ = {**os.environ, "CXX": f"'{sys.executable}' '{self.folder / 'compiler.py'}'"}
        return build.build(self.libraries, sources=self.sources, environ=environ, machine=machine)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_each_instruction_set_is_compiled_with_its_own_flags(workshop: Workshop):
    assert workshop.build().compiled == EVERY_ISA
    counts = {flag: sum(flag in call for call in workshop.calls()) for flag in ("-mamx", "-v4", "-v3", "-march")}
    assert counts == {"-mamx": 1, "-v4": 2, "-v3": 1, "-march": 3}
    assert all("-ffp-contract=off" in call and "-ffast-math" not in call for call in workshop.calls())


def test_what_is_up_to_date_is_not_compiled_again(workshop: Workshop):
    workshop.build()
    again = workshop.build()
    assert (again.compiled, again.kept) == ((), EVERY_ISA)
    assert len(workshop.calls()) == len(EVERY_ISA)


@pytest.mark.parametrize("name", ["interface.cpp", "vec.h"])
def test_a_changed_source_makes_every_library_old(workshop: Workshop, name: str):
    workshop.build()
    library = workshop.libraries / "libhnet_portable.so"
    assert build.is_current(build.PORTABLE, library, workshop.sources)
    with (workshop.sources / name).open("a") as source:
        source.write("// changed\n")
    assert not build.is_current(build.PORTABLE, library, workshop.sources)
    assert workshop.build().compiled == EVERY_ISA
    assert build.is_current(build.PORTABLE, library, workshop.sources)


def test_another_compiler_compiles_again(workshop: Workshop):
    workshop.build()
    workshop.install_compiler("pretender 2.0")
    assert workshop.build().compiled == EVERY_ISA


def test_a_lost_library_is_compiled_again(workshop: Workshop):
    workshop.build()
    (workshop.libraries / "libhnet_avx2.so").unlink()
    built = workshop.build()
    assert (built.compiled, built.kept) == (("avx2",), ("amx", "avx512", "portable"))


def test_off_x86_only_the_portable_library_is_built(workshop: Workshop):
    assert workshop.build(machine="aarch64").compiled == ("portable",)
    assert not any("-march" in call for call in workshop.calls())


def test_a_compiler_too_old_for_one_instruction_set_builds_the_others(workshop: Workshop):
    (workshop.folder / "old").touch()
    built = workshop.build()
    assert built.compiled == ("avx2", "portable")
    assert "avx512 failed: cc1plus: error: unknown -march" in str(built)
    assert "\n" not in str(built)
    assert sorted(path.name for path in workshop.libraries.glob("*.so")) == ["libhnet_avx2.so", "libhnet_portable.so"]


def test_without_a_compiler_the_build_goes_on_and_says_so_in_one_line(tmp_path: Path):
    built = build.build(tmp_path / "lib", environ={"PATH": str(tmp_path)})
    assert str(built) == (
        "native kernels: no C++ compiler (g++, clang++, c++) is found; "
        "none is built, so the slower torch path will serve"
    )
    assert not (tmp_path / "lib").exists()


def test_a_cxx_that_is_no_compiler_is_named(tmp_path: Path):
    with pytest.raises(build.NoCompiler, match=r"CXX=absent is no C\+\+ compiler"):
        build.find_compiler({"PATH": str(tmp_path), "CXX": "absent"})


def _compile(compiler: str, isa: build.Isa, folder: Path) -> Path:
    """One library by a compiler of this machine, or the reason to skip."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    found = build.find_compiler({**os.environ, "CXX": f"{compiler} -Werror"})
    library = folder / isa.file_name
    assert build.compile_library(found, isa, library, build.SOURCES, sanitized=False) == ""
    return library


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("isa", build.isas_of(platform.machine()), ids=lambda isa: isa.name)
def test_each_compiler_makes_a_library_without_a_warning(compiler: str, isa: build.Isa, tmp_path: Path):
    library = _compile(compiler, isa, tmp_path)
    assert binding.load(library).hnet_interface() == binding.INTERFACE


# A product of each kind of matrix by the C interface alone; prints every number it gets, exactly.
NUMBERS = r"""
#include <cstdio>
#include "interface.cpp"

int main() {
  constexpr int64_t N = 40, K = 37, ROWS = 5, BLOCKS = (N + LANES - 1) / LANES, LDY = BLOCKS * LANES;
  uint32_t seed = 1;
  const auto next = [&] { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 24) - 128; };
  for (int64_t kind = 0; kind < 3; kind++) {
    const int64_t depth = words_of(kind, K);
    std::vector<uint32_t> words(BLOCKS * depth * LANES);
    for (int64_t n = 0; n < N; n++)
      for (int64_t i = 0; i < depth; i++) {
        uint32_t& word = words[(n / LANES * depth + i) * LANES + n % LANES];
        const float wide = static_cast<float>(next()) / 93.0f;
        if (kind == FLOAT32) std::memcpy(&word, &wide, 4);
        if (kind == BFLOAT16) word = to_bf16(wide) | static_cast<uint32_t>(to_bf16(1.3f - wide)) << 16;
        if (kind == INT8) word = static_cast<uint32_t>(next()) * 0x01030507u;
      }
    std::vector<float> x(ROWS * K), y(ROWS * LDY), scale(N, 0.013f), bias(N, 0.7f);
    std::vector<int32_t> sums(N);
    for (float& value : x) value = static_cast<float>(next()) / 47.0f;
    for (int32_t& sum : sums) sum = next();
    const Matrix matrix{kind, N, K, words.data(), bias.data(), scale.data(), sums.data()};
    hnet_product(&matrix, x.data(), K, ROWS, y.data(), LDY, 0, 1);
    for (int64_t r = 0; r < ROWS; r++)
      for (int64_t n = 0; n < N; n++) std::printf("%a\n", static_cast<double>(y[r * LDY + n]));
  }
}
"""


@pytest.fixture
def numbers_of(tmp_path: Path) -> Callable[..., list[float]]:
    """The numbers of that program, compiled and run by other programs."""

    def run(compiler: str, *runner: str) -> list[float]:
        source, program = tmp_path / "numbers.cpp", tmp_path / f"numbers-{compiler}"
        source.write_text(NUMBERS)
        flags = [flag for flag in build.flags(build.PORTABLE) if flag not in ("-shared", "-fPIC")]
        subprocess.run([compiler, *flags, "-static", f"-I{build.SOURCES}", source, "-o", program], check=True)
        said = subprocess.run([*runner, program], capture_output=True, text=True, check=True).stdout
        return [float.fromhex(line) for line in said.split()]

    return run


@pytest.mark.slow
def test_the_portable_library_compiles_for_arm(tmp_path: Path):
    library = _compile("aarch64-linux-gnu-g++", build.PORTABLE, tmp_path)
    assert library.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64
    with pytest.raises(OSError, match="libhnet_portable"):
        ctypes.CDLL(str(library))


@pytest.mark.slow
def test_arm_computes_the_numbers_of_the_portable_library(numbers_of: Callable[..., list[float]]):
    if not X86:
        pytest.skip("this is for an x86-64 machine that has an Arm compiler beside its own")
    for tool in ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    here, there = numbers_of("g++"), numbers_of("aarch64-linux-gnu-g++", "qemu-aarch64")
    assert len(set(here)) > 500
    assert there == pytest.approx(here, rel=1e-5, abs=1e-5)


# ── wheels ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads, in a folder of its own and without anything built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("hnet_runtime", "server", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return folder


def _python(*arguments: str | Path, folder: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "HNET_NATIVE": "auto", "HNET_NATIVE_LIBRARY": "", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(checkout: Path, folder: Path, **environ: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    _python("-m", "pip", "wheel", *options, "--wheel-dir", folder, ".", folder=checkout, **environ)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_serves_every_python_of_its_platform_and_its_libraries_load(checkout: Path, tmp_path: Path):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    wheel = _wheel(checkout, tmp_path, CXX="g++")
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-")
    assert tag.endswith(platform.machine().lower())
    names = zipfile.ZipFile(wheel).namelist()
    native = "hnet_runtime/ops/native"
    built = [name for name in names if name.endswith(".so")]
    assert sorted(built) == sorted(f"{native}/lib/{isa.file_name}" for isa in build.isas_of(platform.machine()))
    assert f"{native}/interface.cpp" in names
    assert not any(name.endswith("setup.py") for name in names)

    target = tmp_path / "installed"
    options = ["--no-deps", "--no-index", "--quiet", "--target", target]
    _python("-m", "pip", "install", *options, wheel, folder=tmp_path)
    program = (
        "from hnet_runtime.ops.native.library import available, open_library\n"
        "library = open_library()\n"
        "print(library.path, library.calls.hnet_interface())\n"
        "print([candidate.reason for candidate in available() if candidate.path and candidate.runnable])\n"
    )
    first, second = _python("-c", program, folder=tmp_path, PYTHONPATH=str(target)).splitlines()
    path, interface = first.rsplit(" ", 1)
    assert Path(path).parent == target / native / "lib"
    assert int(interface) == binding.INTERFACE
    assert set(eval(second)) == {""}  # made from the very sources beside it


@pytest.mark.slow
def test_an_editable_build_compiles_in_place_and_a_source_archive_holds_sources_only(checkout: Path, tmp_path: Path):
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    hook = "import sys; from setuptools import build_meta as hooks; print(getattr(hooks, sys.argv[1])(sys.argv[2]))"
    said = _python("-c", hook, "build_editable", tmp_path, folder=checkout, CXX="g++")
    libraries = checkout / "hnet_runtime/ops/native/lib"
    built = [isa.file_name for isa in build.isas_of(platform.machine())]
    assert sorted(path.name for path in libraries.glob("*.so")) == sorted(built)
    assert said.count("native kernels: compiled ") == 1

    _python("-c", hook, "build_sdist", tmp_path, folder=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "archive", filter="data")
    packed = {path.name for path in (tmp_path / "archive").rglob("*")}
    assert {"setup.py", "build.py", *(path.name for path in build.source_files())} <= packed
    assert not [name for name in packed if name.endswith((".so", ".stamp"))]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_for_any_platform(checkout: Path, tmp_path: Path):
    wheel = _wheel(checkout, tmp_path, CXX="absent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
