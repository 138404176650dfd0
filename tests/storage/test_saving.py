"""Overwriting a folder: killed, without space, by two processes at once. Old model, new model, or a clear error."""

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_terdit import DiffusionPipeline, TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, modeling
from diffusers_terdit.storage import saving


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.state_dict().values()])


@pytest.fixture
def two_models(tmp_path, tiny_config):
    """Two models of the same shapes whose configs differ, saved as `one` and `two`; their weights by epsilon."""
    known = {}
    for seed, (name, eps) in enumerate({"one": 1e-5, "two": 1e-4}.items()):
        torch.manual_seed(seed)
        model = TerDiTTransformer2DModel(**tiny_config, norm_eps=eps)
        model.save_pretrained(tmp_path / name)
        known[eps] = weights(model)
    return tmp_path, known


def is_one_of(folder, known):
    """Whether the folder holds one of the models as a whole; False where loading says that a save was interrupted."""
    if list(folder.glob("*.saving")):
        with pytest.raises(OSError, match="was interrupted, or is under way"):
            TerDiTTransformer2DModel.from_pretrained(folder)
        return False
    model = TerDiTTransformer2DModel.from_pretrained(folder)
    assert torch.equal(weights(model), known[model.config.norm_eps])
    return True


def save_forever(folder, target, size):
    """A child process that saves the two models in turns, once it has saved the first."""
    models = [TerDiTTransformer2DModel.from_pretrained(folder / name) for name in ("one", "two")]
    done, saved = os.pipe()
    child = os.fork()
    if child:
        os.close(saved)
        assert os.read(done, 1) == b"1"
        os.close(done)
        return child
    try:
        models[0].save_pretrained(target, max_shard_size=size)
        os.write(saved, b"1")
        while True:
            for model in reversed(models):
                model.save_pretrained(target, max_shard_size=size)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", ["10GB", "50kB"])
