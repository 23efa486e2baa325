"""Which library serves, for what is built, what the processor has and what the environment asks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hnet_runtime.ops.native import binding, build, library
from hnet_runtime.ops.native.binding import NativeError

OLD = frozenset({"sse2", "avx"})
HASWELL = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ICELAKE = SKYLAKE | {"avx512_vnni"}
SAPPHIRE = ICELAKE | {"amx_tile", "amx_bf16", "amx_int8"}
ALL = ("amx", "avx512", "avx2", "portable")


@dataclass(frozen=True)
class Calls:
    """A pretended library's."""

    name: str
    usable: int

    def hnet_usable(self) -> int:
        return self.usable


@dataclass
class Machine:
    """A pretended machine: a processor, a folder of built libraries, and what was loaded from it."""

    patch: pytest.MonkeyPatch
    folder: Path
    loaded: list[str] = field(default_factory=list)
    refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.patch.setattr(build, "LIBRARIES", self.folder)
        self.patch.setattr(binding, "load", self._load)
        self.patch.setattr(build, "is_current", lambda isa, path: True)
        self.ask()
        self.processor(SAPPHIRE)
        library._warn_once.cache_clear()

    def _load(self, path: Path) -> Calls:
        self.loaded.append(path.name)
        return Calls(path.name, usable=path.name not in self.refused)

    def processor(self, flags: frozenset[str], family: str = "x86_64") -> None:
        self.patch.setattr(library, "_cpu_flags", lambda: flags)
        self.patch.setattr(library.platform, "machine", lambda: family)

    def built(self, *isas: str) -> None:
        for isa in isas:
            (self.folder / f"libhnet_{isa}.so").touch()

    def ask(self, choice: str = "", path: Path | str = "") -> None:
        self.patch.setenv("HNET_NATIVE", choice)
        self.patch.setenv("HNET_NATIVE_LIBRARY", str(path))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize("choice", ["", "auto", " AUTO "])
@pytest.mark.parametrize(
    ("flags", "isa"), [(SAPPHIRE, "amx"), (ICELAKE, "avx512"), (SKYLAKE, "avx2"), (HASWELL, "avx2"), (OLD, "portable")]
)
def test_the_best_library_that_the_processor_runs_is_opened(
    machine: Machine, choice: str, flags: frozenset[str], isa: str
):
    machine.built(*ALL)
    machine.processor(flags)
    machine.ask(choice)
    opened = library.open_library()
    assert opened is not None
    assert (opened.isa, opened.path) == (isa, machine.folder / f"libhnet_{isa}.so")
    assert opened.calls == Calls(f"libhnet_{isa}.so", usable=True)
    assert machine.loaded == [f"libhnet_{isa}.so"]


def test_on_arm_the_portable_library_serves(machine: Machine):
    machine.built(*ALL)
    machine.processor(ICELAKE, family="aarch64")
    opened = library.open_library()
    assert opened is not None
    assert opened.isa == "portable"
    assert library.available()[0] == ("amx", None, False, "not for a aarch64 processor")


def test_registers_that_the_system_refuses_leave_the_next_best_library(
    machine: Machine, caplog: pytest.LogCaptureFixture
):
    machine.built(*ALL)
    machine.refused = ("libhnet_amx.so",)
    opened = library.open_library()
    assert opened is not None
    assert opened.isa == "avx512"
    assert "libhnet_amx.so: the system refuses this process the registers that it needs" in caplog.text
    assert [candidate.runnable for candidate in library.available()] == [False, True, True, True]
    machine.ask("amx")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE=amx: the system refuses"):
        library.open_library()


@pytest.mark.parametrize("isa", ALL)
def test_a_library_asked_for_by_name_is_that_one(machine: Machine, isa: str):
    machine.built(*ALL)
    machine.ask(isa)
    opened = library.open_library()
    assert opened is not None
    assert opened.isa == isa


def test_a_library_asked_for_that_is_not_built_is_an_error(machine: Machine):
    machine.built("portable")
    machine.ask("avx2")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE=avx2: not built$"):
        library.open_library()


