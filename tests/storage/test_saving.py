"""Files and folders that are whole or absent: killed, without space, by two processes at once, or locked."""

import errno
import os
import random
import resource
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import SchedulerMixin
from filelock import FileLock
from safetensors.torch import save_file

from diffusers_terdit import DiffusionPipeline, TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.storage import saving
from diffusers_terdit.storage import weights as weights_format


forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


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


def left_in(folder):
    """What is temporary in a folder."""
    return [path.name for pattern in ("*.partial", "*.saving", "*.lock") for path in folder.rglob(pattern)]


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


@forks
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(two_models, kills):
    folder, known = two_models
    target = folder / "target"
    moments = random.Random(0)
    whole = 0
    for _ in range(kills):
        child = save_forever(folder, target, "50kB")
        time.sleep(0.05 * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole += is_one_of(target, known)
    assert whole
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(target, max_shard_size="50kB")
    assert is_one_of(target, known)  # it took over from what was killed
    assert not left_in(target)


class Killed(BaseException):
    """What a killed process does next: nothing."""


def killed_after(steps, patch, *functions):
    """Let so many calls of these functions pass, given as (owner, name); the next one is the end of the process."""
    left = iter(range(steps))

    def counted(function):
        def run(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return run

    for owner, name in functions:
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("size", ["10GB", "50kB"])
def test_killed_at_every_step_of_the_exchange(two_models, size, monkeypatch):
    """Each rename and removal in turn is the last thing that happens."""
    folder, known = two_models
    old, new = (TerDiTTransformer2DModel.from_pretrained(folder / name) for name in ("one", "two"))
    old.save_pretrained(folder / "old", max_shard_size="50kB")
    for last in range(60):
        target = folder / f"target{last}"
        shutil.copytree(folder / "old", target)
        with monkeypatch.context() as patch, suppress(Killed):
            killed_after(last, patch, (saving.os, "replace"), (Path, "unlink"), (Path, "touch"))
            new.save_pretrained(target, max_shard_size=size)
            break
        is_one_of(target, known)
    assert 4 < last < 59
    assert TerDiTTransformer2DModel.from_pretrained(target).config.norm_eps == 1e-4


def test_without_space_the_old_model_stays(two_models, monkeypatch):
    folder, known = two_models
    model = TerDiTTransformer2DModel.from_pretrained(folder / "two")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("save_file", "to_json_file"):
        with monkeypatch.context() as patch:
            patch.setattr(weights_format if name == "save_file" else type(model), name, full)
            with pytest.raises(OSError, match="No space left"):
                model.save_pretrained(folder / "one")
        assert is_one_of(folder / "one", known)
        assert TerDiTTransformer2DModel.from_pretrained(folder / "one").config.norm_eps == 1e-5
        assert sorted(path.name for path in (folder / "one").iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]


@forks
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
    assert not left_in(folder / "one")


@forks
def test_two_processes_at_once(two_models):
    folder, known = two_models
    target = folder / "target"
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(target, max_shard_size="50kB")
    children = [save_forever(folder, target, "50kB") for _ in range(2)]
    try:
        time.sleep(0.5)
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children)  # neither failed
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    is_one_of(target, known)


class TestPipeline:
    """A pipeline is several folders: it is the old one, the new one, or refused, whichever way it is loaded."""

    def test_killed_at_every_file(self, tiny_pipeline, tmp_path, monkeypatch):
        old, new = tiny_pipeline(norm_eps=1e-5), tiny_pipeline(norm_eps=1e-4)
        old.save_pretrained(tmp_path)
        replace = os.replace

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


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("diffusion_pytorch_model.safetensors", ("diffusion_pytorch_model", "")),
        ("diffusion_pytorch_model.bin", ("diffusion_pytorch_model", "")),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", ("diffusion_pytorch_model", "")),
        ("diffusion_pytorch_model.safetensors.index.json", ("diffusion_pytorch_model", "")),
        ("diffusion_pytorch_model.fp16.safetensors", ("diffusion_pytorch_model", "fp16")),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", ("diffusion_pytorch_model", "fp16")),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", ("diffusion_pytorch_model", "fp16")),
        ("pytorch_lora_weights.safetensors", ("pytorch_lora_weights", "")),
        ("config.json", None),
        ("diffusion_pytorch_model.safetensors.txt", None),
    ],
)
def test_weights_files_of_one_model_share_name_and_variant(file, expected):
    assert saving.weights_name(file) == expected


