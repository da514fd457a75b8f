"""What is known of a device before one is there: sizes and costs, each with how it is known and where from.

Owns `DeviceProfile`, its files (TOML, shipped in `profiles/`, written by `brim doctor --calibrate`) and the costs that every plan
predicts with, a start's own included. Torch-free.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from brim.errors import ConfigError
from brim.formats.cache_folder import cache_folder
from brim.units import MIB, parse_bytes

Known = Literal["computed", "measured", "predicted"]
_KNOWN: tuple[Known, ...] = ("computed", "measured", "predicted")
_SHIPPED = Path(__file__).with_name("profiles")
HOST_PREFIX = "cpu:"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a profile, how it is known, and where it comes from in one sentence."""

    value: int
    known_by: Known
    source: str


# What a plan falls back to where a profile says nothing. Measured on one H100 (docs/memory.md) and one 2-core host.
_H100 = "measured on an H100, rounded up"
_HOST = "measured on a 2-core x86-64 host, rounded up"
DEFAULTS: Mapping[str, Figure] = {
    "total_bytes": Figure(0, "computed", "as given"),
    "outside_bytes": Figure(0, "predicted", "nothing else runs there"),
    "context_bytes": Figure(640 * MIB, "predicted", "measured on an H100: 518 to 621 MiB"),
    "library_bytes": Figure(190 * MIB, "predicted", _H100),
    "rounding_bytes": Figure(
        32 * MIB, "predicted", "measured on an H100: 0 to 20 after loading, 1 to 3 in warm, 2 an allocation"
    ),
    "graph_fixed_bytes": Figure(4 * MIB, "predicted", _H100),
    "graph_whole_layer_bytes": Figure(32 << 10, "predicted", _H100),
    "graph_whole_bytes": Figure(128 << 10, "predicted", _H100),
    "graph_piece_bytes": Figure(144 << 10, "predicted", _H100),
    "starting_bytes": Figure(16 * MIB, "predicted", _HOST),
    "num_cores": Figure(1, "predicted", "one"),
    "granularity_bytes": Figure(2 * MIB, "predicted", "huge pages, or a handle of the driver's"),
}


