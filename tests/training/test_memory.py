import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_terdit import training


# Two steps of a model in a process of its own; prints the estimate, and by how much the peak grew, in bytes.
STEPS = """
import copy, json, re, sys
from pathlib import Path
import torch
from diffusers_terdit import TerDiTTransformer2DModel, training

options = json.loads(sys.argv[1])
names = ("batch_size", "bfloat16", "checkpointing", "optimizer")
batch_size, bfloat16, checkpointing, kind = (options.pop(name) for name in names)
def peak():  # of getrusage, the peak is also that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
config = {"sample_size": 32, "patch_size": 4, "in_channels": 3, "num_attention_heads": 8, "attention_head_dim": 32}
with torch.device("meta"):
    planned = TerDiTTransformer2DModel(**config, **options)
moment_bytes = {"adamw": 8, "8bit": 2, "muon": 4}[kind]
estimate = training.memory.training_bytes(planned, batch_size, bfloat16, checkpointing, 1, moment_bytes)
model = TerDiTTransformer2DModel(**config, **options).train()
if checkpointing:
    model.enable_gradient_checkpointing()
average = copy.deepcopy(model).requires_grad_(False)
optimizers = {"adamw": torch.optim.AdamW, "muon": training.muon.Muon}
if kind == "8bit":
    from bitsandbytes.optim import AdamW8bit
    optimizers[kind] = AdamW8bit
optimizer = optimizers[kind](training.recipes.parameter_groups(model, muon=kind == "muon"), lr=1e-3)
for _ in range(2):
    labels = torch.zeros(batch_size, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = model(torch.randn(batch_size, 3, 32, 32), 999 * torch.rand(batch_size), labels).sample
    output.float().square().mean().backward()
    training.recipes.clip_grad_norm(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    training.recipes.update_average(average, model, 0.9)
print(estimate, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 6, "batch_size": 32},
        {"num_layers": 6, "batch_size": 32, "bfloat16": True},
        {"num_layers": 10, "batch_size": 32, "checkpointing": True},
        {"num_layers": 8, "batch_size": 2, "ffn_dim": 8192},
        {"num_layers": 8, "batch_size": 2, "ffn_dim": 8192, "optimizer": "8bit"},
        {"num_layers": 8, "batch_size": 2, "ffn_dim": 8192, "optimizer": "muon"},
    ],
    ids=str,
)
def test_the_estimate_is_within_30_percent_of_the_peak(options):
    if options.get("optimizer") == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"bfloat16": False, "checkpointing": False, "optimizer": "adamw", **options}
    command = [sys.executable, "-c", STEPS, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    estimate, measured = map(int, output.split())
    assert 0.7 * measured < estimate < 1.3 * measured


def test_a_container_limits_what_is_free(tmp_path, monkeypatch):
    device = torch.device("cpu")
    free = training.memory.free_bytes(device)
    assert free > 2**20
    (tmp_path / "limit").write_text(f"{3 * 2**20}\n")
    (tmp_path / "used").write_text(f"{2 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file {2**19}\ninactive_file {2**19}\n")
    monkeypatch.setattr(training.memory, "_CGROUPS", ((tmp_path, "limit", "used"),))
    assert training.memory.free_bytes(device) == 2 * 2**20
    Path(tmp_path / "limit").write_text("max\n")
    assert training.memory.free_bytes(device) > 2**20
