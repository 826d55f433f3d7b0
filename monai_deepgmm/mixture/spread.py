"""What a median absolute deviation tells of a normal distribution."""

from __future__ import annotations

#: The standard deviation by the median absolute deviation, ``1 / Φ⁻¹(3/4)``.
NORMAL_MAD = 1.4826
