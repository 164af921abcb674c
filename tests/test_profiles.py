"""The shipped profiles load, every number in them has one source, and bad input is refused with its numbers."""

from __future__ import annotations

import re

import pytest

from simulator.errors import ProfileError
from simulator.scenario.cluster import Accelerator, Cluster, Fabric, Host
from simulator.scenario.profiles import ACCELERATORS, CLUSTERS, FABRICS, HOSTS, PARTS, Catalogue, parts, read_yaml, validated

CATALOGUES = (ACCELERATORS, HOSTS, FABRICS, CLUSTERS, PARTS)
SHIPPED = [(c, name) for c in CATALOGUES for name in c.names()]
GRADES = {"datasheet", "published", "measured", "fitted", "assumed"}
all_shipped = pytest.mark.parametrize(("catalogue", "name"), SHIPPED, ids=[f"{c.kind}-{n}" for c, n in SHIPPED])


def table(catalogue: Catalogue, name: str) -> dict:
    """Return the JSON form of a shipped profile, to spoil."""
    return catalogue.load(name).model_dump(mode="json")


def without(data: dict, fact: str) -> dict:
    """Return `data` less one number ``field.key`` and its citation."""
    field, key = fact.split(".")
    data[field].pop(key)
    for source in data["sources"]:
        source["facts"] = [f for f in source["facts"] if f != fact]
    return data


def refused(cls: type, data: dict, *words: str) -> str:
    """Check that `data` is refused with every word in the text, and return the text."""
    with pytest.raises(ProfileError) as error:
        validated(cls, data, "test")
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"
    return str(error.value)


# every shipped profile


def test_every_kind_is_shipped():
    assert [len(c.names()) for c in CATALOGUES] == [13, 12, 19, 14, 13]


@all_shipped
def test_loads_under_its_own_name(catalogue, name):
    assert catalogue.load(name).name == name


@all_shipped
def test_written_form_reads_back_the_same(catalogue, name):
    profile = catalogue.load(name)
    assert type(profile).model_validate(profile.model_dump(mode="json")) == profile


@all_shipped
def test_every_number_has_exactly_one_source(catalogue, name):
    profile = catalogue.load(name)
    cited = [fact for source in profile.sources for fact in source.facts]
    assert len(cited) == len(set(cited))
    for number in profile.numbers():
        exact = [f for f in cited if f == number]
        wide = [f for f in cited if number.startswith(f + ".")]
        assert len(exact or wide) == 1, number


@all_shipped
def test_every_number_is_positive(catalogue, name):
    assert all(value > 0 for value in catalogue.load(name).numbers().values())


@all_shipped
def test_sources_say_something(catalogue, name):
    for source in catalogue.load(name).sources:
        assert len(source.source) >= 20
        assert source.facts


@pytest.mark.parametrize("name", CLUSTERS.names())
def test_provenance_covers_the_cluster_and_its_parts(name):
    cluster = CLUSTERS.load(name)
    rows = cluster.provenance()
    assert len(rows) == sum(len(part.numbers()) for part in (cluster, cluster.accelerator, cluster.host, cluster.fabric))
    assert all(row["grade"] in GRADES and row["source"] for row in rows)


@pytest.mark.parametrize("name", CLUSTERS.names())
def test_prices_carry_a_date(name):
    dates = [row["date"] for row in CLUSTERS.load(name).provenance() if "price" in row["fact"]]
    assert len(dates) == 1
    assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", dates[0])


# facts that must agree with each other


@pytest.mark.parametrize("name", ACCELERATORS.names())
def test_fp8_is_twice_bf16(name):
    accelerator = ACCELERATORS.load(name)
    peaks = accelerator.peak_flop_per_s
    assert peaks["fp16"] == peaks["bf16"] or name == "ascend-910c"  # whose data give fp16 6 % more
    if "fp8" in peaks:
        assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=1e-3)
    if "fp4" in peaks:
        assert 2 * peaks["fp8"] <= peaks["fp4"] <= 3 * peaks["fp8"]


@pytest.mark.parametrize("name", ACCELERATORS.names())
def test_low_precision_gemm_is_faster_in_absolute_terms(name):
    accelerator = ACCELERATORS.load(name)
    reached = {d: peak * accelerator.gemm_efficiency[d] for d, peak in accelerator.peak_flop_per_s.items()}
    order = [reached[d] for d in ("fp32", "bf16", "fp8", "fp4") if d in reached]
    assert order == sorted(order)


