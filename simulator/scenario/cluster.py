"""The machine: accelerators in hosts, hosts in scale-up domains, domains on a fabric. Facts and counts, no physics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from simulator.errors import nearest
from simulator.scenario.facts import Facts, Fraction, Frozen
from simulator.scenario.measured import CollectiveCost, KernelCost
from simulator.scenario.wiring import SHAPES, Clos, Shape
from simulator.units import Bytes, BytesPerS, Count, FlopPerS, Seconds, UsdPerHour, Watts, readable

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
InTraining = Literal["gemm", "gemm_low", "grouped", "attention", "memory", "optimizer", "scale_out"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


class Protocols(Frozen):
    """A latency for each of NCCL's three wire protocols, seconds."""

    ll: Seconds
    ll128: Seconds
    simple: Seconds


class Accelerator(Facts):
    """One GPU: what its datasheet promises and what kernels reach of it.

    Parameters
    ----------
    peak_flop_per_s : dict
        Dense peak per datatype, FLOP/s.
    gemm_efficiency : dict
        Share of that peak that large GEMMs sustain, per datatype.
    grouped_gemm_efficiency : float
        Share of the dense GEMM's speed that a grouped GEMM of the same tiles reaches.
    attention_efficiency : dict
        Share of the bf16 peak that fused attention reaches, ``forward`` and ``backward``.
    hbm_efficiency : float
        Share of the memory bandwidth that streaming kernels sustain.
    launch_s : float
        Shortest time of a kernel, seconds.
    multiprocessors, tile_m, tile_n, k_ramp : int
        Geometry of the GEMM kernels: processors that each work on one ``tile_m x tile_n`` output tile, and the depth
        in K that filling and draining a tile costs.
    result_tiles : int
        Output tiles whose sums a multiprocessor can hold: with two it computes one while it writes the other; with one, writing more
        than 16 bits per element costs as much more depth. Left out: two.
    displaced_product : float
        Speed of a product that finds another kernel on some multiprocessors, over that alone, where it is launched as one block for each
        of them whose tiles are shared out beforehand: blocks without a place do theirs when all others have ended. Left out: those take
        over what the missing ones would do.
    last_wave_recovered : float
        Share of the idle time of the last wave of tiles that smaller tiles or split-K win back.
    head_ramp : int
        Head width that costs fused attention half of its speed; the published efficiency is that of width 128.
    keys_ramp : int
        Keys per query that cost fused attention half of its speed, on tiles that the mask cuts and on short loops; the published
        efficiency is that of 4,096 keys, a causal sequence of 8,192. Left out: any number is as fast.
    tiles_ramp : float
        Tiles of queries per multiprocessor that cost fused attention half of its speed: a mask makes them uneven, so that the
        last ones leave other multiprocessors idle; the published efficiency is that of 16 heads and 16,384 queries. Left out:
        any number is as fast.
    fp8_attention : dict
        Speed of fused attention in 8 bits over that in bf16, by direction and by the mean width of a head's keys and values:
        ``forward`` and ``backward`` above 64 and up to 128, ``wide_forward`` and ``wide_backward`` above 128, ``narrow_forward`` and
        ``narrow_backward`` up to 64. As fast as bf16 where left out; null, as older profiles have it, leaves out all.
    older_attention : dict
        Share of that speed which the kernels of older generations, ``flash2`` and ``flash1``, reach; 1 where left out.
    kernels : dict
        Measured cost by kind of kernel (`simulator.pricing.operations.kernel_name`); what is here replaces the general model above.
    in_training : dict
        Speed in a training step over that of the benchmarks above, where power, clocks and caches are shared: ``gemm`` in 16 and
        32 bits, ``gemm_low`` in 8 and 4 bits, ``grouped`` on top of either, ``attention``, ``memory``; ``scale_out`` collectives
        that gather or reduce between scale-up domains, whose ranks start together in a benchmark, and in a step when the last of them
        has come; 1 where left out, as for collectives inside a domain.
    """

    vendor: str
    hbm_bytes: Bytes
    hbm_bytes_per_s: BytesPerS
    peak_flop_per_s: dict[Dtype, FlopPerS]
    gemm_efficiency: dict[Dtype, Fraction]
    grouped_gemm_efficiency: Fraction
    attention_efficiency: dict[Literal["forward", "backward"], Fraction]
    hbm_efficiency: Fraction
    launch_s: Seconds
    multiprocessors: int = Field(gt=0)
    tile_m: int = Field(gt=0)
    tile_n: int = Field(gt=0)
    k_ramp: int = Field(ge=0)
    result_tiles: int | None = Field(default=None, gt=0)
    displaced_product: Fraction | None = None
    last_wave_recovered: float = Field(ge=0, le=1)
    head_ramp: int = Field(ge=0)
    keys_ramp: int | None = Field(default=None, ge=0)
    tiles_ramp: float | None = Field(default=None, ge=0, lt=10)
    fp8_attention: dict[
        Literal["forward", "backward", "wide_forward", "wide_backward", "narrow_forward", "narrow_backward"],
        Annotated[float, Field(gt=0.5, lt=2.5)],
    ] = {}
    older_attention: dict[Literal["flash2", "flash1"], Fraction] = {}
    in_training: dict[InTraining, Annotated[float, Field(gt=0.3, lt=2.0)]] = {}
    tdp_w: Watts
    kernels: dict[str, KernelCost] = {}

    @field_validator("fp8_attention", mode="before")
    @classmethod
    def _null_leaves_out(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _peaks_are_dense(self) -> Accelerator:
        peaks = self.peak_flop_per_s
        if "bf16" not in peaks and "fp16" not in peaks:
            raise ValueError("peak_flop_per_s needs bf16 or fp16")
        if {"bf16", "fp8"} <= peaks.keys() and not 0.95 <= peaks["fp8"] / peaks["bf16"] <= 2.1:
            raise ValueError(
                f"peak_flop_per_s.fp8 = {readable(peaks['fp8'], 'flop_per_s')} is {peaks['fp8'] / peaks['bf16']:.2f} x bf16 = "
                f"{readable(peaks['bf16'], 'flop_per_s')}; dense FP8 is 1 to 2 x dense bf16: give both peaks without sparsity"
            )
        missing = peaks.keys() - self.gemm_efficiency.keys()
        if missing:
            raise ValueError(f"gemm_efficiency lacks {', '.join(sorted(missing))}, which peak_flop_per_s has")
        if set(self.attention_efficiency) != {"forward", "backward"}:
            raise ValueError("attention_efficiency needs forward and backward")
        return self


class Host(Facts):
    """A server and the scale-up domain (NVLink island) that it belongs to.

    Parameters
    ----------
    accelerators : int
        Accelerators in one host.
    scale_up_domain : int
        Accelerators that reach each other over the scale-up links; may span hosts.
    scale_up_bytes_per_s : float
        Scale-up bandwidth of one accelerator, one direction.
    bus_bytes_per_s : dict
        Bus bandwidth (as nccl-tests define it) of large messages inside the domain, per collective; ``send`` is
        point to point. Of rings; what the switches reduce is faster.
    reduction_share : float, optional
        Share of the scale-up link at which the data of one accelerator passes through the reduction in the scale-up
        switches (NVLS); none without.
    reduction_channels : int, optional
        Channels over which a library runs that reduction, each with a chunk per member under way; none: filling them is free.
    mesh : bool
        Whether the links go straight to each peer of the domain, an equal share to each, and not to switches: a group
        that leaves out peers leaves out their links.
    nic_bytes_per_s : float
        Scale-out bandwidth per accelerator, one direction.
    base_latency_s, hop_latency_s : Protocols
        Start of a collective and one hop over the scale-up link, per protocol.
    protocol_share : dict
        Share of the wire that is payload, per protocol.
    tree_share : float
        Bandwidth of a tree all-reduce over that of a ring.
    fill_s : float, optional
        Time to fill the pipeline of a long collective inside the domain; none where it is not known.
    overhead_w : float
        Power of the host beside its accelerators: processors, NICs, fans.
    dispatch_s : float or None
        Time that a processor takes to launch one kernel, framework included, seconds; None: launching never limits.
    collectives : dict
        Measured cost by collective, datatype and ranks (``all_gather.bf16.2``); what is here replaces the general model above.
    """

    accelerators: int = Field(gt=0)
    scale_up_domain: int = Field(gt=0)
    scale_up_bytes_per_s: BytesPerS
    bus_bytes_per_s: dict[Collective, BytesPerS]
    reduction_share: Fraction | None = None
    reduction_channels: int | None = Field(default=None, gt=0)
    mesh: bool = False
    nic_bytes_per_s: BytesPerS
    base_latency_s: Protocols
    hop_latency_s: Protocols
    protocol_share: dict[Literal["ll", "ll128", "simple"], Fraction]
    tree_share: Fraction
    fill_s: Seconds | None = None
    overhead_w: Watts
    dispatch_s: Seconds | None = None
    collectives: dict[str, CollectiveCost] = {}

    @field_validator("nic_bytes_per_s")
    @classmethod
    def _bits_or_bytes(cls, value: float, info: ValidationInfo) -> float:
        if value > 250e9 and value != info.data.get("scale_up_bytes_per_s"):  # equal where one network is both
            raise ValueError(
                f"{value / 1e9:g} GB/s = {value * 8 / 1e9:g} Gb/s per accelerator is beyond every NIC; "
                f"if the NIC is a {value / 1e9:g} Gb/s one, write '{value / 1e9:g} Gb/s'"
            )
        return value

    @model_validator(mode="after")
    def _all_collectives(self) -> Host:
        protocols = {"ll", "ll128", "simple"} - self.protocol_share.keys()
        if protocols:
            raise ValueError(f"protocol_share lacks {', '.join(sorted(protocols))}")
        beyond = {c: r for c, r in self.bus_bytes_per_s.items() if r > (2 if c == "all_reduce" else 1) * self.scale_up_bytes_per_s}
        if beyond:
            found = ", ".join(f"{c} = {readable(r, 'bytes_per_s')}" for c, r in beyond.items())
            raise ValueError(
                f"bus_bytes_per_s {found} is beyond the link's "
                f"scale_up_bytes_per_s = {readable(self.scale_up_bytes_per_s, 'bytes_per_s')}, one direction "
                "(all-reduce in the network: twice that)"
            )
        if self.scale_up_domain % self.accelerators and self.scale_up_domain > self.accelerators:
            raise ValueError(f"scale_up_domain = {self.scale_up_domain} is not a multiple of the host's {self.accelerators} accelerators")
        missing = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"} - self.bus_bytes_per_s.keys()
        if missing:
            raise ValueError(f"bus_bytes_per_s lacks {', '.join(sorted(missing))}")
        return self


class Tier(Frozen):
    """One level of switches.

    Parameters
    ----------
    name : str
        ``leaf``, ``spine``, ``core`` ...
    accelerators : int
        Accelerators that reach each other without leaving this level.
    oversubscription : float
        Bandwidth entering this level from below over bandwidth leaving it upwards to the next level.
    latency_s : float
        One-way latency between two accelerators whose path tops out here.
    ports, down, up : int, optional
        Ports of one switch; how many face down, and up, while another level is above (all face down otherwise). Left out,
        `down` follows from the reach and `up` from the oversubscription.
    up_bytes_per_s : float, optional
        Rate of one cable upwards, one direction; that of a NIC's port by default.
    switch, optic : str, optional
        Shipped part (``hardware_profiles/parts``) that the switch is, and that sits at both ends of a cable upwards.
    """

    name: str
    accelerators: Count = Field(gt=0)
    oversubscription: float = Field(default=1.0, ge=0.5, le=1000)
    latency_s: Seconds
    ports: Count | None = Field(default=None, gt=0)
    down: Count | None = Field(default=None, gt=0)
    up: Count | None = Field(default=None, gt=0)
    up_bytes_per_s: BytesPerS | None = None
    switch: str | None = None
    optic: str | None = None


class Fabric(Facts):
    """The scale-out network as a hierarchy of tiers, from the leaf up.

    Parameters
    ----------
    family : str
        Which graph the switches form; a key of `simulator.scenario.wiring.SHAPES`.
    efficiency : float
        Share of the line rate that large transfers sustain.
    hop_latency_s : Protocols
        One network hop of a collective, per protocol.
    fill_s : float, optional
        Time to fill the pipeline of a long collective between scale-up domains, beside the buffers on the wire; none where it is
        not known.
    tiers : tuple of Tier
        Innermost first; the last one reaches every accelerator.
    routing : str
        How flows choose among equally short paths: ``sprayed`` over all of them (adaptive routing, packet spraying), ``hashed``
        to one of them (equal-cost multipath), or ``d-mod-k``, one for each target.
    host_optic : str, optional
        Shipped part at both ends of the cable from a NIC to its leaf.
    topology : Shape, optional
        The numbers of the family's graph that the tiers do not say (`simulator.scenario.wiring`); its defaults when left out.
    """

    family: str
    efficiency: Fraction
    hop_latency_s: Protocols
    fill_s: Seconds | None = None
    tiers: tuple[Tier, ...] = Field(min_length=1)
    host_optic: str | None = None
    routing: Literal["sprayed", "hashed", "d-mod-k"] = "sprayed"
    topology: SerializeAsAny[Shape] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shape_of_the_family(cls, data: Any) -> Any:
        """Read `topology` as the shape that the family has."""
        if isinstance(data, dict) and isinstance(data.get("family"), str):
            family = data["family"]
            if family not in SHAPES:
                raise ValueError(f"family: unknown {family!r}; {nearest(family, SHAPES)}")
            if data.get("topology") is None and not issubclass(SHAPES[family], Clos):
                raise ValueError(f"topology: missing; family {family} needs {', '.join(SHAPES[family].model_fields)}")
            if isinstance(data.get("topology"), dict):
                data = data | {"topology": SHAPES[family].model_validate(data["topology"])}
        return data

    @property
    def shape(self) -> Shape:
        """The numbers of the family's graph, its defaults where the file gives none."""
        return self.topology or SHAPES[self.family]()

    @model_validator(mode="after")
    def _tiers_grow(self) -> Fabric:
        names = [t.name for t in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tiers need different names; found {', '.join(names)}")
        reach = [t.accelerators for t in self.tiers]
        if reach != sorted(set(reach)):
            raise ValueError(f"tiers must reach ever more accelerators, innermost first; found {reach}")
        return self


class Cluster(Facts):
    """Accelerators, hosts and fabric, counted and priced.

    Parameters
    ----------
    accelerator : Accelerator
    host : Host
    fabric : Fabric
    accelerators : int
        How many of them; a multiple of the host's.
    price_usd_per_accelerator_hour : float
        Rent of one accelerator with its share of the host and fabric; the source gives the date.
    slow_hosts : dict of int to float
        Hosts whose kernels take longer, by factor; 1.1 is 10 % slower.
    degraded : dict of str to float
        Parts of the network and the share of their rate that is left, 0 for down; named as `Topology.degraded` says.
    """

    accelerator: Accelerator
    host: Host
    fabric: Fabric
    accelerators: Count = Field(gt=0)
    price_usd_per_accelerator_hour: UsdPerHour
    slow_hosts: dict[int, float] = {}
    degraded: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}

    @model_validator(mode="after")
    def _price_has_a_date(self) -> Cluster:
        if any("price_usd_per_accelerator_hour" in s.facts and not s.date for s in self.sources):
            raise ValueError("the source of price_usd_per_accelerator_hour needs a date; prices move by 40 % in months")
        return self

    @model_validator(mode="after")
    def _counts_fit(self) -> Cluster:
        if self.accelerators % self.host.accelerators and self.accelerators > self.host.accelerators:
            raise ValueError(
                f"accelerators = {self.accelerators} is not a multiple of the host's {self.host.accelerators}; "
                f"use {self.accelerators // self.host.accelerators * self.host.accelerators}"
            )
        reach = self.fabric.tiers[-1].accelerators
        if self.accelerators > max(reach, self.host.scale_up_domain):
            raise ValueError(
                f"accelerators = {self.accelerators} exceeds the {reach} that fabric {self.fabric.name} reaches; add a tier or use {reach}"
            )
        for host, factor in self.slow_hosts.items():
            if not 0 <= host < self.hosts:
                raise ValueError(f"slow_hosts names host {host}; this cluster has hosts 0 to {self.hosts - 1}")
            if not 1 <= factor < float("inf"):
                raise ValueError(f"slow_hosts[{host}] = {factor}: a slow host takes 1 or more times as long; write 1.1 for 10 % slower")
        return self

    def numbers(self) -> dict[str, float]:
        """Return this cluster's own numbers; a slow host or a fault is a question, not a fact."""
        return {k: v for k, v in super().numbers().items() if not k.startswith(("slow_hosts", "degraded"))}

    @property
    def hosts(self) -> int:
        """Hosts, the last one possibly partly used."""
        return -(-self.accelerators // self.host.accelerators)

    def provenance(self) -> list[dict]:
        """Return one row per number of the cluster and its parts."""
        parts = (self.accelerator, self.host, self.fabric)
        return super().provenance() + [row for part in parts for row in part.provenance()]
