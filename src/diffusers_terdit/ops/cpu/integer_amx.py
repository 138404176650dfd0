"""The integer kernel for processors with AMX: tdpbssd multiplies 16 rows x 64 inputs by 64 inputs x 16 outputs.

The four quarters of a panel share a tile of the input. A block of 128 steps of their codes, 32 KB, and of a tile's
integers, 8 KB, fit the first cache. A process asks the system before it uses tiles: see `instructions.processor`.
"""

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range, global_constant
from numba.extending import intrinsic

from .instructions import AMX, at
from .integer import Hooks, Kernel, Shape, cut_of


ROW = 64  # bytes of a row of a tile, of which there are 16
TILE = 16 * ROW
INPUT, CODES = 4, (5, 6, 7, 5)  # tile registers; 0 to 3 hold the sums of the four quarters


def instruction(builder: ir.IRBuilder, name: str, *values: ir.Value) -> None:
    """Append an instruction of `llvm.x86`."""
    function = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), function), values)


def register(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(8), number)


@intrinsic
def configure(typing_context):
    """Let the eight tiles of this thread be 16 rows of 64 bytes."""

    def codegen(context, builder, signature, args):
        palette, bytes_per_row, rows = [1, *[0] * 15], [ROW, 0] * 8 + [0] * 16, [16] * 8 + [0] * 8
        values = bytearray(palette + bytes_per_row + rows)
        sizes = global_constant(builder, "sizes", ir.Constant(ir.ArrayType(ir.IntType(8), 64), values))
        instruction(builder, "ldtilecfg", builder.bitcast(sizes, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release(typing_context):
    def codegen(context, builder, signature, args):
        instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _tile(typing_context, tables, x, codes, apart, steps, sums, first):
    """`sums` (16 rows, 4, 16) int32 of `x` (steps / 16, 16 rows, 16, 4), `codes` (4, steps, 16, 4); see `Hooks`."""

    def codegen(context, builder, signature, args):
        _, x, codes, apart, steps, sums, first = args
        i8, i64 = ir.IntType(8), ir.IntType(64)

        def move(name: str, number: int, address: ir.Value, offset: int, stride: int) -> None:
            instruction(builder, name, register(number), at(builder, address, offset, i8), i64(stride))

        with builder.if_else(builder.icmp_signed("!=", first, first.type(0))) as (then, otherwise):
            with then:
                for quarter in range(4):
                    instruction(builder, "tilezero", register(quarter))
            with otherwise:
                for quarter in range(4):
                    move("tileloadd64", quarter, sums, ROW * quarter, 4 * ROW)
        with for_range(builder, builder.lshr(steps, steps.type(4))) as loop:
            offset = builder.mul(loop.index, i64(TILE))
            move("tileloadd64", INPUT, builder.add(x, offset), 0, ROW)
            address = builder.add(codes, offset)
            for quarter in range(4):
                move("tileloadd64", CODES[quarter], address, 0, ROW)
                instruction(builder, "tdpbssd", *map(register, (quarter, INPUT, CODES[quarter])))
                address = builder.add(address, apart)
        for quarter in range(4):
            move("tilestored64", quarter, sums, ROW * quarter, 4 * ROW)
        return context.get_dummy_value()

    address, size = types.uintp, types.intp
    return types.void(address, address, address, size, size, address, size), codegen


SHAPE = Shape(rows=16, lanes=16, vectors=1, steps=128, strip=512, panels=4, turn=16, run=16, signed=1)
KERNEL = Kernel(
    name="amx_int8",
    features=AMX,
    shape=SHAPE,
    hooks=Hooks(cut_of(SHAPE), _tile, begin=configure, end=release),
)