def test_weights_of_another_layout_do_not_stay_beside_the_new_config(two_models):
    folder, known = two_models
    model = TerDiTTransformer2DModel.from_pretrained(folder / "two")
    TerDiTTransformer2DModel.from_pretrained(folder / "one").save_pretrained(folder / "x", max_shard_size="50kB")
    for name in ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.bin"):
        (folder / "x" / name).write_text("another's")
    model.save_pretrained(folder / "x", variant="fp16")
    assert len(list((folder / "x").glob("diffusion_pytorch_model*"))) > 4  # another variant is another model
    model.save_pretrained(folder / "x")
    loaded = TerDiTTransformer2DModel.from_pretrained(folder / "x")
    assert loaded.config.norm_eps == 1e-4
    assert torch.equal(weights(loaded), known[1e-4])
    assert sorted(path.name for path in (folder / "x").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_lora_weights.safetensors",
    ]


def test_a_rename_that_fails_is_noticed_and_the_next_save_mends_it(tmp_path, monkeypatch):
    layer, replace = TernaryLinear(8, 8), os.replace
    layer.save_pretrained(tmp_path)

    def fail(source, target):
        if Path(target).parent == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            layer.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="was interrupted"):
        TernaryLinear.from_pretrained(tmp_path)
    started = time.monotonic()
    layer.save_pretrained(tmp_path)
    assert time.monotonic() - started < 5  # this process does not wait for itself
    assert torch.equal(TernaryLinear.from_pretrained(tmp_path).weight, layer.weight)


