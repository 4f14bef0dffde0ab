"""Sums of products over pairs of rows, in vector registers: what convolutions spend their time in.

Numba's own loops leave to LLVM what stays in a register, and it seldom sees that a block of sums can. So the
innermost loops are written as LLVM instructions: a few rows at a time, their sums in registers. Vectors have
16 numbers; a processor with shorter ones takes them in pieces.

The number of columns and of rows at a time has to be known when a loop is compiled: it comes as a tuple of so
many zeros, whose length is part of its type. Addresses are integers, sizes are in numbers.

A tile is a run of output voxels that lie near one another. All cells of a kernel are added to a tile before
the next one begins, so that its sums stay in the processor's cache; and a tile's sums depend on no other
tile, so that threads can share them out.

Numba keeps what it compiled as long as this file stays as it is, whatever it imports: all of it stands here.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from cpq_train.common.compiled import compiled

LANES = 16
"""Numbers of 32 bits in a vector."""

binding.initialize_native_asmparser()  # for an instruction that is called by its name

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_SIZE = 4
"""Bytes of a number of 32 bits, and of four codes."""


@intrinsic
def add_products(typing, of_kind, x, in_rows, weight, out, out_rows, depth, width, vectors, rows):
    """`out[o] += x[i] @ weight` for pairs of rows (i, o), each product summed by itself before it is added.

    Of fp32 numbers, or of u8 codes with s8 codes into int32, which is exact: an instruction of AVX-512 VNNI
    multiplies four codes with four and adds the products to a sum.

    Args:
        typing: Numba's.
        of_kind: Any number of the type of x.
        x: Address of (rows, depth), fp32 or u8.
        in_rows: Address of the int32 rows of x.
        weight: Address of fp32 (depth, width), or of s8 (depth / 4, width, 4), at the first of the columns.
        out: Address of (rows, width), fp32 or int32, at the first of the columns.
        out_rows: Address of the int32 rows of out, all different.
        depth: Columns of x.
        width: Columns of the whole weight.
        vectors: As many zeros as 16 columns are taken.
        rows: As many zeros as pairs are taken.
    """
    kind = _OF_CODES if of_kind == types.uint8 else _OF_NUMBERS

    def generate(context, builder, signature, arguments):
        _add_products(_Code(builder), kind, arguments[1:8], vectors.count, rows.count)
        return context.get_dummy_value()

    return types.void(of_kind, *[types.int64] * 7, vectors, rows), generate


@intrinsic
def add_outer_products(typing, x, in_rows, grad, out_rows, num_pairs, depth, width, sums, vectors, columns):
    """`sums += x[i].T @ grad[o]` over pairs of rows (i, o), for a block of the columns of both.

    Args:
        typing: Numba's.
        x: Address of fp32 (rows, depth), at the first of its columns.
        in_rows: Address of the int32 rows of x.
        grad: Address of fp32 (rows, width), at the first of its columns.
        out_rows: Address of the int32 rows of grad.
        num_pairs: How many there are.
        depth: Columns of the whole x.
        width: Columns of the whole grad.
        sums: Address of fp32 (depth, width), at the first of both.
        vectors: As many zeros as 16 columns of grad are taken.
        columns: As many zeros as columns of x are taken.
    """

    def generate(context, builder, signature, arguments):
        code = _Code(builder)
        x_at, in_at, grad_at, out_at, count, depth_, width_, sums_at = arguments[:8]
        block = [(c, v) for c in range(columns.count) for v in range(vectors.count)]
        places = [
            (builder.add(sums_at, builder.mul(code.number(_SIZE * c), width_)), _SIZE * LANES * v)
            for c, v in block
        ]

        def body(pair: Any, totals: Sequence[Any]) -> list[Any]:
            place = builder.mul(pair, code.number(_SIZE))
            x_row = code.row(x_at, builder.add(in_at, place), builder.mul(depth_, code.number(_SIZE)))
            grad_row = code.row(grad_at, builder.add(out_at, place), builder.mul(width_, code.number(_SIZE)))
            grads = [code.load(grad_row, _FLOATS, _SIZE * LANES * v) for v in range(vectors.count)]
            lanes = [code.splat(code.load(x_row, _F32, _SIZE * c), _FLOATS) for c in range(columns.count)]
            return [
                _fused_multiply_add(builder, total, lanes[c], grads[v])
                for (c, v), total in zip(block, totals, strict=True)
            ]

        totals = code.loop(count, [ir.Constant(_FLOATS, [0] * LANES)] * len(block), body)
        for (address, offset), total in zip(places, totals, strict=True):
            before = code.load(address, _FLOATS, offset)
            code.store(builder.fadd(before, total), address, offset)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, vectors, columns), generate


class _Kind(NamedTuple):
    """What differs between products of numbers and of codes.

    Attributes:
        scalar: What is read of x at a time and spread over a vector.
        vector: Of weights and sums.
        numbers_per_step: Columns of x in one scalar.
        multiply: Builder, sum, spread scalar, weights -> the new sum.
        add: Builder, two vectors -> their sum.
    """

    scalar: Any
    vector: Any
    numbers_per_step: int
    multiply: Callable[[Any, Any, Any, Any], Any]
    add: Callable[[Any, Any, Any], Any]


def _fused_multiply_add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    name, kind = "llvm.fma.v16f32", ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [a, b, total])


def _dot_of_codes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    # By the instruction's name: how LLVM's own function for it is called changes between its versions.
    kind = ir.FunctionType(_INTS, [_INTS] * 3)
    return builder.call(ir.InlineAsm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v"), [total, unsigned, signed])


_OF_NUMBERS = _Kind(_F32, _FLOATS, 1, _fused_multiply_add, lambda builder, a, b: builder.fadd(a, b))
_OF_CODES = _Kind(_I32, _INTS, 4, _dot_of_codes, lambda builder, a, b: builder.add(a, b))


def _add_products(
    code: _Code, kind: _Kind, arguments: Sequence[Any], num_vectors: int, num_rows: int
) -> None:
    builder = code.builder
    x_at, in_at, weight_at, out_at, out_rows_at, depth, width = arguments[:7]
    x_row_bytes = builder.mul(depth, code.number(_SIZE // kind.numbers_per_step))
    out_row_bytes = builder.mul(width, code.number(_SIZE))
    x_rows, out_rows = (
        [
            code.row(start, builder.add(rows_at, code.number(_SIZE * row)), num_bytes)
            for row in range(num_rows)
        ]
        for start, rows_at, num_bytes in ((x_at, in_at, x_row_bytes), (out_at, out_rows_at, out_row_bytes))
    )
    block = [(row, vector) for row in range(num_rows) for vector in range(num_vectors)]

    def body(step: Any, totals: Sequence[Any]) -> list[Any]:
        weight_row = builder.add(weight_at, builder.mul(step, out_row_bytes))
        weights = [code.load(weight_row, kind.vector, _SIZE * LANES * v) for v in range(num_vectors)]
        place = builder.mul(step, code.number(_SIZE))
        lanes = [code.splat(code.load(builder.add(row, place), kind.scalar), kind.vector) for row in x_rows]
        return [
            kind.multiply(builder, total, lanes[row], weights[vector])
            for (row, vector), total in zip(block, totals, strict=True)
        ]

    steps = builder.sdiv(depth, code.number(kind.numbers_per_step))
    totals = code.loop(steps, [ir.Constant(kind.vector, [0] * LANES)] * len(block), body)
    for (row, vector), total in zip(block, totals, strict=True):
        offset = _SIZE * LANES * vector
        before = code.load(out_rows[row], kind.vector, offset)
        code.store(kind.add(builder, before, total), out_rows[row], offset)


class _Code:
    """Instructions, written where the builder stands."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def number(self, value: int) -> Any:
        """An integer of 64 bits."""
        return ir.Constant(_I64, value)

    def load(self, address: Any, kind: Any, offset: int = 0) -> Any:
        """What is at an address; only aligned to its numbers."""
        place = self.builder.add(address, self.number(offset))
        loaded = self.builder.load(self.builder.inttoptr(place, kind.as_pointer()))
        loaded.align = 1 if kind is _I32 else _SIZE
        return loaded

    def store(self, value: Any, address: Any, offset: int) -> None:
        """Writes a vector."""
        place = self.builder.add(address, self.number(offset))
        self.builder.store(value, self.builder.inttoptr(place, value.type.as_pointer())).align = _SIZE

    def row(self, start: Any, row_at: Any, num_bytes: Any) -> Any:
        """Address of the row of a matrix whose number is at `row_at`."""
        row = self.builder.sext(self.load(row_at, _I32), _I64)
        return self.builder.add(start, self.builder.mul(row, num_bytes))

    def splat(self, value: Any, vector: Any) -> Any:
        """A vector of one number."""
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))

    def loop(
        self,
        count: Any,
        start: Sequence[Any],
        body: Callable[[Any, Sequence[Any]], list[Any]],
    ) -> Sequence[Any]:
        """Values behind a loop of `count` rounds, each of which makes new ones from the old."""
        builder = self.builder
        before = builder.block
        head, inside, behind = (builder.append_basic_block(name) for name in ("head", "inside", "behind"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(_I64)
        index.add_incoming(self.number(0), before)
        values = [builder.phi(value.type) for value in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, behind)
        builder.position_at_end(inside)
        new = body(index, values)
        index.add_incoming(builder.add(index, self.number(1)), builder.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(behind)
        return values


ONE_ROW = (0,)
"""For the pairs that are left over."""


@compiled
def add_tiles(
    x: Any, pairs_in: Any, weight: Any, out: Any, pairs_out: Any,
    tiles: Any, cells: Any, first_tile: int, last_tile: int, first: int, last: int, vectors: Any, rows: Any,
) -> None:  # fmt: skip
    """Convolves into tiles, and into a range of columns: `out[o] += x[i] @ weight[cell]`.

    Args:
        x: (V_in, C), fp32 or u8.
        pairs_in: int32 (cells, pairs), rows of x.
        weight: fp32 (cells, C, C'), or s8 (cells, C / 4, C', 4).
        out: (V_out, C'), fp32 or int32; added to.
        pairs_out: int32 (cells, pairs), rows of out.
        tiles: int64 (tiles + 1, cells), the first pair of each cell in each tile.
        cells: int64, the order in which cells are added.
        first_tile: The first one to compute.
        last_tile: The one behind the last.
        first: The first column.
        last: The one behind the last, a whole number of `vectors` away.
        vectors: See `add_products`.
        rows: Likewise.
    """
    depth, width, many, of_kind = x.shape[1], out.shape[1], len(rows), x.dtype.type(0)
    x_at, out_at = x.ctypes.data, out.ctypes.data
    for tile in range(first_tile, last_tile):
        for cell in cells:
            in_at, out_rows_at = pairs_in[cell].ctypes.data, pairs_out[cell].ctypes.data
            weight_at = weight[cell].ctypes.data
            for column in range(first, last, LANES * len(vectors)):
                pair, end = tiles[tile, cell], tiles[tile + 1, cell]
                while pair + many <= end:
                    add_products(
                        of_kind, x_at, in_at + 4 * pair, weight_at + 4 * column, out_at + 4 * column,
                        out_rows_at + 4 * pair, depth, width, vectors, rows,
                    )  # fmt: skip
                    pair += many
                while pair < end:
                    add_products(
                        of_kind, x_at, in_at + 4 * pair, weight_at + 4 * column, out_at + 4 * column,
                        out_rows_at + 4 * pair, depth, width, vectors, ONE_ROW,
                    )  # fmt: skip
                    pair += 1


@compiled
def add_weight_gradients(
    x: Any, pairs_in: Any, grad: Any, pairs_out: Any, tiles: Any, sums: Any,
    first_cell: int, last_cell: int, first: int, last: int, vectors: Any, columns: Any,
) -> None:  # fmt: skip
    """Adds `x[i].T @ grad[o]` to a range of cells, and of columns of grad: `sums[cell]`.

    Args:
        x: fp32 (V_in, C).
        pairs_in: int32 (cells, pairs), rows of x.
        grad: fp32 (V_out, C').
        pairs_out: int32 (cells, pairs), rows of grad.
        tiles: int64 (tiles + 1, cells), the first pair of each cell in each tile.
        sums: fp32 (cells, C, C'); added to.
        first_cell: The first one to compute.
        last_cell: The one behind the last.
        first: The first column of grad.
        last: The one behind the last, a whole number of `vectors` away.
        vectors: See `add_outer_products`.
        columns: Likewise; what is left of C is taken one by one.
    """
    depth, width, many = x.shape[1], grad.shape[1], len(columns)
    x_at, grad_at = x.ctypes.data, grad.ctypes.data
    for tile in range(len(tiles) - 1):
        for cell in range(first_cell, last_cell):
            begin = tiles[tile, cell]
            count = tiles[tile + 1, cell] - begin
            in_at, out_at = pairs_in[cell].ctypes.data + 4 * begin, pairs_out[cell].ctypes.data + 4 * begin
            sums_at = sums[cell].ctypes.data
            for column in range(first, last, LANES * len(vectors)):
                row = 0
                while row + many <= depth:
                    add_outer_products(
                        x_at + 4 * row, in_at, grad_at + 4 * column, out_at, count, depth, width,
                        sums_at + 4 * (row * width + column), vectors, columns,
                    )  # fmt: skip
                    row += many
                while row < depth:
                    add_outer_products(
                        x_at + 4 * row, in_at, grad_at + 4 * column, out_at, count, depth, width,
                        sums_at + 4 * (row * width + column), vectors, ONE_ROW,
                    )  # fmt: skip
                    row += 1