@dataclass(frozen=True, slots=True)
class StartCosts:
    """What a start takes that no arithmetic knows, in bytes. The names are those of a profile's figures.

    rounding: kernel images loaded while warming, and the allocator's rounding. graph_whole: of one step captured whole, and
    graph_whole_layer for each of its layers; graph_piece: of what lies between two attention calls. starting: what loading and
    the first steps leave in host memory.
    """

    figures: Mapping[str, Figure] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """The figure's value: the profile's own, or the default."""
        return self.figure(name).value

    def figure(self, name: str) -> Figure:
        """The figure with how it is known."""
        return self.figures.get(name, DEFAULTS[name])

    def graph_bytes(self, num_whole: int, num_pieces: int, num_layers: int) -> int:
        """What graphs take: num_whole steps captured whole, num_pieces pieces.

        Example, the defaults: 35 whole steps of 32 layers and 8 sizes of 33 pieces: 4 + 35 * 1.125 + 264 * 0.14 = 80.5 MiB.
        """
        if not num_whole + num_pieces:
            return 0
        whole_bytes = self.of("graph_whole_bytes") + num_layers * self.of("graph_whole_layer_bytes")
        return self.of("graph_fixed_bytes") + num_whole * whole_bytes + num_pieces * self.of("graph_piece_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device as plans see it. host_memory: device memory is the host's. devices: names by which the device is recognised.

    kernels: the backend that runs there (native, triton, torch). dtypes: computed natively, best first.
    """

    name: str
    description: str
    host_memory: bool
    kernels: str
    dtypes: tuple[str, ...]
    figures: Mapping[str, Figure]
    devices: tuple[str, ...] = ()
    virtual_memory: bool = True
    graphs: bool = True

    @property
    def costs(self) -> StartCosts:
        """The costs a start is planned with."""
        return StartCosts(self.figures)

    @property
    def is_measured(self) -> bool:
        """Every figure that decides a plan's size was measured on the device."""
        decisive = ("context_bytes", "library_bytes") if not self.host_memory else ("context_bytes",)
        return all(self.costs.figure(name).known_by == "measured" for name in decisive)

    def to_toml(self) -> str:
        """As `read_profile` reads it."""
        devices = ", ".join(_quoted(text) for text in self.devices)
        dtypes = ", ".join(_quoted(text) for text in self.dtypes)
        lines = [
            f"name = {_quoted(self.name)}",
            f"description = {_quoted(self.description)}",
            f"devices = [{devices}]",
            f"host_memory = {str(self.host_memory).lower()}",
            f"virtual_memory = {str(self.virtual_memory).lower()}",
            f"graphs = {str(self.graphs).lower()}",
            f"kernels = {_quoted(self.kernels)}",
            f"dtypes = [{dtypes}]",
        ]
        for name, figure in self.figures.items():
            lines += ["", f"[figures.{name}]", f"value = {figure.value}", f"known_by = {_quoted(figure.known_by)}"]
            lines.append(f"source = {_quoted(figure.source)}")
        return "\n".join(lines) + "\n"


def read_profile(path: Path) -> DeviceProfile:
    """The profile in a file. Raises ConfigError that names the file and what is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The device profile {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The device profile {path} is not valid TOML: {error}.") from error
    try:
        figures = {name: _figure(name, entry) for name, entry in data.get("figures", {}).items()}
        profile = DeviceProfile(
            name=str(data["name"]),
            description=str(data["description"]),
            host_memory=bool(data["host_memory"]),
            kernels=str(data["kernels"]),
            dtypes=tuple(str(text) for text in data["dtypes"]),
            figures=figures,
            devices=tuple(str(text) for text in data.get("devices", ())),
            virtual_memory=bool(data.get("virtual_memory", True)),
            graphs=bool(data.get("graphs", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"The device profile {path} is not complete: {error}; brim doctor --calibrate writes one.") from error
    if not profile.costs.of("total_bytes"):
        raise ConfigError(f"The device profile {path} has no [figures.total_bytes]; brim doctor --calibrate writes one.")
    return profile


def find_profile(name: str) -> DeviceProfile:
    """By name (`h100-80g`), as `cpu:16GiB`, or the file of that path. Raises ConfigError that lists what there is."""
    if name.startswith(HOST_PREFIX):
        return _host(name)
    known: dict[str, DeviceProfile] = {}
    for profile in known_profiles():
        known.setdefault(profile.name, profile)
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.suffix == ".toml" or path.is_file():
        return read_profile(path)
    raise ConfigError(
        f"--device {name[:80]} is no device that plans know; there are this, cpu:SIZE, {', '.join(sorted(known))}, or "
        "the file of a profile (brim doctor --calibrate FILE writes one)."
    )


def known_profiles() -> Iterator[DeviceProfile]:
    """Those calibrated on this machine first, then those shipped; a file that cannot be read is left out."""
    for folder in (calibrated_folder(), _SHIPPED):
        for path in sorted(folder.glob("*.toml")):
            try:
                yield read_profile(path)
            except ConfigError:
                continue


def profile_of(device: str) -> DeviceProfile | None:
    """The profile of a device by the name it gives itself; None where there is none."""
    return next((profile for profile in known_profiles() if device in profile.devices), None)


def usual_costs(*, host_memory: bool) -> StartCosts:
    """For a device that no profile knows by name."""
    if not host_memory:
        return StartCosts()
    return next((profile.costs for profile in known_profiles() if profile.host_memory), StartCosts())


def calibrated_folder() -> Path:
    """Where `brim doctor --calibrate` keeps this machine's profile."""
    return cache_folder() / "profiles"


def _host(name: str) -> DeviceProfile:
    """A host with so much memory: this machine's own figures where it was calibrated, else the shipped ones."""
    try:
        total_bytes = parse_bytes(name.removeprefix(HOST_PREFIX))
    except ConfigError as error:
        raise ConfigError(f"--device {name}: {error}") from None
    base = next(profile for profile in known_profiles() if profile.host_memory)
    given = Figure(total_bytes, "computed", f"as given: {name}")
    return replace(
        base,
        name=name,
        description=f"a host with {name.removeprefix(HOST_PREFIX)}",
        figures={**base.figures, "total_bytes": given},
    )


def _figure(name: str, entry: Mapping[str, Any]) -> Figure:
    if name not in DEFAULTS:
        raise ValueError(f"'{name}' is no figure of a profile")
    value, known_by = entry["value"], entry["known_by"]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"[figures.{name}] has the value {value!r}, not a whole number of bytes")
    if known_by not in _KNOWN:
        raise ValueError(f"[figures.{name}] is known by {known_by!r}, not by one of {', '.join(_KNOWN)}")
    return Figure(value, known_by, str(entry["source"]))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
