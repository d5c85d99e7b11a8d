"""Errors planted in the tangents of the CPU kernels."""

from functools import partial

import torch
from host import test_attention_jvp, test_rows_jvp
from host.mutants import plant
from ops.row_ops import INPUTS, Case


def check_rows(op):
    """Two tasks of rows, the last not full, and columns that fill no vector; tangents that lie otherwise."""
    for dtype in ("mixed", "fp32"):
        test_rows_jvp.check(Case(op, dtype, b=3, n=21, d=40, layout="strided"), "dense")


check_norm, check_residual, check_junction = (partial(check_rows, op) for op in INPUTS)


def check_attention():
    """Odd numbers of keys, several blocks of them, one key with all the weight or none; head dims of no vector."""
    for shape, dtype in (((2, 45, 3, 23), torch.bfloat16), ((2, 77, 2, 24), torch.float32)):
        qkv, qkv_t = test_attention_jvp.problem(*shape, dtype=dtype)
        test_attention_jvp.assert_right(qkv, test_attention_jvp.padded(qkv_t), heads=shape[2], scale=0.7)
    test_attention_jvp.test_weights_that_grow_from_block_to_block(torch.float32, None)
    test_attention_jvp.test_one_key_has_all_the_weight(300, torch.float32)
    test_attention_jvp.test_keys_of_logit_minus_infinity_have_no_weight(600, 300, None)


PLANTED_IN_JVP = [
    *plant(
        "rows_jvp.cpp",
        check_residual,
        ("tangent of x dropped", "(gate * biased_t + tangent)", "gate * biased_t"),
        (
            "tangent of the gate swapped with the gate",
            "load(s.gate_t + i) * biased + (gate * biased_t",
            "load(s.gate_t + i) * biased_t + (gate * biased",
        ),
        (
            "tangent of the bias dropped",
            "load_or_zero(y_t, i, extent) + load(s.bias_t + i)",
            "load_or_zero(y_t, i, extent)",
        ),
        ("tangent of the gate of sample 0", "widen_sample(call.gate_t, b", "widen_sample(call.gate_t, 0"),
        ("tangent of x of sample 0", "row_of<Stream>(call.x_t, b, n)", "row_of<Stream>(call.x_t, 0, n)"),
        ("last row of a task missed", "smaller(p.tokens, first + kRows)", "smaller(p.tokens, first + kRows - 1)"),
    ),
    *plant(
        "rows_jvp.cpp",
        check_norm,
        ("tangent of the shift dropped", " + load(s.shift_t + i))", ")"),
        ("tangent of the scale dropped", "normal * load(s.scale_t + i) + ", ""),
        ("tangent of the scale of sample 0", "widen_sample(call.scale_t, b", "widen_sample(call.scale_t, 0"),
        ("mean of the tangent kept", "(load(s.row_t + i) - mean_t) - normal", "load(s.row_t + i) - normal"),
        ("normal part kept", " - normal * along", ""),
        ("one rstd for two", "sum_lanes(products) / size * rstd", "sum_lanes(products) / size"),
        ("tangent not scaled", "normal_t * scale1", "normal_t"),
    ),
    *plant(
        "rows_jvp.cpp",
        check_junction,
        ("norm of the tangent of x", "tangent = keep(widen(x_new_t, stored_t), extent);", ""),
    ),
    *plant(
        "attention_jvp.cpp",
        check_attention,
        ("tangent of sample 0", "call.qkv_t, part, b, h)", "call.qkv_t, part, 0, h)"),
        ("stride of the tangent ignored", "of_tangent.stride_n = call.qkv_t_stride_n;", ""),
        ("tangent of q twice", "from(head.k_t), head.query, keys", "from(head.k_t), head.query_t, keys"),
        ("tangent of q dropped", "return load(logits_t + at);", "return Vec{};"),
        (
            "scale of the tangents dropped",
            "const Vec product = w * (load(logit_t + key * kPanel) * head.scale - mean)",
            "const Vec product = w * (load(logit_t + key * kPanel) - mean)",
        ),
        ("mean subtracted after the product", "sum > 0.0f ? moment / sum : Vec{}", "0.0f * sum"),
        ("mean of no weight", "sum > 0.0f ? moment / sum : Vec{}", "moment / sum"),
        ("what rounding left dropped", "load(head.out_t + at) - rest * load(head.out + at)", "load(head.out_t + at)"),
        (
            "rest not brought in line",
            "before.rest[j] * correction - step * sum_before + rest",
            "before.rest[j] * correction + rest",
        ),
        ("old sum not brought in line", "before.sum[j] * correction;", "before.sum[j];"),
        ("moved mean not corrected", "load(out_t + at) - update.step[j] * load(out + at)", "load(out_t + at)"),
        ("old tangent not brought in line", "load(out + at)) * update.correction[j]", "load(out + at))"),
        (
            "tangent of v dropped",
            "multiply_panel<W>(kPiece<T>, v_t, head.operand",
            "multiply_panel<W>(kPiece<T>, v, head.operand",
        ),
        ("last key missed", "smaller(kKeys, p.tokens - first)", "smaller(kKeys, p.tokens - first - 1)"),
        (
            "weight of a key that is none",
            "key + 1 < keys ? weight(key + 1, part_of_moment) : Vec{}",
            "weight(key + 1, part_of_moment)",
        ),
        ("infinite shift", "before.maximum[j] == -kInfinity ? before.maximum[j] : shift", "shift"),
    ),
]
