"""A checkpoint of several processes, of which one cannot read its part."""

import json
import sys

from tests.helpers import pair


def test_a_part_that_one_process_cannot_read_is_damage_to_all(tmp_path):
    said = pair.run(
        lambda i, address: [
            *(sys.executable, "-m", "tests.helpers.damaged"),
            *(address, str(i), str(tmp_path)),
        ],
        timeout_sec=60,
    )
    assert [code for code, _, _ in said] == [0, 0], said
    for _, out, _ in said:
        saw = json.loads(out.splitlines()[-1])  # gloo says something before
        assert "checkpoints/00000002: process 1 of 2: " in saw["error"]
        assert saw["latest"] == [0, 1] and saw["restored"]
        assert "checkpoints_reference: process 1 of 2: " in saw["reference"]
    assert len(list((tmp_path / "checkpoints_damaged").iterdir())) == 1
