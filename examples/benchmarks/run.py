"""Measurements that the documentation quotes; each scenario writes a JSON file and the page that is rendered from it.

python examples/benchmarks/run.py kernels        packed layers next to dense ones, on a CPU; your kernel with --kernel
python examples/benchmarks/run.py step           whole blocks, and what follows for a step and a picture
python examples/benchmarks/run.py deployment     the paper's deployment table: checkpoint, memory, time of a step
python examples/benchmarks/run.py memory         peak memory of loading a packed model, a forward pass and a VAE
python examples/benchmarks/run.py training       an optimizer step of a ternary and of a full-precision model
python examples/benchmarks/run.py flux2          a transformer of FLUX.2-klein's shape, packed and dense
python examples/benchmarks/run.py pipeline       a picture of a 4B pipeline, its text encoder included
python examples/benchmarks/run.py numerics       errors of every dtype and arithmetic against float64
python examples/benchmarks/run.py gpu-tests      do the kernels run on this GPU, and compute what the CPU does?
python examples/benchmarks/run.py gpu-layers     a block's layers in every design that was considered
python examples/benchmarks/run.py gpu-steps      forward passes of whole models
python examples/benchmarks/run.py gpu-pictures   pictures from label to pixels
python examples/benchmarks/run.py gpu-cards      what fits in 2, 4 and 8 GB, and how fast it is there

`--preset toy` or `--presets toy`, and `--device cpu` for the GPU's scenarios, try the code in seconds.
"""

import argparse

import cpu_speed
import deployment
import flux2
import gpu_cards
import gpu_layers
import gpu_pictures
import gpu_steps
import gpu_tests
import memory
import numerics
import training
import whole_pipeline


SCENARIOS = (
    *(cpu_speed, deployment, memory, training, flux2, whole_pipeline, numerics),
    *(gpu_tests, gpu_layers, gpu_steps, gpu_pictures, gpu_cards),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for scenario in SCENARIOS:
        scenario.add_arguments(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
