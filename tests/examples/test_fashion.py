"""examples/experiments/fashion.py: the judge of Fashion-MNIST, on tiny IDX files."""

import numpy as np
import pytest
import torch

import fashion
from diffusers_terdit import TerDiTPipeline, evaluation
from idx_files import idx
from tiny_training import fresh_model


@pytest.fixture
def data_dir(tmp_path):
    """Images of two brightnesses, bright at label 1, in the files of Fashion-MNIST."""
    for part, count in (("train", 512), ("t10k", 200)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        noise = np.random.default_rng(count).integers(0, 100, (count, 28, 28))
        images = (noise + 150 * labels[:, None, None]).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.fixture
def clothes(tmp_path):
    """Folder of an untrained model of 28x28 pixels and ten classes."""
    model = fresh_model(sample_size=28, patch_size=14, prediction_type="flow_prediction", learn_sigma=False)
    TerDiTPipeline(model, None, sampling_defaults={"num_inference_steps": 2}).save_pretrained(tmp_path / "clothes")
    return tmp_path / "clothes"


def test_a_judge_is_trained_once_and_judges_real_images_and_models(data_dir, clothes, capsys):
    path, before = data_dir / "judge.safetensors", torch.get_rng_state()
    command = ["--data_dir", str(data_dir), "--judge", str(path), "--epochs", "4"]
    fashion.main(command)
    assert torch.equal(torch.get_rng_state(), before)
    assert "judge.safetensors is trained" in capsys.readouterr().out
    assert path.stat().st_size < 1_500_000
    written = path.read_bytes()
    fashion.main([*command, "--model", str(clothes), "--num_images", "20"])
    said = capsys.readouterr().out
    assert "is trained" not in said
    assert "floor: distance" in said
    assert "clothes: distance" in said
    assert path.read_bytes() == written

    network, test = fashion.load_judge(path)
    images, labels = fashion.open_images(data_dir, "t10k")
    found = fashion.judge(images, labels, network, test)
    assert found["recognised"] > 0.95
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert fashion.judge(1 - images, labels, network, test)["frechet_distance"] > 0.1
    assert fashion.judge(images, 1 - labels, network, test)["recognised"] < 0.05


def test_the_same_seed_trains_the_same_judge(data_dir):
    data = fashion.open_images(data_dir, "train")
    first, second = (fashion.train_judge(*data, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_features_fit_what_measures_with_a_network(data_dir, tmp_path, monkeypatch):
    path = tmp_path / "outputs" / "fashion_judge.safetensors"
    monkeypatch.setattr(fashion.load_judge, "__defaults__", (path,))
    with pytest.raises(SystemExit, match=r"no such judge\. Train it"):
        fashion.features()
    network = fashion.train_judge(*fashion.open_images(data_dir, "train"), epochs=1)
    statistics = evaluation.GaussianStatistics(64)
    statistics.update(fashion.look(network, fashion.open_images(data_dir, "t10k")[0])[0])
    fashion.save_judge(network, statistics, path)
    assert fashion.features()(torch.rand(2, 1, 28, 28)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"takes gray images \(B, 1, 28, 28\), got \(2, 3, 28, 28\)"):
        fashion.features()(torch.rand(2, 3, 28, 28))


def test_without_the_files_it_says_where_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        fashion.main(["--data_dir", str(tmp_path)])
