"""A plan cut where voxels become a map, and the sizes of its tensors."""

from __future__ import annotations

from dataclasses import replace

from cpq_train.export.plan import Addition, Concatenation, Convolution, HeightMap, Operation, Plan

MAP = "spatial_features"
"""The output of a sparse part: the map that a dense part starts from."""


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Tensor -> its channels and its cells along z, y, x, or rows and columns, of every tensor of a plan."""
    found = {plan.source: (plan.num_features, *plan.grid)}
    for operation in plan.operations:
        found[operation.name] = _shape(operation, [found[source] for source in operation.sources])
    return found


def _shape(operation: Operation, sources: list[tuple[int, ...]]) -> tuple[int, ...]:
    channels, *grid = sources[0]
    match operation:
        case Convolution(kind="ConvTranspose2d", kernel=kernel):
            return (operation.weight.shape[1], *kernel.transposed_shape(grid, (0, 0)))
        case Convolution(kind="SubMConv3d"):
            return (len(operation.weight), *grid)
        case Convolution(kernel=kernel):
            return (len(operation.weight), *kernel.output_shape(grid))
        case Addition():
            return sources[0]
        case HeightMap():
            return (channels * grid[0], *grid[1:])
        case Concatenation():
            return (sum(source[0] for source in sources), *grid)


def sparse_part(plan: Plan) -> Plan:
    """The operations on voxels, and the map that they end in, as a plan of their own."""
    end = _place_of_map(plan)
    return replace(plan, operations=plan.operations[: end + 1], outputs={MAP: plan.operations[end].name})


def dense_part(plan: Plan) -> Plan:
    """The operations on maps, as a plan of their own that starts from the map."""
    end = _place_of_map(plan)
    source = plan.operations[end].name
    channels, *grid = shapes(plan)[source]
    return Plan(channels, tuple(grid), plan.operations[end + 1 :], plan.outputs, source)


def _place_of_map(plan: Plan) -> int:
    return next(i for i, operation in enumerate(plan.operations) if isinstance(operation, HeightMap))
