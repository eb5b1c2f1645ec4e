"""The zip archives that `torch.save` writes: members stored as they are, in one folder, one after another.

An archive is read by several programs that may disagree about what is in it. So anything that torch.save does not
write, and that would let two of them see different members, is refused: compression, encryption, a second member of
one name, members that overlap, bytes before the archive or after it.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MEMBERS = 100_000  # a full checkpoint with optimiser states has about 6,000
DIRECTORY_LIMIT = 8 * 2**20  # bytes of the table at the archive's end
END, END64, LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
TINY, HUGE = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit record instead"
LOCAL = b"PK\x03\x04"
ENCRYPTED, UTF8 = 1, 0x800  # bits of a member's flags


@dataclass(frozen=True)
class Member:
    """One stored file: `size` bytes at `begin` of the archive."""

    begin: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """The members by their names below the archive's one folder."""

    path: Path
    members: dict[str, Member]

    def read(self, name: str, limit: int) -> bytes:
        """The content of a member; ValueError when it is absent, longer than `limit` or damaged."""
        member = self.members.get(name)
        if member is None:
            raise ValueError(f"{self.path} is a zip archive without {name!r}, so torch.save did not write it")
        if member.size > limit:
            raise _refused(self.path, f"its {name!r} has {member.size} bytes; at most {limit} are read")
        with open(self.path, "rb") as file:
            file.seek(member.begin)
            content = file.read(member.size)
        if zlib.crc32(content) != member.crc:
            raise ValueError(f"{self.path} is damaged: the checksum of its {name!r} is wrong; fetch or save it again")
        return content


def read_archive(path: Path) -> Archive:
    """The members of an archive of torch.save; ValueError when it is cut short or not of that kind."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start, rows = _directory(path, file, size)
        if rows > MEMBERS:
            raise _refused(path, f"it has {rows} members; at most {MEMBERS} are read")
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise _damaged(path, str(error)) from None
        if len(infos) != rows:
            raise _damaged(path, f"it lists {len(infos)} members and says {rows}")
        spans = [_span(path, file, info) for info in infos]
    position = 0
    for (header, _, end), info in sorted(zip(spans, infos, strict=True), key=lambda pair: pair[0]):
        if header < position or end > start:
            raise _refused(path, f"its member {info.filename!r:.200} overlaps another part of the archive")
        if position == 0 and header != 0:
            raise _refused(path, "something lies before the archive")
        position = end
    members: dict[str, Member] = {}
    lower: set[str] = set()  # some readers of archives do not tell A from a
    for info, (_, begin, end) in zip(infos, spans, strict=True):
        folder, _, name = info.filename.partition("/")
        if not name or name.lower() in lower or folder != infos[0].filename.partition("/")[0]:
            raise _refused(path, f"its member {info.filename!r:.200} comes twice or lies outside the one folder")
        lower.add(name.lower())
        members[name] = Member(begin, end - begin, info.CRC)
    return Archive(path, members)


def _directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the table of members begins, and its number of rows."""
    file.seek(max(0, size - 22))
    end = file.read(22)
    if len(end) < 22 or end[:4] != END or end[20:22] != b"\0\0":
        raise _damaged(path, "a zip archive begins and does not end where the file ends")
    rows, length, start = (int.from_bytes(end[a:b], "little") for a, b in ((10, 12), (12, 16), (16, 20)))
    table_end = size - 22
    file.seek(max(0, size - 42))
    locator = file.read(20)
    if locator[:4] == LOCATOR64:
        record = int.from_bytes(locator[8:16], "little")
        if record != size - 22 - 20 - 56:
            raise _damaged(path, "its 64-bit end record is not where it should be")
        file.seek(record)
        end64 = file.read(56)
        if end64[:4] != END64:
            raise _damaged(path, "its 64-bit end record is none")
        rows64, length64, start64 = (int.from_bytes(end64[a : a + 8], "little") for a in (32, 40, 48))
        if rows not in (TINY, rows64) or length not in (HUGE, length64) or start not in (HUGE, start64):
            raise _refused(path, "its two end records differ")
        rows, length, start, table_end = rows64, length64, start64, record
    if length > DIRECTORY_LIMIT or start + length != table_end:
        raise _damaged(path, f"its table of members is said to lie in bytes {start} to {start + length}")
    return start, rows


def _span(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Where a member's header, its content and the end of that lie; checked against its own header."""
    name = info.filename
    if name != info.orig_filename or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise _refused(path, f"a member has the name {info.orig_filename!r:.200}")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & ENCRYPTED:
        raise _refused(path, f"its member {name!r:.200} is compressed or encrypted, which torch.save never does")
    file.seek(info.header_offset)
    header = file.read(30)
    name_length, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    raw = file.read(name_length)
    if len(header) < 30 or header[:4] != LOCAL or raw != name.encode("utf-8" if info.flag_bits & UTF8 else "cp437"):
        raise _damaged(path, f"member {name!r:.200} is not where the table of members says")
    if int.from_bytes(header[8:10], "little") != zipfile.ZIP_STORED:
        raise _refused(path, f"its member {name!r:.200} is compressed, which torch.save never does")
    begin = info.header_offset + 30 + name_length + extra
    return info.header_offset, begin, begin + info.file_size


def _damaged(path: Path, why: str) -> ValueError:
    size = os.path.getsize(path)
    return ValueError(f"{path} ({size} bytes) is not a complete checkpoint of torch.save: {why}; fetch it again")


def _refused(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is refused: {why}; open it where it was made and save its tensors as safetensors")
