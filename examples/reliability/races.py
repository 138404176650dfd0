"""Load while another process saves: `python examples/reliability/races.py --loads 2000`.

One process saves two models, A and B, into one folder in turns; another loads it again and again. Nothing is delayed
or patched. Every load gives all of A, all of B, or is refused with an `OSError` or `ValueError` that names the folder;
weights, config, scheduler and labels are compared. `page.py` writes the figures: docs/results/reliability.md.
"""

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import diffusers
import safetensors
import torch
from diffusers import DDIMScheduler

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from harness import processor, randomize, versions, write_report


KINDS = ("model", "sharded model", "pipeline", "sharded pipeline")
GOOD, BAD = ("A", "B", "refused"), ("mixture", "other error")
SIZES = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}


def save(kind: str, which: str, folder: Path) -> None:
    """Save A or B, of the same shapes and with other weights, config, scheduler and labels."""
    torch.manual_seed(0)
    other = which == "B"
    model = TerDiTTransformer2DModel(**SIZES, ffn_dim=32, in_channels=3, norm_eps=1e-4 if other else 1e-5)
    randomize(model, seed=int(other)).pack()
    shards = {"max_shard_size": "4KB"} if "sharded" in kind else {}
    if "model" in kind:
        model.save_pretrained(folder, **shards)
        return
    scheduler = DDIMScheduler(beta_end=0.03 if other else 0.02)
    labels = {str(i): f"{which} {i}" for i in range(4)}
    TerDiTPipeline(model, scheduler, id2label=labels).save_pretrained(folder, **shards)


def contents(kind: str, folder: Path) -> str:
    """Load, and return every bit and value of what was loaded, as text."""
    if "model" in kind:
        model, rest = TerDiTTransformer2DModel.from_pretrained(folder), ""
    else:
        pipe = TerDiTPipeline.from_pretrained(folder)
        model, rest = pipe.transformer, repr([pipe.scheduler.to_json_string(), pipe.config["id2label"]])
    weights = {name: tensor.tolist() for name, tensor in sorted(model.state_dict().items())}
    return repr([weights, model.to_json_string().replace(str(folder), ""), rest.replace(str(folder), "")])


def keep_saving(kind: str, folder: Path, seed: int) -> None:
    """Save A and B in turns for ever, at times that have nothing to do with the loads."""
    rng = random.Random(seed)
    print("saving", flush=True)
    for which in itertools.cycle("BA"):
        save(kind, which, folder)
        time.sleep(rng.uniform(0, 0.1))


def race(kind: str, loads: int, seed: int) -> dict:
    """Load until `loads` of them have returned; count what they gave."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter(dict.fromkeys((*GOOD, *BAD), 0))
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="races-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder, known = Path(name) / "model", {}
        for which in "BA":  # A is there at first
            save(kind, which, folder)
            known[contents(kind, folder)] = which
        assert len(known) == 2
        command = [sys.executable, __file__, "--saver", kind, "--folder", str(folder), "--seed", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        saver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        begin = time.monotonic()
        try:
            assert saver.stdout.readline() == b"saving\n", "the other process did not start"
            while sum(counts[key] for key in ("A", "B", "mixture")) < loads:
                assert saver.poll() is None, "the other process has stopped saving"
                try:
                    counts[known.get(contents(kind, folder), "mixture")] += 1
                except (OSError, ValueError) as error:
                    counts["refused" if str(folder) in str(error) else "other error"] += 1
                    reasons[type(error).__name__ + str(error).replace(str(folder), ": FOLDER")[:100]] += 1
                except Exception as error:  # each is a failure, and counted
                    counts["other error"] += 1
                    reasons[f"{type(error).__name__}: {str(error)[:100]}"] += 1
        finally:
            saver.kill()
            saver.communicate()
    return {"outcomes": counts, "reasons": dict(reasons.most_common(10)), "elapsed": time.monotonic() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=2000, help="that return, in four equal parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    parser.add_argument("--saver", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity(60)
    diffusers.utils.logging.disable_progress_bar()
    if args.saver:
        keep_saving(args.saver, args.folder, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kinds = {kind: race(kind, args.loads // len(KINDS), args.seed) for kind in KINDS}
    report = {"loads": args.loads, "seed": args.seed, "kinds": kinds, "machine": processor()}
    report["versions"] = versions(torch, diffusers, safetensors)
    write_report(args.output_dir / "reliability_races.json", report)
    for kind, found in kinds.items():
        print(kind, dict(found["outcomes"]), found["reasons"])
    if any(found["outcomes"][key] for found in kinds.values() for key in BAD):
        sys.exit(1)


if __name__ == "__main__":
    main()
