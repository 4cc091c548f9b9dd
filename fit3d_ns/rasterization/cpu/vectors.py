"""Sixteen float32 numbers that compiled code handles as one: `Lanes`, its masks, and what can be done with them.

numba compiles loops over arrays, and whether they become vector instructions is left to chance. These types make it
certain: a `Lanes` value is an LLVM vector of 16 floats, which any processor serves with the widest registers it has.
The functions below exist in compiled code only. A block of 4x4 pixels fills one `Lanes`, row by row.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model
from numba.np.arrayobj import make_array

NUM_LANES = 16
BLOCK_SIZE = 4

# Type checkers take the decorated functions for what numba makes of them: anything.
_vector_function: Any = intrinsic
_FLOATS = ir.VectorType(ir.FloatType(), NUM_LANES)
_INTS = ir.VectorType(ir.IntType(32), NUM_LANES)
_BITS = ir.VectorType(ir.IntType(1), NUM_LANES)
# `contract` lets a product and a sum become one fused instruction; no flag lets the compiler reorder sums.
_FLAGS = ("contract", "nsz")


class LanesType(types.Type):
    """numba type of 16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


class MaskType(types.Type):
    """numba type of 16 truth values."""

    def __init__(self) -> None:
        super().__init__(name="LaneMask")


lanes_type, mask_type = LanesType(), MaskType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _FLOATS)


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _BITS)


@_vector_function
def broadcast(typingctx, value):
    """All lanes equal to a float32."""

    def generate(context, builder, signature, arguments):
        number = context.cast(builder, arguments[0], signature.args[0], types.float32)
        return _splat(builder, number)

    return lanes_type(value), generate


@_vector_function
def load(typingctx, array, offset):
    """The 16 numbers of a flat float32 array from `offset` on."""

    def generate(context, builder, signature, arguments):
        pointer = _lane_pointer(context, builder, signature, arguments)
        return builder.load(pointer, align=4)

    return lanes_type(array, types.intp), generate


@_vector_function
def spread(typingctx, array, offset):
    """All lanes equal to one number of a flat float32 array; unlike `array[offset]` it takes no negative offsets."""

    def generate(context, builder, signature, arguments):
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        return _splat(builder, builder.load(builder.gep(data, [arguments[1]])))

    return lanes_type(array, types.intp), generate


@_vector_function
def store(typingctx, array, offset, lanes):
    """Writes 16 numbers into a flat float32 array from `offset` on."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _lane_pointer(context, builder, signature, arguments), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), generate


@_vector_function
def block_columns(typingctx):
    """Column of each lane within its 4x4 block: 0 1 2 3 0 1 2 3 ..."""
    return lanes_type(), lambda *_: ir.Constant(_FLOATS, [float(lane % BLOCK_SIZE) for lane in range(NUM_LANES)])


@_vector_function
def block_rows(typingctx):
    """Row of each lane within its 4x4 block: 0 0 0 0 1 1 1 1 ..."""
    return lanes_type(), lambda *_: ir.Constant(_FLOATS, [float(lane // BLOCK_SIZE) for lane in range(NUM_LANES)])


@_vector_function
def select(typingctx, mask, if_true, if_false):
    """Lane by lane one of two."""

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return lanes_type(mask_type, lanes_type, lanes_type), generate


@_vector_function
def both(typingctx, first, second):
    """Lane by lane `and`."""

    def generate(context, builder, signature, arguments):
        return builder.and_(*arguments)

    return mask_type(mask_type, mask_type), generate


@_vector_function
def any_lane(typingctx, mask):
    """Whether at least one lane is true."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], ir.IntType(NUM_LANES))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(mask_type), generate


@_vector_function
def absolute(typingctx, lanes):
    """Absolute values."""

    def generate(context, builder, signature, arguments):
        without_sign = ir.Constant(_INTS, [0x7FFFFFFF] * NUM_LANES)
        return builder.bitcast(builder.and_(builder.bitcast(arguments[0], _INTS), without_sign), _FLOATS)

    return lanes_type(lanes_type), generate


@_vector_function
def minimum(typingctx, lanes, bound):
    """Lane by lane the smaller of two."""

    def generate(context, builder, signature, arguments):
        is_less = builder.fcmp_ordered("<", arguments[0], arguments[1])
        return builder.select(is_less, arguments[0], arguments[1])

    return lanes_type(lanes_type, lanes_type), generate


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
        width = NUM_LANES
        while len(parts) > 1:
            parts = [_add_interleaved(builder, first, second) for first, second in _pairs(parts)]
        total = parts[0]
        while width > count:
            width //= 2
            total = builder.fadd(_shuffle(builder, total, total, range(width)), _upper(builder, total, width))
        array_type = signature.args[0]
        data = make_array(array_type)(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), total.type.as_pointer())
        builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vectors), generate


def _pairs(parts):
    half = len(parts) // 2
    return zip(parts[:half], parts[half:], strict=True)


def _upper(builder, lanes, width):
    return _shuffle(builder, lanes, lanes, range(width, 2 * width))


def _add_interleaved(builder, first, second):
    """Sums of neighbouring quarters: even places hold sums of `first`, odd places those of `second`."""
    half = NUM_LANES // 2
    low = [index // 2 + (NUM_LANES if index % 2 else 0) for index in range(NUM_LANES)]
    high = [index + half for index in low]
    return builder.fadd(_shuffle(builder, first, second, low), _shuffle(builder, first, second, high))


def _shuffle(builder, first, second, indices):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
    return builder.shuffle_vector(first, second, mask)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * NUM_LANES)


def _splat(builder, number):
    single = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.IntType(32)(0))
    return _shuffle(builder, single, single, [0] * NUM_LANES)


def _lane_pointer(context, builder, signature, arguments):
    data = make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), _FLOATS.as_pointer())


def _define_operators() -> None:
    """Gives `Lanes` the arithmetic operators and comparisons of numbers, also against a float32."""
    from numba.core.typing.templates import ConcreteTemplate, infer_global
    from numba.extending import lower_builtin

    pairs = [(lanes_type, lanes_type), (lanes_type, types.float32), (types.float32, lanes_type)]
    arithmetic = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
    comparisons = {operator.lt: "<", operator.gt: ">", operator.ge: ">=", operator.le: "<="}
    for function in [*arithmetic, *comparisons]:
        result = lanes_type if function in arithmetic else mask_type

        class Template(ConcreteTemplate):
            cases = [result(*pair) for pair in pairs]

        infer_global(function)(Template)
        for pair in pairs:
            lower_builtin(function, *pair)(_lowering(arithmetic.get(function), comparisons.get(function)))


def _lowering(method: str | None, comparison: str | None):
    def generate(context, builder, signature, arguments):
        operands = [
            value if kind == lanes_type else _splat(builder, value)
            for value, kind in zip(arguments, signature.args, strict=True)
        ]
        if comparison is not None:
            return builder.fcmp_ordered(comparison, *operands)
        return getattr(builder, str(method))(*operands, flags=_FLAGS)

    return generate


_define_operators()
