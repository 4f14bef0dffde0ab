"""What the objects look like: bodies built from a few convex parts.

Sizes are (length, width, height) in metres; x runs along the length, the origin is the centre of the box.
Bodies stay a little inside their box, so that range noise seldom carries a point out of it.
"""

import numpy as np

from cpq_train.simulator.parts import BOX, ELLIPSOID, FRUSTUM, Part

Size = tuple[float, float, float]


class _Body:
    """Collects parts given in fractions of the box: x and y from -1 to 1, z from 0 (ground) to 1 (top)."""

    def __init__(self, size: Size, inset_m: float = 0.035) -> None:
        self.half = [max(v / 2 - inset_m, 0.35 * v) for v in size]
        self.parts: list[Part] = []

    def add(self, material: str, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float],
            kind: int = BOX, taper: float = 1.0) -> None:  # fmt: skip
        """Adds a part that fills the given ranges."""
        spans = (x, y, (2 * z[0] - 1, 2 * z[1] - 1))
        cx, cy, cz = ((a + b) / 2 * h for (a, b), h in zip(spans, self.half, strict=True))
        hx, hy, hz = (max((b - a) / 2 * h, 0.012) for (a, b), h in zip(spans, self.half, strict=True))
        self.parts.append(Part(kind, (cx, cy, cz), (hx, hy, hz), material, taper=taper))


def _paint(rng: np.random.Generator) -> str:
    return str(rng.choice(["paint", "dark_paint", "metal"], p=[0.6, 0.3, 0.1]))


def car(size: Size, rng: np.random.Generator) -> list[Part]:
    """Sedan, hatchback or van, told apart by the cabin."""
    body, paint = _Body(size), _paint(rng)
    rear, front = ((-0.8, 0.35), (-0.95, 0.35), (-0.98, 0.6))[rng.choice(3, p=[0.4, 0.4, 0.2])]
    belt = rng.uniform(0.52, 0.62)
    body.add("rubber", (-0.85, 0.85), (-0.94, 0.94), (0.02, 0.2))
    body.add(paint, (-1, 1), (-1, 1), (0.16, belt))
    body.add("glass", (rear, front), (-0.86, 0.86), (belt, 0.93))
    body.add(paint, (rear + 0.12, front - 0.2), (-0.8, 0.8), (0.93, 1))
    body.add("reflective", (-1.005, -0.97), (-0.3, 0.3), (0.35, 0.45))
    return body.parts


def box_truck(size: Size, rng: np.random.Generator) -> list[Part]:
    """Cab, chassis and a closed load."""
    body, paint = _Body(size), _paint(rng)
    split, cab_top = rng.uniform(0.38, 0.6), rng.uniform(0.68, 0.9)
    body.add("rubber", (-0.9, 0.9), (-0.85, 0.85), (0.02, 0.22))
    body.add(paint, (split + 0.04, 1), (-0.9, 0.9), (0.14, 0.5))
    body.add("glass", (split + 0.04, 0.96), (-0.88, 0.88), (0.5, cab_top - 0.06))
    body.add(paint, (split + 0.04, 0.92), (-0.88, 0.88), (cab_top - 0.06, cab_top))
    body.add(str(rng.choice(["tarpaulin", "metal", "paint"])), (-1, split), (-1, 1), (0.26, 1))
    return body.parts


def pickup(size: Size, rng: np.random.Generator) -> list[Part]:
    """Cabin in front, open bed behind."""
    body, paint = _Body(size), _paint(rng)
    body.add("rubber", (-0.85, 0.85), (-0.94, 0.94), (0.02, 0.25))
    body.add(paint, (-1, 1), (-1, 1), (0.2, 0.58))
    body.add("glass", (-0.15, 0.5), (-0.88, 0.88), (0.58, 0.94))
    body.add(paint, (-0.1, 0.35), (-0.84, 0.84), (0.94, 1))
    return body.parts


def tractor(size: Size, rng: np.random.Generator) -> list[Part]:
    """A tall cab with a bare frame behind."""
    body, paint = _Body(size), _paint(rng)
    body.add("rubber", (-1, 0.9), (-0.9, 0.9), (0.02, 0.3))
    body.add(paint, (0.1, 1), (-1, 1), (0.16, 0.55))
    body.add("glass", (0.1, 0.97), (-0.95, 0.95), (0.55, 0.8))
    body.add(paint, (0.1, 0.85), (-0.95, 0.95), (0.8, 1))
    return body.parts


