import json
import time

import pytest

from mmjax.training.time_account import KINDS, TimeAccount


def spend(account, kind, step=None):
    time.sleep(0.02)
    return account.lap(kind, step)


def test_every_moment_belongs_to_one_kind(tmp_path):
    account = TimeAccount(tmp_path, 0)
    for kind in ("compile", "data_wait", "steps", "evaluation", "checkpoint"):
        assert spend(account, kind) >= 0.02
    shares = account.shares()
    assert shares.keys() == {f"goodput/{kind}" for kind in KINDS}
    assert sum(shares.values()) == pytest.approx(1) and shares["goodput/restart"] == 0
    assert shares["goodput/start"] > shares["goodput/steps"]  # since the program started
    assert "of all sessions" in account.summary() and "% start" in account.summary()


def test_a_second_session_goes_on_and_what_it_repeats_is_restart(tmp_path):
    first = TimeAccount(tmp_path, 0)
    for step in range(1, 6):
        spend(first, "steps", step)
    first.save()
    saved = json.loads((tmp_path / "time.json").read_text())
    assert saved["step"] == 5 and saved["seconds"]["steps"] >= 0.1 and saved["seconds"]["restart"] == 0
    second = TimeAccount(tmp_path, 3)
    spend(second, "compile", 4)
    spend(second, "steps", 5)  # done before
    second.save()
    between = json.loads((tmp_path / "time.json").read_text())["seconds"]
    spend(second, "data_wait")
    spend(second, "steps", 6)
    second.save()
    after = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert between["steps"] == saved["seconds"]["steps"] and between["start"] == saved["seconds"]["start"]
    assert between["compile"] == 0 and between["restart"] >= 0.04
    assert after["steps"] > between["steps"]


def test_a_file_that_was_cut_short_starts_a_new_account(tmp_path):
    (tmp_path / "time.json").write_text('{"step": 5, "sec')
    TimeAccount(tmp_path, 0).save()
    assert json.loads((tmp_path / "time.json").read_text())["step"] == 0