def test_killed_at_any_moment(two_models, size, kills):
    folder, known = two_models
    target = folder / "target"
    moments = random.Random(0)
    whole = 0
    for _ in range(kills):
        child = save_forever(folder, target, size)
        time.sleep(0.05 * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole += is_one_of(target, known)
    assert whole
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(target, max_shard_size=size)
    assert is_one_of(target, known)  # it took over from what was killed
    assert not list(target.glob("*.partial"))
    assert not list(target.glob("*.saving"))


@pytest.mark.parametrize("size", ["10GB", "50kB"])
def test_killed_at_every_step_of_the_exchange(two_models, size, monkeypatch):
    """Each rename and removal in turn is the last thing that happens."""
    folder, known = two_models

    class Killed(BaseException): ...

    done = 0
    for last in range(40):
        target = folder / f"target{last}"
        TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(target, max_shard_size="50kB")
        steps = iter(range(last))

        def counted(function, steps=steps):
            def run(*args, **kwargs):
                if next(steps, None) is None:
                    raise Killed
                return function(*args, **kwargs)

            return run

        model = TerDiTTransformer2DModel.from_pretrained(folder / "two")
        with monkeypatch.context() as patch:
            patch.setattr(saving.os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(saving, "_take", counted(saving._take))
            try:
                model.save_pretrained(target, max_shard_size=size)
            except Killed:
                pass
            else:
                done += 1
        is_one_of(target, known)
        if done:
            break
    assert done
    assert last > 4
    assert TerDiTTransformer2DModel.from_pretrained(target).config.norm_eps == 1e-4


def test_without_space_the_old_model_stays(two_models, monkeypatch):
    folder, known = two_models
    model = TerDiTTransformer2DModel.from_pretrained(folder / "two")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("save_file", "to_json_file"):
        with monkeypatch.context() as patch:
            patch.setattr(modeling, name, full) if name == "save_file" else patch.setattr(type(model), name, full)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(folder / "one")
        assert is_one_of(folder / "one", known)
        assert TerDiTTransformer2DModel.from_pretrained(folder / "one").config.norm_eps == 1e-5
        assert sorted(path.name for path in (folder / "one").iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_file_size_limit_is_an_error_and_the_old_model_stays(two_models):
    """The real thing: the system refuses to write more than 20 kB."""
    folder, known = two_models
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            TerDiTTransformer2DModel.from_pretrained(folder / "two").save_pretrained(folder / "one")
        except Exception as error:
            os._exit(3 if "too large" in str(error) else 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert is_one_of(folder / "one", known)
    assert not list((folder / "one").glob("*.partial"))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_two_processes_at_once(two_models):
    folder, known = two_models
    target = folder / "target"
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(target, max_shard_size="50kB")
    children = [save_forever(folder, target, "50kB") for _ in range(2)]
    try:
        time.sleep(1)
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children)  # neither failed
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    is_one_of(target, known)


def test_shards_of_two_models_do_not_mix(two_models, tmp_path):
    folder, _ = two_models
    for name in ("one", "two"):
        TerDiTTransformer2DModel.from_pretrained(folder / name).save_pretrained(
            folder / f"{name}-shards", max_shard_size="50kB"
        )
    shard = sorted(path.name for path in (folder / "one-shards").glob("*.safetensors"))[0]
    (folder / "one-shards" / shard).write_bytes((folder / "two-shards" / shard).read_bytes())
    with pytest.raises(ValueError, match="holds shards of several models"):
        TerDiTTransformer2DModel.from_pretrained(folder / "one-shards")


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_marker_of_a_process_that_still_runs_and_then_is_killed(tmp_path, monkeypatch):
    layer = TernaryLinear(8, 8)
    layer.save_pretrained(tmp_path)
    ready, taken = os.pipe()
    child = os.fork()
    if not child:
        saving._take(tmp_path / "diffusion_pytorch_model.saving")
        os.write(taken, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        monkeypatch.setattr(saving._take, "__defaults__", (0.1,))
        with pytest.raises(OSError, match=f"Process {child} is saving into {tmp_path}"):
            layer.save_pretrained(tmp_path)
        with pytest.raises(OSError, match="was interrupted, or is under way"):
            TernaryLinear.from_pretrained(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(OSError, match="was interrupted, or is under way"):
        TernaryLinear.from_pretrained(tmp_path)
    layer.save_pretrained(tmp_path)
    assert torch.equal(TernaryLinear.from_pretrained(tmp_path).weight, layer.weight)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == layer.state_dict().keys()


class TestPipeline:
    """A pipeline is several folders: it is the old one, the new one, or refused, whichever way it is loaded."""

    def test_killed_at_every_file(self, tiny_pipeline, tmp_path, monkeypatch):
        old, new = tiny_pipeline(norm_eps=1e-5), tiny_pipeline(norm_eps=1e-4)
        old.save_pretrained(tmp_path)
        replace = os.replace

        class Killed(BaseException): ...

        def kill(*args, **kwargs):
            raise Killed

        def kill_at(place, target):
            Path(target).parent.parent == tmp_path and kill()
            replace(place, target)

        for part in (type(new.scheduler), TerDiTTransformer2DModel):  # before the files are moved: the old pipeline
            with monkeypatch.context() as patch:
                patch.setattr(part, "save_pretrained", kill)
                with pytest.raises(Killed):
                    new.save_pretrained(tmp_path)
            for load in (TerDiTPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
                assert load(tmp_path).transformer.config.norm_eps == 1e-5
        with monkeypatch.context() as patch:
            patch.setattr(saving.os, "replace", kill_at)  # after model_index.json
            with pytest.raises(Killed):
                new.save_pretrained(tmp_path)
        for load in (TerDiTPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
            with pytest.raises(OSError, match=r"was interrupted, or is under way.* Save the pipeline there again"):
                load(tmp_path)
        new.save_pretrained(tmp_path)
        assert TerDiTPipeline.from_pretrained(tmp_path).transformer.config.norm_eps == 1e-4
        assert not list(tmp_path.rglob("*.saving"))

    def test_a_file_in_the_way(self, tiny_pipeline, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="must be a folder"):
            tiny_pipeline().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("safe", [True, False])
def test_weights_of_the_other_format_do_not_stay_beside_the_new_config(two_models, safe):
    folder, known = two_models
    model = TerDiTTransformer2DModel.from_pretrained(folder / "two")
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(folder / "x", safe_serialization=not safe)
    (folder / "x" / "pytorch_lora_weights.safetensors").write_text("another's")
    model.save_pretrained(folder / "x", variant="fp16", safe_serialization=safe)
    assert len(list((folder / "x").glob("diffusion_pytorch_model*"))) == 2  # another variant is another model
    model.save_pretrained(folder / "x", safe_serialization=safe)
    loaded = TerDiTTransformer2DModel.from_pretrained(folder / "x")
    assert loaded.config.norm_eps == 1e-4
    assert torch.equal(weights(loaded), known[1e-4])
    assert sorted(path.name for path in (folder / "x").iterdir()) == sorted(
        [
            "config.json",
            f"diffusion_pytorch_model.{'safetensors' if safe else 'bin'}",
            f"diffusion_pytorch_model.fp16.{'safetensors' if safe else 'bin'}",
            "pytorch_lora_weights.safetensors",
        ]
    )


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_pickle_that_does_not_fit_is_an_error_and_the_old_model_stays(two_models):
    folder, known = two_models
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            model = TerDiTTransformer2DModel.from_pretrained(folder / "two")
            model.save_pretrained(folder / "one", safe_serialization=False)
        except OSError as error:
            os._exit(3 if str(error).startswith(f"{folder / 'one'} cannot be written") else 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert is_one_of(folder / "one", known)


def test_a_rename_that_fails_is_noticed_and_the_next_save_mends_it(tmp_path, monkeypatch):
    layer = TernaryLinear(8, 8)
    layer.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            saving.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        with pytest.raises(OSError, match="Input/output"):
            layer.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="was interrupted"):
        TernaryLinear.from_pretrained(tmp_path)
    started = time.monotonic()
    layer.save_pretrained(tmp_path)
    assert time.monotonic() - started < 5  # this process does not wait for itself
    assert torch.equal(TernaryLinear.from_pretrained(tmp_path).weight, layer.weight)


class TestNewFilesAndFolders:
    def test_a_folder_appears_whole_or_not_at_all(self, tmp_path):
        def fail_half_way():
            with saving.new_folder(tmp_path / "x") as partial:
                (partial / "a").write_text("1")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail_half_way()
        assert list(tmp_path.iterdir()) == []

        with saving.new_folder(tmp_path / "x") as partial:
            (partial / "a").write_text("1")
            assert not (tmp_path / "x").exists()
        with saving.new_folder(tmp_path / "x") as partial:
            (partial / "b").write_text("2")
            assert (tmp_path / "x" / "a").exists()
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["b"]
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_two_writers_of_a_folder_do_not_mix(self, tmp_path):
        with saving.new_folder(tmp_path / "x") as one:
            (one / "a").write_text("1")
            with saving.new_folder(tmp_path / "x") as two:
                (two / "b").write_text("2")
            (one / "c").write_text("1")
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a", "c"]

    def test_a_file_appears_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text("old")

        def fail_half_way():
            with saving.new_file(path) as partial:
                partial.write_text("ne")
                (partial.parent / ".tmpA1b2C3").write_text("n")  # as safetensors does
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match=rf"{path} cannot be written: No space left on device. Make room there"):
            fail_half_way()
        assert path.read_text() == "old"
        with saving.new_file(path) as partial:
            partial.write_text("new")
        assert path.read_text() == "new"
        assert [file.name for file in tmp_path.iterdir()] == ["x.json"]

    @pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
    def test_a_run_has_its_folder_for_itself_and_removes_what_killed_ones_left(self, tmp_path):
        (tmp_path / f"a.{os.getpid()}-00000000.partial").mkdir()  # of a process that had this one's number
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "b.999999999-00000000.partial").write_text("half")
        (tmp_path / "c.partial").write_text("not of this package")
        with saving.output_folder(tmp_path):
            assert sorted(path.name for path in tmp_path.rglob("*")) == ["c.partial", "parts"]
            child = os.fork()
            if not child:
                try:
                    with saving.output_folder(tmp_path, seconds=0.1):
                        os._exit(0)
                except OSError as error:
                    os._exit(3 if f"Another run is writing into {tmp_path}" in str(error) else 4)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        with saving.output_folder(tmp_path):
            pass
