"""`cuda_graphs()`: the forward pass as CUDA graphs. On a CPU a stand-in replays: it runs the function again."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FirstBlockCacheConfig, PNDMScheduler

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.ops import reference
from diffusers_terdit.ops.gpu import graphs


@pytest.mark.gpu
def test_a_captured_call_gives_what_it_gave():
    x, packed = torch.randn(8, 64, device="cuda"), reference.pack_ternary(torch.ones(32, 64)).cuda()
    replay, output = graphs.capture(lambda: reference.ternary_linear(x, packed, x.new_ones(1), None))
    x.fill_(1)
    replay()
    assert output.unique().tolist() == [64]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_pictures_are_the_same(tiny_pipeline, compiled):
    pipe = tiny_pipeline().to("cuda")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)  # keeps the last outputs
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    expected = draw(pipe, guidance_scale=1.0)
    with pipe.transformer.cuda_graphs():
        for _ in range(2):
            assert torch.equal(draw(pipe, guidance_scale=1.0), expected)


def draw(pipe: TerDiTPipeline, labels=(0, 1), **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), num_inference_steps=6, generator=generator, output_type="latent", **options).images


@pytest.fixture
def captured(monkeypatch, tiny_model):
    """The functions that a stand-in for `capture` was given. It writes outputs in place, as a graph does."""
    functions = []

    def capture(function, pool):
        functions.append(function)
        output = function()

        def replay():
            for old, new in zip(output, function(), strict=True):
                old.copy_(new)

        return replay, output

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(type(tiny_model()), "device", property(lambda self: torch.device("cuda")))
    original = graphs.graphed
    monkeypatch.setattr(
        "diffusers_terdit.models.transformer_terdit.graphed", lambda function, device: original(function, "cpu")
    )
    return functions


def test_a_graph_for_each_shape_and_outputs_that_stay(captured, tiny_model, tiny_inputs):
    model, first = tiny_model("packed"), tiny_inputs()
    second = {**first, "hidden_states": first["hidden_states"] + 1}
    one = {name: value[:1] for name, value in first.items()}
    with torch.no_grad():
        expected = [model(**inputs).sample for inputs in (first, second, one)]
        with model.cuda_graphs():
            outputs = [model(**first).sample, model(**second, return_dict=False)[0], model(*one.values()).sample]
            outputs += [model(*first.values(), False)[0]]
        assert len(captured) == 2
        assert all(torch.equal(a, b) for a, b in zip(outputs, [*expected, expected[0]], strict=True))
        model(**first)
    assert "forward" not in vars(model)


def test_what_runs_in_python_is_refused_and_nothing_else(captured, tiny_model, tiny_inputs):
    refused = "leave out what this model runs in Python"
    model = tiny_model()
    with model.cuda_graphs(), pytest.raises(ValueError, match=refused), model.cuda_graphs():
        pass
    for start, end in (
        (lambda: cpu_offload(model.transformer_blocks[1]), lambda: remove_hook_from_submodules(model)),
        (lambda: cpu_offload(model), lambda: remove_hook_from_submodules(model)),
        (lambda: model.enable_cache(FirstBlockCacheConfig()), model.disable_cache),
    ):
        start()
        with pytest.raises(ValueError, match=refused), model.cuda_graphs():
            pass
        end()
        with torch.no_grad(), model.cuda_graphs():
            model(**tiny_inputs())
    assert len(captured) == 3


def test_a_pass_with_a_gradient_runs_without_a_graph(captured, tiny_model, tiny_inputs):
    model = tiny_model()
    with model.cuda_graphs():
        model(**tiny_inputs()).sample.sum().backward()
    assert not captured
    assert all(layer.weight.grad is not None for layer in model.ternary_layers().values())


def test_it_ends_where_a_pass_fails(captured, tiny_model):
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt), model.cuda_graphs():
        raise KeyboardInterrupt
    assert "forward" not in vars(model)