class TestSavedMeanwhile:
    """What is read while another process saves is one model or an error, wherever the save falls."""

    @pytest.fixture
    def pipelines(self, tiny_pipeline, tmp_path):
        old, new = tiny_pipeline(norm_eps=1e-5), tiny_pipeline(norm_eps=1e-4)
        old.save_pretrained(tmp_path / "old", max_shard_size="50kB")
        return tmp_path / "old", new

    @pytest.mark.parametrize("moment", ["load_config", "_load_pretrained_model"])
    @pytest.mark.parametrize("place", ["before", "after"])
    def test_a_model(self, pipelines, monkeypatch, moment, place):
        folder, new = pipelines[0] / "transformer", pipelines[1].transformer
        original = getattr(TerDiTTransformer2DModel, moment)

        def meanwhile(*args, **kwargs):
            if place == "before":
                new.save_pretrained(folder, max_shard_size="50kB")
            result = original(*args, **kwargs)
            if place == "after":
                new.save_pretrained(folder, max_shard_size="50kB")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(TerDiTTransformer2DModel, moment, meanwhile)
            with pytest.raises(OSError, match=f"Another process saved into {folder} while it was read. Load it again"):
                TerDiTTransformer2DModel.from_pretrained(folder)
        assert TerDiTTransformer2DModel.from_pretrained(folder).config.norm_eps == 1e-4

    @pytest.mark.parametrize("part", [TerDiTTransformer2DModel, SchedulerMixin])
    def test_a_pipeline(self, pipelines, monkeypatch, part):
        folder, new = pipelines
        original = part.from_pretrained.__func__

        def meanwhile(cls, *args, **kwargs):
            new.save_pretrained(folder)
            return original(cls, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(part, "from_pretrained", classmethod(meanwhile))
            with pytest.raises(OSError, match=f"Another process saved into {folder}"):
                TerDiTPipeline.from_pretrained(folder)
        assert TerDiTPipeline.from_pretrained(folder).transformer.config.norm_eps == 1e-4


class TestLinks:
    """A folder from elsewhere has links to files of this user; nothing is written through them."""

    @pytest.fixture
    def victim(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "config.json").write_text("mine")
        return tmp_path / "elsewhere" / "config.json"

    def test_marker_of_a_save(self, tiny_pipeline, tmp_path, victim):
        pipe = tiny_pipeline()
        pipe.save_pretrained(tmp_path / "pipe")
        (tmp_path / "pipe" / "transformer" / "pipeline.saving").symlink_to(victim)
        with pytest.raises(OSError, match=r"pipeline\.saving is a symbolic link, which is not written through"):
            pipe.save_pretrained(tmp_path / "pipe")
        assert victim.read_text() == "mine"

    def test_folder_of_a_part(self, tiny_pipeline, tmp_path, victim):
        (tmp_path / "pipe").mkdir()
        (tmp_path / "pipe" / "transformer").symlink_to(victim.parent)
        with pytest.raises(OSError, match="transformer is a symbolic link"):
            tiny_pipeline().save_pretrained(tmp_path / "pipe")
        assert os.listdir(victim.parent) == ["config.json"]
        assert victim.read_text() == "mine"

    def test_weights_and_config_replace_the_links(self, tiny_model, tmp_path, victim):
        """Files are renamed into their place, which takes the link away and not what it leads to."""
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").symlink_to(victim)
        tiny_model().save_pretrained(tmp_path / "model")
        assert victim.read_text() == "mine"
        TerDiTTransformer2DModel.from_pretrained(tmp_path / "model")

    def test_a_log_that_a_run_would_append_to(self, tmp_path, victim):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").symlink_to(victim)
        with pytest.raises(OSError, match=r"log\.jsonl is a symbolic link"), saving.output_folder(tmp_path / "run"):
            pass

    def test_partials_and_locks(self, tmp_path, victim):
        """The names are those that `remove_partials` looks for; the folder that one leads to stays as it is."""
        (tmp_path / "run" / "new.0123abcd.partial").mkdir(parents=True)
        (tmp_path / "run" / "new.0123abcd.partial" / "owner.lock").symlink_to(victim)
        (tmp_path / "run" / "new.4567abcd.partial").symlink_to(victim.parent)
        saving.remove_partials(tmp_path / "run")
        assert os.listdir(victim.parent) == ["config.json"]
        assert victim.read_text() == "mine"


class TestPartials:
    def test_only_those_that_nobody_holds_are_removed(self, tmp_path):
        left = tmp_path / "x.0123abcd.partial"
        left.mkdir()
        (left / "x").write_text("half")
        others = ["c.partial", "my.data.partial"]
        for name in others:
            (tmp_path / name).mkdir()
        saving.remove_partials(tmp_path, "y")
        assert left.exists()  # of another name
        with saving.partial_path(tmp_path / "x") as mine:
            mine.write_text("new")
            saving.remove_partials(tmp_path)
            assert mine.read_text() == "new"
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, mine.parent.name])
        assert sorted(path.name for path in tmp_path.iterdir()) == others

    @forks
    def test_that_of_a_killed_process_is_removed_once_it_is_dead(self, tmp_path):
        ready, begun = os.pipe()
        child = os.fork()
        if not child:
            with saving.new_file(tmp_path / "x") as partial:
                partial.write_text("half")
                os.write(begun, b"1")
                time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        saving.remove_partials(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saving.remove_partials(tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("moment", ["held", "gone"])
    def test_a_process_that_removes_them_before_they_are_held_is_no_error(self, tmp_path, monkeypatch, moment):
        """Between the making of the folder and its lock, another process takes it for one that was left."""
        mkdir, locks = Path.mkdir, []

        def make(path, *args, **kwargs):
            mkdir(path, *args, **kwargs)
            if path.suffix == ".partial" and not locks:
                locks.append(FileLock(path / "owner.lock"))
                locks[0].acquire()
                if moment == "gone":
                    shutil.rmtree(path)
                    locks[0].release()

        monkeypatch.setattr(Path, "mkdir", make)
        with saving.new_file(tmp_path / "x") as partial:
            partial.write_text("new")
        assert (tmp_path / "x").read_text() == "new"
        locks[0].release()
        saving.remove_partials(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_a_full_disk_leaves_none(self, tmp_path, monkeypatch):
        def full(self, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(FileLock, "acquire", full)
        with pytest.raises(OSError, match="Make room there"), saving.new_file(tmp_path / "x"):
            pass
        assert list(tmp_path.iterdir()) == []


class TestFolders:
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

    @pytest.mark.parametrize("last", range(3))
    def test_a_killed_exchange_leaves_a_whole_folder_or_none(self, tmp_path, monkeypatch, last):
        """Each rename, and the removal of the old folder, is the last thing that happens."""

        def save(text):
            with saving.new_folder(tmp_path / "x") as partial:
                for name in ("a", "b"):
                    (partial / name).write_text(text)

        save("old")
        with monkeypatch.context() as patch:
            killed_after(last, patch, (saving.os, "replace"), (saving.shutil, "rmtree"))
            with pytest.raises(Killed):
                save("new")
        found = [(tmp_path / "x" / name).read_text() for name in "ab"] if (tmp_path / "x").exists() else None
        assert found == [["old", "old"], None, ["new", "new"]][last]
        save("new")
        assert (tmp_path / "x" / "a").read_text() == "new"
        saving.remove_partials(tmp_path)
        assert not left_in(tmp_path)

    def test_a_folder_that_cannot_be_moved_leaves_the_old_one(self, tmp_path, monkeypatch):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "a").write_text("old")
        moves = []

        def replace(source, target, plain=os.replace):
            moves.append(source)
            if len(moves) == 2:
                raise OSError(errno.EIO, "Input/output error")
            plain(source, target)

        monkeypatch.setattr(saving.os, "replace", replace)
        with pytest.raises(OSError, match="cannot be written"), saving.new_folder(tmp_path / "x") as partial:
            (partial / "a").write_text("new")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x" / "a").read_text() == "old"

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

    @forks
    def test_a_run_has_its_folder_for_itself_and_removes_what_killed_ones_left(self, tmp_path):
        for name in ("a.0123abcd.partial", "parts/b.0123abcd.partial", "c.partial"):
            (tmp_path / name).mkdir(parents=True)
        with saving.output_folder(tmp_path):
            found = sorted(path.name for path in tmp_path.rglob("*"))
            assert found == ["c.partial", "parts", "terdit-run.lock"]
            child = os.fork()
            if not child:
                try:
                    with saving.output_folder(tmp_path, seconds=0.1):
                        os._exit(0)
                except OSError as error:
                    os._exit(3 if f"Another run is writing into {tmp_path}" in str(error) else 4)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        for _ in range(2):
            with saving.output_folder(tmp_path):
                pass
            assert sorted(path.name for path in tmp_path.iterdir()) == ["c.partial", "parts"]

    def test_other_processes_of_a_run_share_its_folder(self, tmp_path):
        with saving.output_folder(tmp_path), saving.output_folder(tmp_path, is_main_process=False):
            pass

    @forks
    def test_a_lock_file_that_is_removed_when_it_is_let_go_keeps_others_out(self, tmp_path):
        """Three processes add to a number in turns; two of them at once would lose some of it."""
        (tmp_path / "number").write_text("0")
        children = []
        for _ in range(3):
            children.append(os.fork())
            if not children[-1]:
                try:
                    for _ in range(40):
                        with saving.output_folder(tmp_path, seconds=60):
                            number = int((tmp_path / "number").read_text())
                            time.sleep(0.001)
                            (tmp_path / "number").write_text(str(number + 1))
                    os._exit(0)
                finally:
                    os._exit(1)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        assert (tmp_path / "number").read_text() == "120"
        assert [path.name for path in tmp_path.iterdir()] == ["number"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_saved_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    """safetensors makes its files readable to their owner alone."""
    before = os.umask(umask)
    try:
        with saving.new_file(tmp_path / "one.safetensors") as path:
            save_file({"x": torch.ones(1)}, path)
        with saving.new_folder(tmp_path / "folder") as path:
            (path / "inside").mkdir()
            save_file({"x": torch.ones(1)}, path / "inside" / "two.safetensors")
        with saving.replacing(tmp_path / "model", tmp_path / "model" / "x.saving") as path:
            save_file({"x": torch.ones(1)}, path / "three.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert modes == dict.fromkeys(("one.safetensors", "two.safetensors", "three.safetensors"), mode)