def bus(size: Size, rng: np.random.Generator) -> list[Part]:
    """A long box with a band of windows."""
    body, paint = _Body(size), _paint(rng)
    body.add("rubber", (-0.92, 0.92), (-0.95, 0.95), (0.03, 0.12))
    body.add(paint, (-1, 1), (-1, 1), (0.09, 0.42))
    body.add("glass", (-0.99, 0.99), (-0.985, 0.985), (0.42, 0.78))
    body.add(paint, (-1, 1), (-1, 1), (0.78, 1))
    return body.parts


def box_trailer(size: Size, rng: np.random.Generator) -> list[Part]:
    """A long closed box on legs in front and wheels at the rear."""
    body = _Body(size)
    floor = rng.uniform(0.24, 0.32)
    body.add("rubber", (-0.95, -0.5), (-0.92, 0.92), (0.02, floor))
    body.add("metal", (0.45, 0.52), (-0.7, 0.7), (0.02, floor))
    body.add(
        str(rng.choice(["tarpaulin", "metal", "paint"], p=[0.5, 0.3, 0.2])), (-1, 1), (-1, 1), (floor, 1)
    )
    return body.parts


def flat_trailer(size: Size, rng: np.random.Generator) -> list[Part]:
    """A platform with a load on part of it."""
    body = _Body(size)
    body.add("rubber", (-0.95, -0.45), (-0.92, 0.92), (0.02, 0.3))
    body.add("metal", (-1, 1), (-1, 1), (0.28, 0.4))
    body.add("metal", (0.9, 1), (-1, 1), (0.4, 1))
    end = rng.uniform(-0.3, 0.6)
    body.add(
        str(rng.choice(["concrete", "tarpaulin", "metal"])),
        (-0.9, end),
        (-0.85, 0.85),
        (0.4, rng.uniform(0.7, 1)),
    )
    return body.parts


def excavator(size: Size, rng: np.random.Generator) -> list[Part]:
    """Tracks, a turning house, a boom that rises and a stick that falls to the bucket."""
    body = _Body(size)
    body.add("rubber", (-1, 0.2), (-1, -0.6), (0, 0.28))
    body.add("rubber", (-1, 0.2), (0.6, 1), (0, 0.28))
    body.add("plastic", (-0.95, 0.1), (-0.9, 0.9), (0.3, 0.62))
    body.add("glass", (-0.35, 0.1), (0.2, 0.9), (0.62, 0.88))
    for k in range(4):
        body.add(
            "plastic", (0.0 + 0.15 * k, 0.19 + 0.15 * k), (-0.25, 0.1), (0.45 + 0.12 * k, 0.64 + 0.12 * k)
        )
    body.add("plastic", (0.6, 0.75), (-0.22, 0.08), (0.35, 0.95))
    body.add("metal", (0.68, 1), (-0.35, 0.25), (0.02, 0.36))
    return body.parts


def loader(size: Size, rng: np.random.Generator) -> list[Part]:
    """Four big wheels, engine, cab and a shovel in front."""
    body = _Body(size)
    for x in (-0.75, 0.15):
        body.add("rubber", (x, x + 0.42), (-0.95, -0.6), (0, 0.42))
        body.add("rubber", (x, x + 0.42), (0.6, 0.95), (0, 0.42))
    body.add("plastic", (-1, 0.1), (-0.6, 0.6), (0.2, 0.62))
    body.add("glass", (-0.4, 0.1), (-0.5, 0.5), (0.62, 0.95))
    body.add("plastic", (-0.4, 0.1), (-0.5, 0.5), (0.95, 1))
    body.add("plastic", (0.1, 0.75), (-0.3, 0.3), (0.25, 0.45))
    lift = rng.uniform(0.0, 0.35)
    body.add("metal", (0.72, 1), (-1, 1), (lift, lift + 0.3))
    return body.parts