def test_a_library_asked_for_that_the_processor_cannot_run_is_an_error_naming_what_it_lacks(machine: Machine):
    machine.built(*ALL)
    machine.processor(SKYLAKE)
    machine.ask("avx512")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE=avx512: this processor lacks avx512_vnni$"):
        library.open_library()
    assert machine.loaded == []


def test_a_choice_that_there_is_not_is_an_error_naming_the_choices(machine: Machine):
    machine.ask("sse9")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE=sse9: must be auto, amx, avx512, avx2, portable or off$"):
        library.open_library()


def test_off_opens_nothing_and_says_nothing(machine: Machine, caplog: pytest.LogCaptureFixture):
    machine.built(*ALL)
    machine.ask("off", machine.folder / "libhnet_avx2.so")
    assert library.open_library() is None
    assert (machine.loaded, caplog.records) == ([], [])


def test_where_nothing_is_built_one_warning_says_how_to_build(machine: Machine, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert library.open_library() is None
        assert library.open_library() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("native kernels are not built, so the slower torch path serves; ")
    assert "make native" in record.getMessage()


def test_a_library_older_than_its_sources_serves_with_a_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    machine.built("portable")
    monkeypatch.setattr(build, "is_current", lambda isa, path: False)
    opened = library.open_library()
    assert opened is not None
    assert "libhnet_portable.so: older than its sources" in caplog.text


def test_what_is_available_says_of_each_why_not(machine: Machine):
    machine.built("avx512", "portable")
    machine.processor(OLD)
    missing = "this processor lacks abm, avx2, bmi1, bmi2, f16c, fma, movbe"
    amx, avx512, avx2, portable = library.available()
    assert amx.reason.startswith("not built, and this processor lacks abm, amx_bf16")
    assert (avx512.path, avx512.runnable) == (machine.folder / "libhnet_avx512.so", False)
    assert avx512.reason.startswith("this processor lacks abm, avx2, avx512_vnni")
    assert avx2 == ("avx2", None, False, f"not built, and {missing}")
    assert portable == ("portable", machine.folder / "libhnet_portable.so", True, "")


def test_a_library_named_by_its_path_goes_before_all_that_is_built(machine: Machine, tmp_path: Path):
    machine.built(*ALL)
    path = tmp_path / "elsewhere" / "libhnet_avx2.so"
    path.parent.mkdir()
    path.touch()
    machine.ask("portable", path)
    opened = library.open_library()
    assert opened is not None
    assert (opened.isa, opened.path) == ("avx2", path)
    assert [(candidate.isa, candidate.runnable) for candidate in library.available()] == [
        ("avx2", True),
        ("amx", False),
        ("avx512", False),
        ("portable", False),
    ]


def test_a_path_without_a_library_or_without_a_processor_for_it_is_an_error(machine: Machine, tmp_path: Path):
    machine.ask("", tmp_path / "libhnet_gone.so")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE_LIBRARY=.*libhnet_gone.so: no such file$"):
        library.open_library()
    machine.built("avx512")
    machine.processor(HASWELL)
    machine.ask("", tmp_path / "libhnet_avx512.so")
    with pytest.raises(NativeError, match=r"^HNET_NATIVE_LIBRARY=.*: this processor lacks avx512_vnni, avx512bw"):
        library.open_library()


def test_a_file_that_is_no_library_is_an_error_that_shows_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    monkeypatch.setenv("HNET_NATIVE", "portable")
    monkeypatch.setenv("HNET_NATIVE_LIBRARY", "")
    (tmp_path / "libhnet_portable.so").write_text("nothing")
    with pytest.raises(NativeError, match=r"libhnet_portable.so: not a native library .*HNET_NATIVE=off"):
        library.open_library()


def test_this_machine_opens_its_best_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HNET_NATIVE", "")
    monkeypatch.setenv("HNET_NATIVE_LIBRARY", "")
    runnable = [candidate for candidate in library.available() if candidate.runnable]
    if not runnable:
        pytest.skip("no native library is built here")
    opened = library.open_library()
    assert opened is not None
    assert (opened.isa, opened.path) == runnable[0][:2]
    assert opened.calls.hnet_interface() == binding.INTERFACE