@pytest.mark.parametrize("name", HOSTS.names())
def test_bus_bandwidth_fits_the_links(name):
    host = HOSTS.load(name)
    link = host.scale_up_bytes_per_s
    assert all(bus <= link for kind, bus in host.bus_bytes_per_s.items() if kind != "all_reduce")
    assert host.bus_bytes_per_s["all_reduce"] <= 2 * link  # reduction inside the switch at best halves the traffic
    assert host.nic_bytes_per_s < link or host.scale_up_domain == 1
    assert host.scale_up_domain % host.accelerators == 0 or host.scale_up_domain == 1


@pytest.mark.parametrize("name", FABRICS.names())
def test_latency_grows_with_distance(name):
    latencies = [tier.latency_s for tier in FABRICS.load(name).tiers]
    assert latencies == sorted(set(latencies))


@pytest.mark.parametrize("name", CLUSTERS.names())
def test_clusters_hold_whole_scale_up_domains(name):
    cluster = CLUSTERS.load(name)
    assert cluster.accelerators % cluster.host.scale_up_domain == 0
    assert cluster.fabric.tiers[0].accelerators % cluster.host.accelerators == 0


def test_h800_is_an_h100_with_less_nvlink():
    h100, h800 = (ACCELERATORS.load(n).numbers() for n in ("h100-sxm5-80", "h800-sxm5-80"))
    assert h100 == h800
    assert HOSTS.load("dgx-h800").scale_up_bytes_per_s < HOSTS.load("dgx-h100").scale_up_bytes_per_s


# exact values


@pytest.mark.parametrize(
    ("catalogue", "name", "fact", "value"),
    [
        (ACCELERATORS, "h100-sxm5-80", "peak_flop_per_s.bf16", 989e12),
        (ACCELERATORS, "h100-sxm5-80", "hbm_bytes", 81559 * 2**20),
        (ACCELERATORS, "h100-sxm5-80", "gemm_efficiency.bf16", 0.76),
        (ACCELERATORS, "a100-sxm4-80", "hbm_bytes_per_s", 2.039e12),
        (ACCELERATORS, "b200-sxm-180", "peak_flop_per_s.fp4", 9e15),
        (ACCELERATORS, "mi300x", "multiprocessors", 304),
        (ACCELERATORS, "mi325x", "hbm_bytes_per_s", 6e12),
        (ACCELERATORS, "mi355x", "peak_flop_per_s.fp4", 10066e12),
        (HOSTS, "mi355x-platform", "scale_up_bytes_per_s", 535.5e9),
        (HOSTS, "dgx-h100", "nic_bytes_per_s", 50e9),
        (HOSTS, "dgx-h100", "bus_bytes_per_s.send", 386e9),
        (HOSTS, "dgx-h100", "hop_latency_s.ll", 0.6e-6),
        (HOSTS, "dgx-h100", "overhead_w", 4600.0),
        (HOSTS, "gb200-nvl72", "scale_up_domain", 72),
        (HOSTS, "dgx-b300", "nic_bytes_per_s", 100e9),
        (FABRICS, "roce-meta-24k", "tiers.pod.oversubscription", 7.0),
        (FABRICS, "ib-ndr-rail", "tiers.spine.latency_s", 3.7e-6),
        (FABRICS, "ib-ndr-rail-deepseek", "tiers.spine.accelerators", 16384),
        (CLUSTERS, "deepseek-2048-h800", "price_usd_per_accelerator_hour", 2.0),
        (CLUSTERS, "meta-24k-h100", "accelerators", 24576),
    ],
)
def test_exact_values(catalogue, name, fact, value):
    assert catalogue.load(name).numbers()[fact] == pytest.approx(value, rel=1e-12)


def test_gemm_efficiency_is_the_middle_of_the_measured_range():
    for name, low, high, dtype in (
        ("a100-sxm4-80", 262, 284, "bf16"),
        ("h100-sxm5-80", 717, 786, "bf16"),
        ("b200-sxm-180", 1470, 1553, "bf16"),
        ("gb300-288", 1840, 1907, "bf16"),
    ):
        accelerator = ACCELERATORS.load(name)
        middle = (low + high) / 2 * 1e12 / accelerator.peak_flop_per_s[dtype]
        assert accelerator.gemm_efficiency[dtype] == pytest.approx(middle, abs=6e-4)