def barrier(size: Size, rng: np.random.Generator) -> list[Part]:
    """A concrete wall element or a plastic one; its length is the short side, as nuScenes annotates it."""
    body = _Body(size, 0.02)
    material = str(rng.choice(["concrete", "plastic", "reflective"], p=[0.5, 0.35, 0.15]))
    body.add(material, (-1, 1), (-1, 1), (0, 0.35))
    body.add(material, (-0.5, 0.5), (-1, 1), (0.35, 1))
    return body.parts


def _rider(body: _Body, x: float, seat: float) -> None:
    body.add("cloth", (x - 0.22, x + 0.18), (-0.7, 0.7), (seat - 0.1, 0.86), FRUSTUM, 0.8)
    body.add("skin", (x - 0.1, x + 0.16), (-0.32, 0.32), (0.85, 1), ELLIPSOID)
    body.add("cloth", (x - 0.1, x + 0.3), (-0.55, 0.55), (0.25, seat))


def motorcycle(size: Size, rng: np.random.Generator, ridden: bool = False) -> list[Part]:
    """Two wheels, a solid body, handlebars, and the rider."""
    body = _Body(size, 0.02)
    top = 0.62 if ridden else 0.85
    body.add("rubber", (-1, -0.42), (-0.22, 0.22), (0, 0.45 * top + 0.1))
    body.add("rubber", (0.42, 1), (-0.2, 0.2), (0, 0.45 * top + 0.1))
    body.add("metal", (-0.8, 0.55), (-0.42, 0.42), (0.2, top))
    body.add("metal", (0.35, 0.5), (-0.95, 0.95), (top, top + 0.12))
    if ridden:
        _rider(body, -0.1, 0.55)
    return body.parts


def bicycle(size: Size, rng: np.random.Generator, ridden: bool = False) -> list[Part]:
    """Two thin, see-through wheels and a thin frame, and the rider."""
    body = _Body(size, 0.02)
    top = 0.6 if ridden else 0.92
    body.add("spokes", (-1, -0.24), (-0.12, 0.12), (0, 0.66 * top))
    body.add("spokes", (0.24, 1), (-0.12, 0.12), (0, 0.66 * top))
    body.add("metal", (-0.5, 0.55), (-0.14, 0.14), (0.42 * top, 0.9 * top))
    body.add("metal", (0.4, 0.52), (-0.9, 0.9), (0.9 * top, top))
    if ridden:
        _rider(body, -0.15, 0.58)
    return body.parts


def pedestrian(size: Size, rng: np.random.Generator) -> list[Part]:
    """Two legs in a stride, trunk with arms, head."""
    body = _Body(size, 0.02)
    stride = rng.uniform(0.15, 0.75)
    body.add("cloth", (stride - 0.25, stride + 0.25), (-0.55, -0.05), (0, 0.5), FRUSTUM)
    body.add("cloth", (-stride - 0.25, -stride + 0.25), (0.05, 0.55), (0, 0.5), FRUSTUM)
    body.add("cloth", (-0.5, 0.5), (-0.9, 0.9), (0.45, 0.85), FRUSTUM, 0.95)
    body.add("skin", (-0.3, 0.34), (-0.34, 0.34), (0.85, 1), ELLIPSOID)
    return body.parts


def cone(size: Size, rng: np.random.Generator) -> list[Part]:
    """A tapering cone on a flat foot, with a reflective band."""
    body = _Body(size, 0.01)
    body.add("plastic", (-1, 1), (-1, 1), (0, 0.08))
    body.add("plastic", (-0.75, 0.75), (-0.75, 0.75), (0.08, 1), FRUSTUM, 0.25)
    body.add("reflective", (-0.56, 0.56), (-0.56, 0.56), (0.45, 0.75), FRUSTUM, 0.75)
    return body.parts


def rack(size: Size, rng: np.random.Generator) -> list[Part]:
    """A low rail for bicycles."""
    body = _Body(size, 0.02)
    body.add("metal", (-1, 1), (-0.03, 0.03), (0.3, 0.4))
    return body.parts


def cart(size: Size, rng: np.random.Generator) -> list[Part]:
    """A dustbin, a stroller, a pallet: one lump."""
    body = _Body(size, 0.02)
    body.add(str(rng.choice(["plastic", "cloth", "metal"])), (-1, 1), (-1, 1), (0.05, 1))
    return body.parts
