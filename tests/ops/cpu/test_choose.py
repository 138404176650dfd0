"""Which kernel a CPU gets, why, and what is said where there is a better one."""

import logging

import pytest
import torch
from weights import new_weight

from diffusers_terdit.ops import (
    check_integers,
    choose_kernel,
    has_integer_kernel,
    integer_linear,
    linear,
    reference,
    ternary_linear,
    torch_ops,
)
from diffusers_terdit.ops.cpu import choose


CPU = torch.device("cpu")
INSTALL = "pip install numba"
FASTER = f"bfloat16 on this CPU would be faster and more accurate with numba: {INSTALL}"
NO_AVX2 = "This processor has no AVX2 (ARM: dotprod), which the integer kernels need; ternary layers compute exactly."
FLOATS = [torch.float32, torch.float16, torch.float64]


def by_reference(input, weights, bits):
    return [reference.integer_linear(input, *weight, bits) for weight in weights]


@pytest.fixture
def best(monkeypatch):
    """The name of the best kernel, where any is there."""
    if next(iter(choose.integer_kernels()), "avx2") in choose.NO_FASTER_THAN_EXACT:
        monkeypatch.setattr(choose, "integer_kernels", lambda: {"avx512_vnni_lookup": by_reference})
    return next(iter(choose.integer_kernels()))


@pytest.fixture(params=["no numba", "no AVX2"])
def missing(request, monkeypatch):
    """A machine without the integer kernels, and why."""
    if request.param == "no AVX2":
        pytest.importorskip("numba")
    monkeypatch.setattr(choose, "integer_kernels", dict)
    monkeypatch.setattr(choose, "has_numba", lambda: request.param != "no numba")
    torch_ops.warn_once.cache_clear()
    yield request.param
    torch_ops.warn_once.cache_clear()


def test_only_bfloat16_is_rounded_by_itself_and_others_when_asked(best):
    for dtype in FLOATS:
        assert choose_kernel(CPU, dtype, 64, 64).bits is None
        assert "not rounded unless asked for" in choose_kernel(CPU, dtype, 64, 64).reason
    assert choose_kernel(CPU, torch.bfloat16, 64, 64)[:2] == (best, 16)
    assert choose_kernel(CPU, torch.bfloat16, 64, 64, requested_bits=None).bits is None
    for dtype in (*FLOATS, torch.bfloat16):
        for bits in (8, 16):
            choice = choose_kernel(CPU, dtype, 64, 64, "row", requested_bits=bits)
            assert choice == (best, bits, f"{bits}-bit inputs were asked for")


def test_what_a_layer_was_trained_with_comes_first(best):
    for requested in ("auto", 8):
        choice = choose_kernel(CPU, torch.bfloat16, 64, 64, requested_bits=requested, trained_bits=8)
        assert choice == (best, 8, "the layer was trained with 8-bit inputs")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"scale_granularity": 32, "trained_bits": 8}, "trained with one per row"),
        ({"packed": False}, "a float weight is ternarized in every call"),
        ({"in_features": 2**16 + 4}, "int32 does not hold sums of 65540 inputs of 16 bits"),
    ],
)
def test_what_no_integer_kernel_takes(best, case, reason):
    choice = choose_kernel(CPU, torch.bfloat16, **{"out_features": 64, "in_features": 64, **case})
    assert choice.bits is None
    assert reason in choice.reason


@pytest.fixture
def no_amx(monkeypatch):
    instructions = pytest.importorskip("diffusers_terdit.ops.cpu.instructions")
    monkeypatch.setattr(instructions, "processor", lambda: instructions.Processor("any", frozenset({"+avx2"})))


