"""Errors planted in attention's kernels on the CPU, without the tangents."""

import torch
from attention_cases import NAN, assert_right, padded, sample
from host import test_attention, test_attention_contract
from host.attention_calls import whole
from host.mutants import assert_same_on_two_threads, plant

from ditfast.ops import extension


def check_attention():
    """Head dims that fill no vector; two blocks of keys and queries; d in two pieces; a single key; NaN."""
    wide, narrow = ((2, 301, 2, 8), (2, 45, 1, 150)), ((2, 45, 3, 23), (2, 1, 2, 72))
    for (b, n, heads, d), dtype in (*((s, torch.float32) for s in wide), *((s, torch.bfloat16) for s in narrow)):
        qkv, dout = sample(b, n, heads, d, dtype)
        qkv *= torch.linspace(0.2, 1.5, n).view(1, n, 1)
        assert_right(results := attention(qkv, dout, heads), qkv, dout, heads, scale=0.7)
        assert_same_on_two_threads(lambda: attention(qkv, dout, heads), results)  # noqa: B023
    for part in range(3):
        test_attention.test_non_finite_values_propagate(part, NAN, 70, None)


def attention(qkv, dout, heads):
    qkv, dout = padded(qkv), padded(dout)
    out, lse = extension.host_forward(qkv, heads, 0.7)
    dqkv, dbias = extension.host_backward(dout, qkv, out, lse, 0.7, torch.float32)
    return out, whole(lse, qkv.dtype), dqkv, dbias.view(1, 1, -1)


def check_precision():
    """What breaks the contract but not `assert_right`, which allows for more."""
    test_attention_contract.test_weights_of_backward_sum_to_one(None)
    test_attention_contract.test_gradients_of_logits_sum_to_zero(40, None)
    for n, d, dtype in ((2, 152, torch.float32), (3, 152, torch.bfloat16)):
        test_attention_contract.test_gradients_of_few_keys_do_not_cancel(n, d, dtype, None)
    test_attention_contract.test_long_rows_of_few_keys(6, None)
    test_attention_contract.test_with_one_token_only_v_has_a_gradient(None)


PLANTED_IN_ATTENTION = [
    *plant(
        "attention.h",
        check_attention,
        ("sample 0 read", "data + b * p.stride_b", "data"),
        ("old output not rescaled", "load(out + at) * correction[j]", "load(out + at)"),
        ("last piece of keys alone", "first_word == 0 ? before(at, j) : load(to + at)", "before(at, j)"),
        ("last piece of d alone", "first_word == 0 ? line[j] : load(to) + line[j]", "line[j]"),
        ("scale of every piece", "if (is_whole) {", "{"),
        ("heads before parts", "(part * p.heads + h)", "(h * 3 + part)"),
        (
            "NaN without weight",
            "at_least(difference * kExponent<T>, splat(kZeroExponent))",
            "at_least(splat(kZeroExponent), difference * kExponent<T>)",
        ),
    ),
    *plant(
        "attention_forward.cpp",
        check_attention,
        ("scale dropped", "factor(p.scale * kLogit<T>)", "factor(kLogit<T>)"),
        ("old sum not rescaled", "softmax.sum[j] *= correction[j];", ""),
        ("sum of the last piece", "softmax.sum[j] += sum;", "softmax.sum[j] = sum;"),
        ("last key missed", "smaller(kKeys, head.tokens - first);", "smaller(kKeys, head.tokens - first - 1);"),
        ("weight of a key past the last", "key + 1 < keys ? weight(key + 1) : Vec{}", "weight(key + 1)"),
        ("values are keys", "(p, call.qkv, 2, b, h)", "(p, call.qkv, 1, b, h)"),
        ("head 0 written", "(b * p.tokens * p.heads + h) * p.head_dim", "(b * p.tokens * p.heads) * p.head_dim"),
    ),
    *plant(
        "attention_backward.cpp",
        check_attention,
        ("dq of the last block", "first == 0 ? Vec{} : load(dq + at)", "Vec{}"),
        ("dk and dv of the last block", "is_first && first_word == 0 ?", "first_word == 0 ?"),
        ("dk and dv of the last piece", "is_first && first_word == 0 ?", "is_first ?"),
        (
            "dk without queries",
            "add_product(head, head.dlogits, head.q_columns",
            "add_product(head, head.dlogits, head.k_columns",
        ),
        ("dbias of dout", "row[c] = head.dq_sums[c]", "row[c] = head.dout_sums[c]"),
        ("dbias of sample 0", "(b * 3 * p.heads + h) * p.head_dim", "h * p.head_dim"),
        ("lse of sample 0", "call.lse + (b * 2 * p.heads + h)", "call.lse + h"),
        ("sums of sample 0", "*inverse = maximum + p.heads", "*inverse = call.lse + p.heads"),
        ("stride of dout ignored", "return {from, call.dout_stride_n}", "return {from, p.heads * p.head_dim}"),
    ),
    *plant(
        "attention_dlogits.h",
        check_attention,
        ("delta dropped", "c[i][j] -= delta;", ""),
        ("sums not used", "weight_of<T>(logit - maximum) * inverse", "weight_of<T>(logit - maximum)"),
        ("scale dropped", "weight[i][j] * head.scale * c[i][j]", "weight[i][j] * c[i][j]"),
        ("scale dropped after the correction", "weight * head.scale * rest", "weight * rest"),
        ("dq of dweights", "head.dlogits_along_keys + key / W::kNumbers", "head.weights + key / W::kNumbers"),
        ("queries of the first panel", "head.q_panels + panel * inner", "head.q_panels"),
        ("last piece of d alone", "c[i][j] += part[i][j];", "c[i][j] = part[i][j];"),
    ),
    *plant(
        "attention.h",
        check_attention,
        ("lse of sample 0 written", "call.lse + (b * 2 * p.heads + h)", "call.lse + h"),
        ("sums written to the next row", "to + p.heads * p.tokens, inverse", "to + p.tokens, inverse"),
    ),
    *plant(
        "attention.h",
        check_precision,
        ("rows of few keys in one piece", "tokens <= kFewKeys ? 16 : 96", "256"),
    ),
    *plant(
        "attention_dlogits.h",
        check_precision,
        ("delta not corrected", "kPanel + j * kLanes) - mean[j];", "kPanel + j * kLanes);"),
        ("delta corrected only for few keys", "? kKeys : kFewKeys", "? kFewKeys : kFewKeys"),
        ("delta of few keys not corrected in 16 bits", "? kKeys : kFewKeys", "? kKeys : 0"),
        ("keys past the last", "if (key == head.tokens) return Vec{};", ""),
        ("mean without weights", "mean[j] += weight[i][j] * c[i][j];", "mean[j] += c[i][j];"),
    ),
    *plant(
        "pack.h", check_attention, ("odd last number dropped", "if (numbers % 2 == 0) return pairs;", "return pairs;")
    ),
]
