"""Sixteen float32 numbers that compiled code handles as one: `Lanes`, its masks, and what can be done with them.

numba compiles loops over arrays, and whether they become vector instructions is left to chance. These types make it
certain: a `Lanes` value is an LLVM vector of 16 floats, which any processor serves with the widest registers it has.
The functions below exist in compiled code only. A block of 4x4 pixels fills one `Lanes`, row by row.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

NUM_LANES = 16
BLOCK_SIZE = 4

# Type checkers take the decorated functions for what numba makes of them: anything.
_vector_function: Any = intrinsic
_FLOATS = ir.VectorType(ir.FloatType(), NUM_LANES)
_INTS = ir.VectorType(ir.IntType(32), NUM_LANES)
_BITS = ir.VectorType(ir.IntType(1), NUM_LANES)
# `contract` lets a product and a sum become one fused instruction; no flag lets the compiler reorder sums.
_FLAGS = ("contract", "nsz")


class VectorType(types.Type):
    """numba type of 16 numbers or truth values that are one LLVM vector."""

    def __init__(self, name: str, vector: ir.VectorType) -> None:
        super().__init__(name=name)
        self.vector = vector


lanes_type, mask_type = VectorType("Lanes", _FLOATS), VectorType("LaneMask", _BITS)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.vector)


@_vector_function
def broadcast(typingctx, value):
    """All lanes equal to a float32."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, context.cast(builder, arguments[0], signature.args[0], types.float32))

    return lanes_type(value), generate


@_vector_function
def load(typingctx, array, offset):
    """The 16 numbers of a flat float32 array from `offset` on."""

    def generate(context, builder, signature, arguments):
        return builder.load(_element_pointer(context, builder, signature, arguments, _FLOATS), align=4)

    return lanes_type(array, types.intp), generate


@_vector_function
def spread(typingctx, array, offset):
    """All lanes equal to one number of a flat float32 array; unlike `array[offset]` it takes no negative offsets."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, builder.load(_element_pointer(context, builder, signature, arguments, ir.FloatType())))

    return lanes_type(array, types.intp), generate


@_vector_function
def store(typingctx, array, offset, lanes):
    """Writes 16 numbers into a flat float32 array from `offset` on."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _element_pointer(context, builder, signature, arguments, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), generate


@_vector_function
def select(typingctx, mask, if_true, if_false):
    """Lane by lane one of two."""
    return lanes_type(mask_type, lanes_type, lanes_type), lambda _, builder, __, arguments: builder.select(*arguments)


@_vector_function
def any_lane(typingctx, mask):
    """Whether at least one lane is true."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], ir.IntType(NUM_LANES))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(mask_type), generate


@_vector_function
def exponential(typingctx, lanes):
    """e^x to two units in the last place; x is taken as -87 where it is lower, and must be below 88.

    e^x = 2^n 2^f with n = round(x log2 e) and |f| <= 1/2, and 2^f by its Taylor polynomial of degree 7 in f ln 2.
    """

    def generate(context, builder, signature, arguments):
        lowest = _constant(-87.0)
        is_higher = builder.fcmp_ordered(">", arguments[0], lowest)
        x = builder.select(is_higher, arguments[0], lowest)
        # Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number, which is left in the low bits.
        shifted = builder.fadd(builder.fmul(x, _constant(1.4426950408889634), _FLAGS), _constant(12582912.0))
        whole = builder.fsub(shifted, _constant(12582912.0))
        # ln 2 in two parts, so that the remainder keeps its last bits.
        rest = builder.fsub(x, builder.fmul(whole, _constant(0.693359375), _FLAGS), _FLAGS)
        rest = builder.fsub(rest, builder.fmul(whole, _constant(-2.12194440e-4), _FLAGS), _FLAGS)
        result = _constant(1 / 5040)
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            result = builder.fadd(builder.fmul(result, rest, _FLAGS), _constant(1 / factorial), _FLAGS)
        exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * NUM_LANES))
        return builder.bitcast(builder.add(builder.bitcast(result, _INTS), exponent), _FLOATS)

    return lanes_type(lanes_type), generate


@_vector_function
def add_sums(typingctx, array, offset, vectors):
    """Adds the sum over the lanes of each of 2^k vectors, a tuple, to as many numbers of a flat float32 array.

    The vectors are added up as a tree of pairs, interleaved at each step, so that all sums share their instructions.
    """
    count = vectors.count

    def generate(context, builder, signature, arguments):
        parts = [builder.extract_value(arguments[2], index) for index in range(count)]
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half:], strict=True)
            parts = [_add_interleaved(builder, first, second) for first, second in pairs]
        total, width = parts[0], NUM_LANES
        while width > count:
            width //= 2
            lower, upper = range(width), range(width, 2 * width)
            total = builder.fadd(_shuffle(builder, total, total, lower), _shuffle(builder, total, total, upper))
        pointer = _element_pointer(context, builder, signature, arguments, total.type)
        builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vectors), generate


def _add_interleaved(builder, first, second):
    """Sums of neighbouring quarters: even places hold sums of `first`, odd places those of `second`."""
    low = [index // 2 + (NUM_LANES if index % 2 else 0) for index in range(NUM_LANES)]
    high = [index + NUM_LANES // 2 for index in low]
    return builder.fadd(_shuffle(builder, first, second, low), _shuffle(builder, first, second, high))


def _shuffle(builder, first, second, indices):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
    return builder.shuffle_vector(first, second, mask)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * NUM_LANES)


def _splat(builder, number):
    single = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.IntType(32)(0))
    return _shuffle(builder, single, single, [0] * NUM_LANES)


def _element_pointer(context, builder, signature, arguments, kind):
    """Where in an array, the first argument, the numbers at an offset, the second, lie as a value of `kind`."""
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())


def _define_operator(function: Any, operand: VectorType, result: VectorType, method: str, *options: str) -> None:
    """Gives vectors an operator that numbers have; `Lanes` also take a float32 on either side."""
    pairs: list[Any] = [(operand, operand)]
    if operand == lanes_type:
        pairs += [(lanes_type, types.float32), (types.float32, lanes_type)]

    @type_callable(function)
    def type_operator(context):
        return lambda first, second: result if (first, second) in pairs else None

    def generate(context, builder, signature, arguments):
        kinds = zip(arguments, signature.args, strict=True)
        operands = [value if kind == operand else _splat(builder, value) for value, kind in kinds]
        flags = _FLAGS if result == lanes_type else ()
        return getattr(builder, method)(*options, *operands, flags=flags)

    for pair in pairs:
        lower_builtin(function, *pair)(generate)


for _function, _method in [("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")]:
    _define_operator(getattr(operator, _function), lanes_type, lanes_type, _method)
for _function, _sign in [("lt", "<"), ("gt", ">"), ("ge", ">="), ("le", "<=")]:
    _define_operator(getattr(operator, _function), lanes_type, mask_type, "fcmp_ordered", _sign)
_define_operator(operator.and_, mask_type, mask_type, "and_")
