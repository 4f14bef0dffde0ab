"""The storage tree against the published tables, and stored bytes against counting by hand."""

import re

import torch
from profiled_networks import ResNet50
from torch import nn

from cpq_train.models import CenterPoint
from cpq_train.profiling.storage import format_count, storage_rows, weight_bits
from cpq_train.quantization.costs import count_costs
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.scheme import Scheme

TABLE = re.compile(r"\| name +\| #elements or shape +\|\n\|:-+\|:-+\|\n((?:\|.*\|\n)+)")


def _published(seed_text: str) -> list[list[tuple[str, str]]]:
    """Rows of the two storage tables of the seed, their indents kept."""
    tables = TABLE.findall(seed_text)
    assert len(tables) == 2
    return [[_cells(line) for line in table.splitlines()] for table in tables]


def _cells(line: str) -> tuple[str, str]:
    name, count = line.strip("|").split("|")
    return name[1:].rstrip(), count[1:].rstrip()


def test_centerpoint_line_for_line(seed_text: str) -> None:
    published, _ = _published(seed_text)
    assert len(published) == 41
    assert [row.cells() for row in storage_rows(CenterPoint())] == published


def test_resnet50_line_for_line(seed_text: str) -> None:
    _, published = _published(seed_text)
    assert [row.cells() for row in storage_rows(ResNet50())] == published


def test_operations_of_resnet50(seed_text: str) -> None:
    network = ResNet50().eval()
    layers = [name for name, _ in network.named_modules() if name]

    @torch.no_grad()
    def run() -> int:
        return len(network(torch.zeros(1, 3, 224, 224)))

    total = sum(cost.num_macs for cost in count_costs(network, layers, run).values())
    (published,) = re.findall(r"FLOPs: +(\d+)", seed_text)
    assert total == 4_089_184_256 == int(published)


def test_module_tree_has_the_published_layers(seed_text: str) -> None:
    """Every dense layer and normalisation, in their order, by the names and the form of the printout."""

    def layers(text: str) -> list[str]:
        kinds = r"(?:Conv2d|ConvTranspose2d|ZeroPad2d|BatchNorm[12]d|ReLU)"
        return re.findall(rf"^ +\(\w+\): {kinds}\(.*\)$", text, re.MULTILINE)

    # Newer releases of torch print the bias of a normalisation.
    tree = str(CenterPoint()).replace("affine=True, bias=True", "affine=True")
    assert len(layers(seed_text)) > 100
    assert layers(tree) == layers(seed_text)
    sparse = r"\(\w+\): (?:SubM|Sparse)Conv3d\((\d+), (\d+), kernel_size=(\[.*?\]), stride=(\[.*?\])"
    assert re.findall(sparse, tree) == re.findall(sparse, seed_text)


def test_counts_are_written_as_fvcore_does() -> None:
    written = {99: "99", 100: "100", 101: "0.1K", 27_776: "27.8K", 100_000: "100.0K", 100_001: "0.1M"}
    assert {count: format_count(count) for count in written} == written
    assert format_count(8_884_908) == "8.9M"
    assert format_count(200_000_000) == "0.2G"


def test_stored_bytes_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    scheme = {
        "defaults": {"weight": {"bits": 4}, "input": {"bits": 8}},
        "rules": [{"layers": "3", "weight": {"bits": 8}, "input": "off"}],
    }
    prepare(network, Scheme.from_dict(scheme), torch.ones(1, 3, 5, 5))
    assert weight_bits(network) == {"0.weight": 4, "3.weight": 8}
    rows = {row.name: row for row in storage_rows(network)}
    weights, bias = 3 * 8 * 9, 8
    ranges = 8 + 1  # one per output channel, one of the input
    assert rows["0"].num_elements == weights + bias
    assert rows["0"].float_bytes == 4 * (weights + bias)
    assert rows["0"].stored_bytes == weights / 2 + 4 * bias + 4 * ranges
    assert rows["3"].stored_bytes == 8 * 4 + 4 * 4 + 4 * 4
    assert rows["model"].stored_bytes == rows["0"].stored_bytes + rows["3"].stored_bytes
    assert rows["0.weight"].shape == (8, 3, 3, 3)
    assert rows["0.weight"].stored_bytes == weights / 2


def test_learned_ranges_are_stored_once() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    prepare(network, Scheme.from_dict({}), torch.ones(1, 3, 5, 5))
    before = storage_rows(network)
    network[0]._weight_quantizer.learn()
    assert storage_rows(network) == before


def test_a_parameter_free_model() -> None:
    (row,) = storage_rows(nn.ReLU())
    assert (row.cells(), row.stored_bytes) == (("model", "0"), 0)