@pytest.mark.parametrize("name", choose.NO_FASTER_THAN_EXACT)
def test_where_exact_is_as_fast_as_integers_of_16_bits(monkeypatch, no_amx, name):
    monkeypatch.setattr(choose, "integer_kernels", lambda: {name: by_reference})
    for bits in ("auto", 16):
        choice = choose_kernel(CPU, torch.bfloat16, 128, 64, requested_bits=bits)
        assert choice == ("exact, lookups in float32", None, f"16-bit integers ({name}) would be no faster")
        assert choose_kernel(CPU, torch.bfloat16, 124, 64, requested_bits=bits)[:2] == (name, 16)  # it is decoded
    assert choose_kernel(CPU, torch.float32, 128, 64, requested_bits=8)[:2] == (name, 8)
    assert (choose_kernel(CPU, torch.float32, 128, 64, requested_bits=16).bits == 16) == (name == "amx_int8")
    assert choose_kernel(CPU, torch.bfloat16, 128, 64, trained_bits=8)[:2] == (name, 8)


def test_how_an_exact_layer_is_computed(monkeypatch, no_amx):
    def kernel(dtype, outputs):
        torch_ops.decide.cache_clear()
        return choose_kernel(CPU, dtype, outputs, 64, requested_bits=None).kernel

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernel(dtype, 128) == "exact, lookups in float32"
    assert kernel(torch.float32, 124) == "exact, matmul in float32"
    assert kernel(torch.float64, 128) == "exact, matmul in float64"
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert kernel(torch.bfloat16, 128) == f"exact, matmul in {dtype}"


def test_without_integer_kernels(missing, caplog):
    # nothing is said where nothing was to be had
    for dtype, bits in ((torch.float32, "auto"), (torch.bfloat16, None), (torch.bfloat16, 16)):
        choose_kernel(CPU, dtype, 64, 64, requested_bits=bits)
    assert not caplog.records
    assert not has_integer_kernel("cpu")
    packed, scale, bias = new_weight(40, 72)
    x = torch.randn(9, 72)
    assert torch.equal(integer_linear(x, packed, scale, bias), reference.integer_linear(x, packed, scale, bias, 16))
    for bits in ("auto", 16):
        half = x.bfloat16()
        assert torch.equal(linear(half, packed, scale, bias, bits), ternary_linear(half, packed, scale, bias))
    choice = choose_kernel(CPU, torch.bfloat16, 64, 64)
    assert choice.bits is None
    assert choice.reason == f"the integer kernels need {'AVX2' if missing == 'no AVX2' else f'numba: {INSTALL}'}"
    assert [record.getMessage() for record in caplog.records] == ([FASTER] if missing == "no numba" else [])


def test_asking_in_vain(missing, caplog):
    for bits in (8, 16):
        if missing == "no numba":
            with pytest.raises(ImportError):
                check_integers("cpu", bits)
        else:
            check_integers("cpu", bits)
    assert [record.getMessage() for record in caplog.records] == ([] if missing == "no numba" else [NO_AVX2])


def test_without_numba_there_are_none(monkeypatch):
    choose.integer_kernels.cache_clear()
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    try:
        assert choose.integer_kernels() == {}
    finally:
        choose.integer_kernels.cache_clear()


def test_each_decision_is_logged_once_at_debug(best, caplog):
    torch_ops.decide.cache_clear()
    packed, scale, bias = new_weight(40, 72)
    x = torch.randn(9, 72).bfloat16()
    with caplog.at_level(logging.DEBUG, "diffusers_terdit"):
        for _ in range(2):
            linear(x, packed, scale, bias)
            linear(x.float(), packed, scale, bias)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "dtype=torch.bfloat16, out_features=40, in_features=72" in lines[0]
    assert f"on cpu: Choice(kernel='{best}', bits=16" in lines[0]
    assert "bits=None, reason='float32 is not rounded unless asked for'" in lines[1]


def test_a_device_without_kernels():
    choice = choose_kernel(torch.device("meta"), torch.bfloat16, 64, 64, requested_bits=8)
    assert choice == ("reference", None, "there are no kernels for meta")
    assert not has_integer_kernel("meta")
