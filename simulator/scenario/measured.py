"""What a machine was measured to take for a kernel or a collective: costs that a calibration fits, in place of general models."""

from __future__ import annotations

from pydantic import model_validator

from simulator.scenario.facts import Frozen
from simulator.units import Bytes, BytesPerS, FlopPerS, Seconds


class KernelCost(Frozen):
    """Seconds of one kind of kernel: ``calls * launch_s + flop / flop_per_s + bytes / bytes_per_s``.

    Parameters
    ----------
    launch_s : float
        Of every call: a grouped GEMM that runs its experts one after the other has as many calls, attention one per head.
    flop_per_s, bytes_per_s : float or None
        Rates over FLOP and bytes as the simulator counts them; None where the kernel's time does not grow with that.
    keys, flop_per_s_at_keys : tuple of float
        Attention: the rate measured at some mean numbers of keys per query, ascending, in place of `flop_per_s`; seconds per
        FLOP are interpolated over the logarithm of the keys and constant beyond the ends.

    Notes
    -----
    A sum, not a roofline's maximum: a core that computes does not stream at the same time.
    """

    launch_s: Seconds
    flop_per_s: FlopPerS | None = None
    bytes_per_s: BytesPerS | None = None
    keys: tuple[float, ...] = ()
    flop_per_s_at_keys: tuple[FlopPerS, ...] = ()

    @model_validator(mode="after")
    def _curve_is_whole(self) -> KernelCost:
        if len(self.keys) != len(self.flop_per_s_at_keys) or list(self.keys) != sorted(set(self.keys)):
            raise ValueError(f"keys = {self.keys} must ascend, one for each of {len(self.flop_per_s_at_keys)} flop_per_s_at_keys")
        return self


class CollectiveCost(Frozen):
    """Seconds of one collective among some ranks: ``latency_s + bytes / bytes_per_s``, bytes as `simulator.workload.ops.Op` counts them.

    Parameters
    ----------
    latency_s : float
    bytes_per_s : float
        For the experts' all-to-all over the bytes that leave a rank.
    knee_bytes, beyond_bytes_per_s : float or None
        Bytes above `knee_bytes` move at the other rate: buffers that leave the cache.
    """

    latency_s: Seconds
    bytes_per_s: BytesPerS
    knee_bytes: Bytes | None = None
    beyond_bytes_per_s: BytesPerS | None = None

    @model_validator(mode="after")
    def _knee_is_whole(self) -> CollectiveCost:
        if (self.knee_bytes is None) != (self.beyond_bytes_per_s is None):
            raise ValueError("knee_bytes and beyond_bytes_per_s go together; give both or neither")
        return self
