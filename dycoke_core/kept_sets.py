"""Which visual tokens a sequence kept, token by token, small enough to be stored: `KeptHistory`.

All sets are bitsets: bit i is token i of the units' N tokens each, unit after unit, most
significant bit of a byte first, padded to whole bytes with zeros. Stage II's sets are stored as
changes: first what the first selection kept, then what each later selection added or dropped.

Knows no engine, no device and no queue; needs no torch.
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

HISTORY_VERSION = 1
MAX_HISTORY_BYTES = 256 * 2**10  # encoded
_MAX_HEADER_BYTES = 512
_LENGTH = struct.Struct("<I")
_CHANGE = struct.Struct("<II")  # token, bytes of what changed

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.integer[Any]]


class KeptSetDroppedError(LookupError):
    """What was kept at this token is not stored: the changes before it filled the history."""


@dataclass(frozen=True, slots=True)
class KeptHistory:
    """
    Args:
        rows, columns: of the grid that a unit's tokens stand in.
        num_tokens: of the answer.
        stage_one: bitset [units * N], what stage I kept.
        last: bitset [units * N], what stage II kept at the last decode step; None: it is off, or
            there was none.
        changes: the token that a selection was made for, and, compressed, which of stage I's V
            tokens, in their order, it took in or dropped: a bitset [V].
        num_stored: tokens from the first on whose sets are stored; less than `num_tokens` where
            the later changes did not fit into `MAX_HISTORY_BYTES`.
    """

    units: int
    rows: int
    columns: int
    num_tokens: int
    stage_one: bytes
    last: bytes | None = None
    changes: tuple[tuple[int, bytes], ...] = ()
    num_stored: int = 0

    @property
    def tokens_per_unit(self) -> int:
        """N."""
        return self.rows * self.columns

    @property
    def is_truncated(self) -> bool:
        return self.num_stored < self.num_tokens

    def stage_two(self, token: int) -> bytes | None:
        """What stage II kept when a token of the answer was made.

        Returns:
            Bitset [units * N], a subset of `stage_one`. None where stage II had no part: it is off,
            or the token is the first, which the prompt makes.

        Raises:
            IndexError: the answer has no such token.
            KeptSetDroppedError
        """
        if not 0 <= token < self.num_tokens:
            raise IndexError(token)
        if token >= self.num_stored:
            raise KeptSetDroppedError(token)
        changes = [packed for at, packed in self.changes if at <= token]
        if not changes:
            return None
        places = np.flatnonzero(_unpacked(self.stage_one, self.units * self.tokens_per_unit))
        is_kept = np.zeros(len(places), np.bool_)
        for packed in changes:
            is_kept ^= _unpacked(zlib.decompress(packed), len(places))
        return _bitset(places[is_kept], self.units * self.tokens_per_unit)

    def encode(self) -> bytes:
        """At most `MAX_HISTORY_BYTES`."""
        header = {
            "version": HISTORY_VERSION,
            "units": self.units,
            "rows": self.rows,
            "columns": self.columns,
            "num_tokens": self.num_tokens,
            "num_stored": self.num_stored,
            "has_last": self.last is not None,
        }
        text = json.dumps(header).encode()
        parts = [_LENGTH.pack(len(text)), text, self.stage_one, self.last or b""]
        for token, packed in self.changes:
            parts += [_CHANGE.pack(token, len(packed)), packed]
        return b"".join(parts)

    @classmethod
    def decode(cls, blob: bytes) -> Self:
        """The inverse of `encode`. Raises: ValueError."""
        (length,) = _LENGTH.unpack_from(blob)
        place = _LENGTH.size + length
        header = json.loads(blob[_LENGTH.size : place])
        if header.pop("version") != HISTORY_VERSION:
            raise ValueError("kept sets of another version")
        has_last = header.pop("has_last")
        size = -(-header["units"] * header["rows"] * header["columns"] // 8)
        stage_one = blob[place : place + size]
        place += size
        last = blob[place : place + size] if has_last else None
        place += size if has_last else 0
        changes = []
        while place < len(blob):
            token, length = _CHANGE.unpack_from(blob, place)
            place += _CHANGE.size + length
            changes.append((token, blob[place - length : place]))
        return cls(**header, stage_one=stage_one, last=last, changes=tuple(changes))


@dataclass(slots=True, eq=False)
class KeptRecorder:
    """Takes the sets of one sequence as they become known, and makes its `KeptHistory`.

    Holds at most what the history may take, and one set.

    Args:
        kept: [V], which of the units * N tokens stage I kept, in the order in which they stand.
    """

    units: int
    rows: int
    columns: int
    kept: Integers
    _order: Integers = field(init=False)  # [V], place of each kept token among them in raster order
    _last: Bools | None = None  # [V], in raster order
    _changes: list[tuple[int, bytes]] = field(default_factory=list)
    _num_bytes: int = field(init=False)
    _num_stored: int | None = None  # None: all so far

    def __post_init__(self) -> None:
        self._order = np.empty(len(self.kept), np.int64)
        self._order[np.argsort(self.kept)] = np.arange(len(self.kept))
        num_set_bytes = -(-self._num_tokens_in // 8)
        self._num_bytes = _LENGTH.size + _MAX_HEADER_BYTES + 2 * num_set_bytes

    @property
    def _num_tokens_in(self) -> int:
        return self.units * self.rows * self.columns

    def add(self, token: int, places: Integers) -> None:
        """Takes what stage II kept when a token was made.

        Args:
            places: [n_keep], among the V.
        """
        is_kept = np.zeros(len(self.kept), np.bool_)
        is_kept[self._order[places]] = True
        if self._last is not None and np.array_equal(is_kept, self._last):
            return
        before = self._last
        self._last = is_kept
        if self._num_stored is not None:
            return
        changed = is_kept if before is None else is_kept ^ before
        packed = zlib.compress(np.packbits(changed).tobytes(), 1)
        self._num_bytes += _CHANGE.size + len(packed)
        if self._num_bytes > MAX_HISTORY_BYTES:
            self._num_stored = token
        else:
            self._changes.append((token, packed))

    def history(self, num_tokens: int) -> KeptHistory:
        """Args: num_tokens: of the answer, now that it has ended."""
        raster = np.sort(self.kept)
        last = None if self._last is None else _bitset(raster[self._last], self._num_tokens_in)
        return KeptHistory(
            units=self.units,
            rows=self.rows,
            columns=self.columns,
            num_tokens=num_tokens,
            stage_one=_bitset(raster, self._num_tokens_in),
            last=last,
            changes=tuple(self._changes),
            num_stored=num_tokens if self._num_stored is None else self._num_stored,
        )


def _bitset(places: Integers, num_bits: int) -> bytes:
    bits = np.zeros(num_bits, np.bool_)
    bits[places] = True
    return np.packbits(bits).tobytes()


def _unpacked(bitset: bytes, num_bits: int) -> Bools:
    return np.unpackbits(np.frombuffer(bitset, np.uint8), count=num_bits).astype(np.bool_)
