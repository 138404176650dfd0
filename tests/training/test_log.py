import json

import pytest
from PIL import Image

from diffusers_terdit import training


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def records():
    """Thirty records as the trainer writes them, with a validation after each tenth."""
    found = []
    for step in range(10, 310, 10):
        shares = {"flip_share": 0.1 / step, "zero_share": 0.25 + step / 1e4}
        rates = {"lr": 1e-3, "grad_norm": 10 / step, "grad_norm_max": 20 / step}
        found.append({"step": step, "loss": 1 / step, **shares, **rates, "dead_layers": []})
        if step % 100 == 0:
            errors = {"noise_error": 0.9 / step, "noise_error_held_out": 1.1 / step}
            found.append({"step": step, **errors, "frechet_distance": 100 / step})
    return found


def curves(monkeypatch, path, picture):
    """{title: {name of a curve: its points}} of what is drawn."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    training.log.draw(path, picture)
    axes = figures[0].axes
    return {a.get_title(): {line.get_label(): line.get_xydata().tolist() for line in a.lines} for a in axes}


class TestRead:
    def test_what_a_kill_tore_is_left_out(self, tmp_path, records):
        path = write(tmp_path / "log.jsonl", records)
        path.write_bytes(path.read_bytes()[:-20] + b"\xff")
        assert training.log.read(path) == records[:-1]

    def test_what_is_no_record_of_a_step_is_left_out(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"step": 1}\n[]\n3\n{"loss": 1}\n{"step": "1"}\n\n{"step": 2}\n')
        assert training.log.read(path) == [{"step": 1}, {"step": 2}]

    def test_no_file_has_no_records(self, tmp_path):
        assert training.log.read(tmp_path / "log.jsonl") == []


class TestDraw:
    def test_each_number_is_where_the_log_has_it(self, tmp_path, monkeypatch, records):
        found = curves(monkeypatch, write(tmp_path / "log.jsonl", records), tmp_path / "log.png")
        assert list(found) == [
            "loss",
            "Fréchet distance",
            "codes that flipped since the last record, %",
            "zeros among the ternary weights, %",
            "learning rate",
            "norm of the gradient",
        ]
        assert list(found["loss"]) == ["training", "average, fixed noise", "average, held-out images"]
        assert found["loss"]["training"] == [[s, 1 / s] for s in range(10, 310, 10)]
        assert found["loss"]["average, held-out images"] == [[s, 1.1 / s] for s in (100, 200, 300)]
        assert found["norm of the gradient"]["largest"][-1] == [300, 20 / 300]
        [flips] = found["codes that flipped since the last record, %"].values()
        assert flips[0] == [10, pytest.approx(1.0)]
        with Image.open(tmp_path / "log.png") as image:
            assert image.size == (1200, 540)

    def test_what_the_log_lacks_has_no_panel(self, tmp_path, monkeypatch, records):
        for record in records:
            for key in ("flip_share", "zero_share", "frechet_distance", "noise_error_held_out"):
                record.pop(key, None)
        found = curves(monkeypatch, write(tmp_path / "log.jsonl", records), tmp_path / "log.png")
        assert list(found) == ["loss", "learning rate", "norm of the gradient"]

    @pytest.mark.parametrize("kept", [0, 1, 5])
    def test_a_short_or_torn_log_is_drawn(self, tmp_path, records, kept):
        path = write(tmp_path / "log.jsonl", records[:kept])
        with path.open("a") as file:
            file.write('{"step": 400, "los')
        training.log.draw(path, tmp_path / "log.png")
        Image.open(tmp_path / "log.png").verify()

    def test_numbers_that_no_logarithm_has_are_left_out(self, tmp_path):
        values = [0.0, float("nan"), float("inf")]
        records = [{"step": i, "loss": v, "flip_share": 0.0, "grad_norm": v} for i, v in enumerate(values, start=1)]
        training.log.draw(write(tmp_path / "log.jsonl", records), tmp_path / "log.png")

    def test_a_picture_is_replaced_as_a_whole(self, tmp_path, monkeypatch, records):
        from matplotlib.figure import Figure

        path = write(tmp_path / "log.jsonl", records)
        training.log.draw(path, tmp_path / "log.png")
        before = (tmp_path / "log.png").read_bytes()

        def fail(self, file, **kwargs):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError, match="No space"):
            training.log.draw(path, tmp_path / "log.png")
        assert (tmp_path / "log.png").read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["log.jsonl", "log.png"]
