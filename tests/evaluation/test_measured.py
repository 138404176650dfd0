"""Results say when they were measured, and at which commit."""

import datetime
import json
import re
from pathlib import Path

from diffusers_terdit.evaluation import measured


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_a_file_of_results_is_stamped_and_the_others_keep_their_stamps(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.jsonl"
    assert measured.measured(first) == ""
    measured.stamp(first)
    noted = json.loads((tmp_path / measured.NAME).read_text())
    assert noted == {"first.json": {"date": datetime.date.today().isoformat(), "commit": measured.commit()}}
    noted["first.json"]["date"] = "2026-01-02"
    (tmp_path / measured.NAME).write_text(json.dumps(noted))
    measured.stamp(second)
    assert measured.measured(first).startswith("Measured on 2026-01-02 at commit ")
    assert measured.measured(second).startswith(f"Measured on {datetime.date.today().isoformat()}")


def test_every_committed_result_says_so_on_its_page():
    noted = json.loads((RESULTS / measured.NAME).read_text("utf-8"))
    assert set(noted) == {path.name for path in RESULTS.glob("*.json*")} - {measured.NAME}
    for name, found in noted.items():
        page = RESULTS / f"{re.split('[._]', name)[0]}.md"
        page = page if page.exists() else RESULTS / f"{name.split('.')[0]}.md"
        assert f"Measured on {found['date']} at commit {found['commit']}." in page.read_text("utf-8")
