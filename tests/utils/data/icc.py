"""Colour profiles and the way to sRGB, written out in numbers: nothing here is computed by a colour library."""

import struct

import numpy as np

# Columns: the XYZ (D50) of red, green and blue.
SRGB = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
GAMMA = 2 + 51 / 256
D50 = np.array([0.9642, 1.0, 0.8249])


def matrix_profile(primaries: np.ndarray) -> bytes:
    """A display with these primaries and a gamma of 2.2."""
    tags = {f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", primaries.T, strict=True)}
    tags |= {f"{name}TRC".encode(): _curve() for name in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": _xyz(D50), **tags})


def grey_profile() -> bytes:
    """Grey with a gamma of 1.8, as old Macintoshes had it."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _curve(1.796875)})


def cmyk_profile(lab_of_corners: np.ndarray) -> bytes:
    """A printer; ``lab_of_corners`` uint8 [2, 2, 2, 2, 3]: Lab of no and full ink of each of C, M, Y, K."""
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + lab_of_corners.tobytes() + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": table, b"A2B1": table})


def to_srgb(values: np.ndarray, primaries: np.ndarray, gamma: float = GAMMA) -> np.ndarray:
    """uint8 [..., 3] in a space of these primaries -> sRGB."""
    return xyz_to_srgb(((values / 255.0) ** gamma) @ primaries.T)


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """uint8 [..., 3], as profiles write Lab in bytes -> sRGB."""
    lightness, a, b = lab[..., 0] / 2.55, lab[..., 1] - 128.0, lab[..., 2] - 128.0
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    return xyz_to_srgb(D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))


def xyz_to_srgb(xyz: np.ndarray) -> np.ndarray:
    linear = (xyz @ np.linalg.inv(SRGB).T).clip(0, 1)
    return np.round(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * float(value)) for value in values))


def _curve(gamma: float = GAMMA) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s12x4s4s", place + len(body), b"", 0x02400000, kind, space, connection, b"acsp", b"")
    head += bytes(24) + struct.pack(">3i", *(round(65536 * float(value)) for value in D50))
    return head.ljust(128, b"\0") + table + body
