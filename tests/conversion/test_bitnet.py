import pytest
import torch

from diffusers_terdit.conversion import swap_bitnet_order
from diffusers_terdit.ops import pack_ternary, unpack_ternary


@pytest.mark.filterwarnings("ignore")  # the module compiles at import, and torch warns about its own internals
def test_the_order_of_transformers():
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    ternary = torch.randint(-1, 2, (24, 10))
    theirs = pack_weights(ternary.clone().float())
    assert torch.equal(swap_bitnet_order(theirs), pack_ternary(ternary))
    with torch.compiler.set_stance("force_eager"):  # it is compiled, which takes seconds
        assert torch.equal(unpack_weights(swap_bitnet_order(pack_ternary(ternary)), torch.float32), ternary.float())
    assert torch.equal(swap_bitnet_order(swap_bitnet_order(theirs)), theirs)
    assert torch.equal(unpack_ternary(swap_bitnet_order(theirs)), ternary.float())
