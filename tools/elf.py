"""What the dynamic linker sees of a 64-bit little-endian ELF shared library. Standard library only."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

SHT_DYNAMIC, SHT_DYNSYM, SHT_VERNEED, SHT_VERSYM = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF
DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29
SHN_UNDEF = 0
BIND_GLOBAL, BIND_WEAK, BIND_UNIQUE = 1, 2, 10


@dataclass(frozen=True)
class Symbol:
    name: str
    version: str | None  # "GLIBC_2.14" for an undefined symbol bound to a versioned library, else None
    weak: bool


@dataclass(frozen=True)
class SharedLibrary:
    path: Path
    needed: list[str]
    run_paths: list[str]
    undefined: list[Symbol]
    exported: list[str]


@dataclass(frozen=True)
class _Section:
    type: int
    link: int
    info: int
    data: bytes


def read(path: Path) -> SharedLibrary:
    """Parses `path`; raises ValueError when it is not a 64-bit little-endian ELF file."""
    image = Path(path).read_bytes()
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path}: not a 64-bit little-endian ELF file")
    sections = _sections(image)
    by_type = {section.type: section for section in sections}
    dynsym, dynamic = by_type[SHT_DYNSYM], by_type[SHT_DYNAMIC]
    strings = sections[dynsym.link].data

    entries = list(struct.iter_unpack("<qQ", dynamic.data))
    versions = _needed_versions(by_type.get(SHT_VERNEED), strings)
    versym = by_type.get(SHT_VERSYM)
    version_ids = [v for (v,) in struct.iter_unpack("<H", versym.data)] if versym else []

    undefined, exported = [], []
    for index, (name, info, _other, shndx, _value, _size) in enumerate(struct.iter_unpack("<IBBHQQ", dynsym.data)):
        text, binding = _string(strings, name), info >> 4
        if not text or binding not in (BIND_GLOBAL, BIND_WEAK, BIND_UNIQUE):
            continue
        if shndx == SHN_UNDEF:
            version = versions.get(version_ids[index] & 0x7FFF) if version_ids else None
            undefined.append(Symbol(text, version, binding == BIND_WEAK))
        else:
            exported.append(text)
    return SharedLibrary(
        path=Path(path),
        needed=[_string(strings, value) for tag, value in entries if tag == DT_NEEDED],
        run_paths=[_string(strings, value) for tag, value in entries if tag in (DT_RPATH, DT_RUNPATH)],
        undefined=undefined,
        exported=exported,
    )


def _sections(image: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    found = []
    for at in range(table, table + size * count, size):
        _name, kind, _flags, _addr, offset, length, link, info = struct.unpack_from("<IIQQQQII", image, at)
        found.append(_Section(kind, link, info, image[offset : offset + length]))
    return found


def _needed_versions(section: _Section | None, strings: bytes) -> dict[int, str]:
    """Version index -> name, from the chain of (library, versions wanted of it) records."""
    names: dict[int, str] = {}
    at = 0
    for _ in range(section.info if section else 0):
        _version, count, _file, aux, following = struct.unpack_from("<HHIII", section.data, at)
        aux += at
        for _ in range(count):
            _hash, _flags, index, name, next_aux = struct.unpack_from("<IHHII", section.data, aux)
            names[index] = _string(strings, name)
            aux += next_aux
        at += following
    return names


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
