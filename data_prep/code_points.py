"""Code points in UTF-8 bytes, found many at a time."""

import numpy as np

NO_BYTE_OF_TEXT = 0xFF  # never occurs in UTF-8, so it can separate texts


def positions_of(byte: int, data: bytes) -> np.ndarray:
    """Where a byte occurs."""
    return np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == byte)


def foreign_points(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The code points beyond ASCII in UTF-8 text, and the positions of their first bytes.

    Decoding only these leaves most of most texts alone.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    positions = np.flatnonzero(octets >= 0xC0)
    first = octets[positions]
    characters = first != NO_BYTE_OF_TEXT
    positions, first = positions[characters], first[characters].astype(np.int32)
    tail = [octets.take(positions + offset, mode="clip").astype(np.int32) & 0x3F for offset in (1, 2, 3)]
    two = (first & 0x1F) << 6 | tail[0]
    three = (first & 0x0F) << 12 | tail[0] << 6 | tail[1]
    four = (first & 0x07) << 18 | tail[0] << 12 | tail[1] << 6 | tail[2]
    return positions, np.where(first < 0xE0, two, np.where(first < 0xF0, three, four))


def same_groups(first: tuple, second: tuple, group_texts: int) -> np.ndarray:
    """Which groups of texts have the same ids in two encodings, each given as flat ids and lengths."""
    same = first[1] == second[1]
    ids = [encoded[0][np.repeat(same, encoded[1])] for encoded in (first, second)]
    owner = np.repeat(np.flatnonzero(same), first[1][same])
    same[owner[ids[0] != ids[1]]] = False
    return same.reshape(-1, group_texts).all(axis=1)
