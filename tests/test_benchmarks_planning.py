"""The planning benchmark: its parsing of HLO programs, and its stored results."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import planning  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks/planning.json").read_text())
RESULTS.pop("machine")
PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = bf16[2,8]{1,0} all-gather(%w), dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %x)
}

%cond (s: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%yes (m: pred[3]) -> pred[3] {
  ROOT %r = (f32[5]{0}, pred[3]{0}) all-reduce(%m, %k), to_apply=%add
}

%no (m: pred[3]) -> pred[3] {
  ROOT %m = pred[3] parameter(0)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %l = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %c = pred[3] conditional(%due, %m, %m), branch_computations={%no, %yes}
  ROOT %s = f32[4]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_count_once_per_loop_iteration():
    assert sorted(planning.collectives(PROGRAM)) == [4 * 4, 5 * 4 + 3, *[2 * 8 * 2] * 7]


def test_allocator_traffic_is_below_two_scores_per_triplet_and_axis():
    assert max(row["triplets"] for row in RESULTS.values()) > 1_000_000
    for name, row in RESULTS.items():
        assert row["of the allocator"] < 2 * 2 * 4 * row["triplets"], name
        assert row["allocator's share"] < 3e-5, name
        assert row["allocator's number"] <= 9, name
        assert row["averages"] == 2 * row["adapters"], name


@pytest.mark.slow
def test_planning_reproduces_stored_results():
    code = (
        "import json, os\n"
        "from benchmarks import planning\n"
        "os.environ['XLA_FLAGS'] = planning.FLAGS\n"
        "print(json.dumps(planning.plan(planning.MODELS['7B'])))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, stored = json.loads(done.stdout), dict(RESULTS["7B"])
    for row in (ours, stored):
        del row["seconds to compile"]
    assert ours == stored