def test_hosts_are_counted():
    assert CLUSTERS.load("deepseek-2048-h800").hosts == 256
    assert CLUSTERS.load("gb200-nvl72-10368").hosts == 2592
    assert CLUSTERS.load("h100-single-host").hosts == 1


# bad input: what facts.py refuses


def test_bare_number_is_refused():
    refused(
        Accelerator, table(ACCELERATORS, "h100-sxm5-80") | {"hbm_bytes_per_s": 3.35}, "hbm_bytes_per_s", "3.35 has no unit", "3.35 TB/s"
    )


def test_unit_of_another_dimension_is_refused():
    refused(Accelerator, table(ACCELERATORS, "h100-sxm5-80") | {"tdp_w": "700 GB"}, "tdp_w", "a unit of bytes, not of w", "700 W")


def test_unknown_key_names_the_nearest():
    data = table(HOSTS, "dgx-h100") | {"nic_bytes_per_sec": "400 Gb/s"}
    refused(Host, data, "nic_bytes_per_sec: unknown key", "did you mean", "nic_bytes_per_s")


def test_missing_key_is_refused():
    data = table(HOSTS, "dgx-h100")
    del data["overhead_w"]
    refused(Host, data, "overhead_w: missing")


def test_unknown_datatype_is_refused():
    data = table(ACCELERATORS, "h100-sxm5-80")
    data["peak_flop_per_s"]["bf61"] = "989 TFLOP/s"
    refused(Accelerator, data, "peak_flop_per_s.bf61", "'bf16'")


def test_number_without_source_is_refused():
    data = table(ACCELERATORS, "h100-sxm5-80")
    data["sources"] = [s for s in data["sources"] if "launch_s" not in s["facts"]]
    refused(Accelerator, data, "no source for launch_s", "sources[].facts")


def test_fact_cited_twice_is_refused():
    data = table(ACCELERATORS, "h100-sxm5-80")
    data["sources"].append({"grade": "assumed", "source": "a second opinion", "facts": ["launch_s"]})
    refused(Accelerator, data, "two sources for launch_s", "keep one")


def test_source_of_an_absent_fact_is_refused():
    data = table(ACCELERATORS, "a100-sxm4-80")
    data["sources"].append({"grade": "assumed", "source": "there is no fp8 here", "facts": ["gemm_efficiency.fp8"]})
    refused(Accelerator, data, "sources name facts that are not here: gemm_efficiency.fp8")


def test_unknown_grade_is_refused():
    data = table(ACCELERATORS, "a100-sxm4-80")
    data["sources"][0]["grade"] = "hearsay"
    refused(Accelerator, data, "sources.0.grade", "'datasheet'", "hearsay")


def test_the_exact_name_of_a_fact_wins_over_its_group():
    data = table(HOSTS, "dgx-h100")
    data["sources"].append({"grade": "assumed", "source": "an exception to the group", "facts": ["hop_latency_s.simple"]})
    rows = {row["fact"]: row["grade"] for row in validated(Host, data, "test").provenance()}
    assert (rows["hop_latency_s.simple"], rows["hop_latency_s.ll"]) == ("assumed", "published")


def test_profiles_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ACCELERATORS.load("h100-sxm5-80").tdp_w = 1.0


# bad input: what cluster.py refuses


def test_sparse_fp8_peak_is_refused_with_both_peaks():
    data = table(ACCELERATORS, "h100-sxm5-80")
    data["peak_flop_per_s"]["fp8"] = "3958 TFLOP/s"
    refused(Accelerator, data, "4.00 x bf16", "3.96 PFLOP/s", "989 TFLOP/s", "without sparsity")


def test_accelerator_needs_a_half_precision_peak():
    data = table(ACCELERATORS, "a100-sxm4-80")
    data["peak_flop_per_s"] = {"fp32": "19.5 TFLOP/s"}
    refused(Accelerator, data, "peak_flop_per_s needs bf16 or fp16")


def test_no_speed_of_attention_in_8_bits_may_be_written_as_null():
    """Profiles written while it was one optional number have ``fp8_attention: null``; another number is refused by name."""
    data = table(ACCELERATORS, "a100-sxm4-80")
    assert Accelerator.model_validate(data | {"fp8_attention": None}) == ACCELERATORS.load("a100-sxm4-80")
    refused(Accelerator, data | {"fp8_attention": 1.2}, "fp8_attention: must be a table of 'key: value'; found 1.2")


def test_peak_without_efficiency_is_refused():
    data = without(table(ACCELERATORS, "a100-sxm4-80"), "gemm_efficiency.fp32")
    refused(Accelerator, data, "gemm_efficiency lacks fp32")


def test_efficiency_above_one_is_refused():
    refused(Accelerator, table(ACCELERATORS, "a100-sxm4-80") | {"hbm_efficiency": 80}, "hbm_efficiency", "less than or equal to 1", "80")


def test_attention_needs_both_directions():
    data = without(table(ACCELERATORS, "a100-sxm4-80"), "attention_efficiency.backward")
    refused(Accelerator, data, "attention_efficiency needs forward and backward")


def test_nic_in_bytes_instead_of_bits_is_refused_with_both_numbers():
    refused(Host, table(HOSTS, "dgx-h100") | {"nic_bytes_per_s": "400 GB/s"}, "400 GB/s", "3200 Gb/s", "write '400 Gb/s'")


def test_host_without_a_collective_is_refused():
    data = without(table(HOSTS, "dgx-h100"), "bus_bytes_per_s.all_to_all")
    refused(Host, data, "bus_bytes_per_s lacks all_to_all")


def test_tiers_must_grow():
    data = table(FABRICS, "ib-ndr-rail")
    data["tiers"][1]["accelerators"] = 128
    refused(Fabric, data, "ever more accelerators", "[256, 128, 16384]")


def test_fabric_needs_a_tier():
    refused(Fabric, table(FABRICS, "ib-ndr-rail") | {"tiers": []}, "tiers")


def test_oversubscription_is_a_ratio_of_down_to_up():
    data = table(FABRICS, "roce-meta-24k")
    data["tiers"][1]["oversubscription"] = 1 / 7
    refused(Fabric, data, "tiers.1.oversubscription", "greater than or equal to 0.5")


def cluster_table(name: str = "superpod-1024-h100", **changes) -> dict:
    return parts(table(CLUSTERS, name) | changes)


def test_cluster_of_part_hosts_is_refused_with_the_nearest_count():
    refused(Cluster, cluster_table(accelerators=1020), "1020", "multiple of the host's 8", "use 1016")


def test_cluster_bigger_than_its_fabric_is_refused_with_the_reach():
    refused(Cluster, cluster_table(accelerators=32768), "32768", "16384", "ib-ndr-rail", "add a tier")


def test_count_must_be_whole():
    refused(Cluster, cluster_table(accelerators=1024.5), "1024.5 is not a whole number")


def test_slow_host_out_of_range_is_refused_with_the_range():
    refused(Cluster, cluster_table(slow_hosts={128: 1.1}), "host 128", "hosts 0 to 127")


def test_slow_host_that_is_fast_is_refused():
    refused(Cluster, cluster_table(slow_hosts={3: 0.9}), "slow_hosts[3] = 0.9", "write 1.1")


def test_slow_hosts_are_questions_not_facts():
    cluster = validated(Cluster, cluster_table(slow_hosts={3: 1.1}), "test")
    assert cluster.slow_hosts == {3: 1.1}
    assert not any("slow_hosts" in row["fact"] for row in cluster.provenance())


# names and files


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ProfileError, match="unknown accelerator 'h100-sxm-80'; did you mean h100-sxm5-80"):
        ACCELERATORS.load("h100-sxm-80")


def test_cluster_with_unknown_host_is_refused():
    with pytest.raises(ProfileError, match="unknown host 'dgx-h1000'"):
        CLUSTERS.resolve({"base": "superpod-1024-h100", "host": "dgx-h1000"})


def test_base_and_what_differs():
    cluster = CLUSTERS.resolve({"base": "superpod-1024-h100", "accelerators": 512})
    assert (cluster.accelerators, cluster.hosts) == (512, 64)
    assert cluster.name == "superpod-1024-h100 with accelerators"


def test_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("tdp_w: 700 W\ntdp_w: 800 W\n")
    with pytest.raises(ProfileError, match="key tdp_w is given twice"):
        read_yaml(path)
